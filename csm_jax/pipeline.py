"""Text to speech: prompt -> frames -> codec -> watermark, for one utterance, a batch or a stream.

`Generator` keeps the signature of Sesame's (`generator.py`) and adds seeds, batches and streams. It is
a front of `csm_jax.synthesizer`; nothing here touches a model's insides. Audio is numpy float32
`[W]` at 24 kHz. The watermark is on unless it is turned off by name.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from csm_jax import config as csm_config
from csm_jax import sharding
from csm_jax.config import FRAME_MS, CSMConfig, Dtype
from csm_jax.engine import Job
from csm_jax.generate import PREFILL_BUCKETS, WINDOW_BUCKETS, bucket
from csm_jax.jobs import JobMaker
from csm_jax.model import param_shardings
from csm_jax.prompt import Segment, TextTokenizer
from csm_jax.request import MOST_FRAMES, Request, as_requests
from csm_jax.slots import Programs, SlotSizes
from csm_jax.synthesizer import Result, SynthesisError, Synthesizer
from csm_jax.synthesizer_settings import SynthesizerSettings, default_settings
from csm_jax.voices import Voice, model_hash
from csm_jax.watermark_key import DEFAULT_KEY, check_key

if TYPE_CHECKING:
    from csm_jax.array_typing import Params
    from csm_jax.codec import Codec
    from csm_jax.hub import ModelFiles
    from csm_jax.watermark.protocol import Watermarker

logger = logging.getLogger(__name__)

_PROGRAM_SETS = 16  # of the sizes used last; a batch of another size compiles its own

Progress = Callable[[int, int], None]
"""Called after every chunk with the frames made so far and the most there can be."""


Implementation = Literal["jax", "torch"]
"""Which of the two implementations of codec and watermark."""


class GenerationError(RuntimeError):
    """Some utterances failed; the others are kept.

    Attributes:
        audios: Per request its audio, None where it failed.
        failed: Indices of the requests that failed.
    """

    def __init__(self, message: str, audios: list[np.ndarray | None], failed: list[int]):
        super().__init__(message)
        self.audios = audios
        self.failed = failed


class Generator:
    """Speaks text with one model, tokenizer, codec and watermark."""

    def __init__(
        self,
        *,
        config: CSMConfig,
        params: Params,
        tokenizer: TextTokenizer,
        codec: Codec,
        watermarker: Watermarker | None,
        watermark_key: Sequence[int] = DEFAULT_KEY,
        vocabulary: Collection[str] | None = None,
    ):
        """Builds a generator from its parts; `load_csm_1b` finds and loads them.

        Args:
            config: Sizes.
            params: Weights on their devices.
            tokenizer: Text to ids.
            codec: Audio to codes and back.
            watermarker: None leaves the audio unmarked.
            watermark_key: Five bytes.
            vocabulary: The only words that the model knows, in small letters: others are logged.
        """
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.codec = codec
        self.watermarker = watermarker
        self.watermark_key = check_key(watermark_key)
        self.sample_rate = codec.sample_rate
        self._jobs = JobMaker(
            config,
            tokenizer,
            codec,
            model=functools.partial(model_hash, params),
            vocabulary=vocabulary,
        )
        self._programs: OrderedDict[tuple[Any, ...], Programs] = OrderedDict()

    def generate(
        self,
        text: str,
        speaker: int,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float = 0.9,
        topk: int = 50,
        *,
        on_progress: Progress | None = None,
        **options: float | int | bool | Voice | None,
    ) -> np.ndarray:
        """Returns one utterance, float32 `[W]` at `sample_rate`; empty if the model ends at once.

        Args:
            text: What to say.
            speaker: Speaker id.
            context: Earlier turns, oldest first.
            max_audio_length_ms: Longest audio; None takes Sesame's 90 s, or half of the positions of a
                model that has few.
            temperature: 0 is greedy.
            topk: Codes kept at each draw.
            on_progress: Called after every chunk.
            options: The other fields of `Request`: `seed` (0 unless given, so that a call repeats
                itself), `top_p`, `min_p`, ...

        Raises:
            ValueError: Bad input, or a context that leaves no room (the message has the numbers).
            GenerationError: The model's scores were not finite.
        """
        request = _request(
            options,
            text=text,
            speaker=speaker,
            context=context,
            max_audio_length_ms=self._longest_ms(max_audio_length_ms),
            temperature=temperature,
            topk=topk,
        )
        return self.generate_batch([request], on_progress=on_progress)[0]

    def generate_batch(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = 32,
        on_progress: Progress | None = None,
    ) -> list[np.ndarray]:
        """Returns one utterance per request, each as if it had been made alone.

        Args:
            requests: What to say; contexts, seeds, settings and lengths may all differ.
            batch_size: Most rows at a time; the others follow as rows end.
            on_progress: Called after every chunk with the frames of the longest row so far.

        Raises:
            ValueError: Bad input in any request, before anything is generated.
            TypeError: An item is not a `Request`.
            GenerationError: Scores of some requests were not finite; it holds the others' audio.
        """
        results = self.generate_results(requests, batch_size=batch_size, on_progress=on_progress)
        audios = [result.audio for result in results]
        finished = [audio for audio in audios if audio is not None]
        if len(finished) == len(audios):
            return finished
        failed = [i for i, audio in enumerate(audios) if audio is None]
        raise GenerationError(
            f"requests {failed} failed; the first: {results[failed[0]].error}", audios, failed
        )

    def generate_results(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = 32,
        stop_repetition: bool = False,
        on_progress: Progress | None = None,
    ) -> list[Result]:
        """Returns each request's audio, codes, and why it ended; one that failed says so in its result.

        Args:
            requests: As `generate_batch`.
            batch_size: Most rows at a time.
            stop_repetition: End requests that say the same again and again, and flag them.
            on_progress: As `generate_batch`.

        Raises:
            TypeError, ValueError: Bad input in any request, before anything is generated.
        """
        return self._run(
            as_requests(requests),
            batch_size,
            on_progress,
            decode=True,
            stop_repetition=stop_repetition,
        )

    def prompt_lengths(self, requests: Iterable[Request]) -> list[int]:
        """Returns how many positions the prompt of each request takes, voice and context included.

        Raises:
            TypeError, ValueError: Whatever would keep a request from being spoken.
        """
        jobs = self._prepare(as_requests(requests))
        return [len(job.prompt[0]) + _before(job) for job in jobs]

    def generate_codes(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = 32,
        on_progress: Progress | None = None,
    ) -> list[Result]:
        """Returns the codes of each request and why it ended, without decoding to audio.

        Raises:
            TypeError, ValueError: Bad input in any request, before anything is generated.
        """
        return self._run(as_requests(requests), batch_size, on_progress, decode=False)

    def _run(
        self,
        requests: Sequence[Request],
        batch_size: int,
        on_progress: Progress | None,
        *,
        decode: bool,
        stop_repetition: bool = False,
    ) -> list[Result]:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not requests:
            return []
        jobs = self._prepare(requests)
        synthesizer = self._synthesizer(
            jobs, slots=min(batch_size, len(requests)), stop_repetition=stop_repetition
        )
        for i, job in enumerate(jobs):
            synthesizer.submit(job, id=i, decode=decode)
        most = max(request.max_frames for request in requests)
        results: dict[Hashable, Result] = {}
        while synthesizer.busy:
            results |= {o.id: o for o in synthesizer.pump() if isinstance(o, Result)}
            if on_progress is not None:
                on_progress(synthesizer.longest, most)
        return [results[i] for i in range(len(requests))]

    def _prepare(self, requests: Sequence[Request]) -> list[Job]:
        # A voice is part of each prompt here: what many requests share is worth keeping only for as
        # long as a synthesizer lives. Only vectors must have a segment.
        def capacity(voice: Voice | None) -> int:
            trained = voice is not None and voice.vectors is not None
            return self.config.backbone.max_seq_len if trained else 0

        return [self._jobs.job(each, segment_capacity=capacity(each.voice)) for each in requests]

    def _synthesizer(
        self,
        jobs: Sequence[Job],
        *,
        slots: int,
        chunk_frames: int | None = None,
        stop_repetition: bool = False,
    ) -> Synthesizer:
        """Returns a synthesizer for these jobs, on the mesh that is set, if one is."""
        multiple = sharding.batch_multiple()
        longest = max(len(job.prompt[0]) + job.request.max_frames for job in jobs)
        before = max(map(_before, jobs))
        most = self.config.backbone.max_seq_len
        settings = default_settings(
            self.config,
            slots=-(-slots // multiple) * multiple,
            capacity=bucket(longest, WINDOW_BUCKETS, limit=most),
            chunk_frames=chunk_frames,
            voice_bytes=0,
        )
        settings = dataclasses.replace(
            settings,
            codec_rows=min(settings.codec_rows, settings.slots),
            stop_repetition=stop_repetition,
            voice_segments=min(before, 1),
            voice_capacity=bucket(before, PREFILL_BUCKETS, limit=most) if before else 0,
        )
        return self.synthesizer(settings)

    def synthesizer(self, settings: SynthesizerSettings) -> Synthesizer:
        """Returns a `Synthesizer` of this generator's parts, for any number of requests.

        It works on the mesh that is set now (`jax.set_mesh`), if one is; the generator's `params` must
        be on it.

        Args:
            settings: For example `csm_jax.synthesizer_settings.default_settings(generator.config, slots=32)`.

        Raises:
            ValueError: The settings do not fit the model or the mesh.
        """
        mesh = sharding.current_mesh()
        return Synthesizer(
            jobs=self._jobs,
            params=self.params,
            codec=self.codec,
            watermarker=self.watermarker,
            watermark_key=self.watermark_key,
            settings=settings,
            mesh=mesh,
            programs=self._programs_of(settings.sizes, mesh),
        )

    def _programs_of(self, sizes: SlotSizes, mesh: jax.sharding.Mesh | None) -> Programs:
        """Returns where what is compiled for these sizes is kept."""
        key = (sizes, mesh, sharding.current_rules())
        programs = self._programs.pop(key, {})
        self._programs[key] = programs
        while len(self._programs) > _PROGRAM_SETS:
            self._programs.popitem(last=False)
        return programs

    def stream(
        self,
        text: str,
        speaker: int,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float = 0.9,
        topk: int = 50,
        *,
        chunk_frames: int = 6,
        **options: float | int | bool | Voice | None,
    ) -> Iterator[np.ndarray]:
        """Yields one utterance piece by piece, float32 at `sample_rate`, as it is made.

        The codes are those of `generate` with the same arguments. With the watermark on, the first
        piece waits until one window of the watermark is complete.

        Args:
            text: What to say.
            speaker: Speaker id.
            context: Earlier turns, oldest first.
            max_audio_length_ms: Longest audio; None takes Sesame's 90 s, or half of the positions of a
                model that has few.
            temperature: 0 is greedy.
            topk: Codes kept at each draw.
            chunk_frames: Frames (80 ms each) made between two pieces.
            options: The other fields of `Request`.

        Raises:
            ValueError: Bad input, raised by this call and not by the first `next`.
            GenerationError: The scores were not finite; pieces before it are good.
        """
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}")
        request = _request(
            options,
            text=text,
            speaker=speaker,
            context=context,
            max_audio_length_ms=self._longest_ms(max_audio_length_ms),
            temperature=temperature,
            topk=topk,
        )
        [job] = self._prepare([request])
        synthesizer = self._synthesizer([job], slots=1, chunk_frames=chunk_frames)
        return self._stream(synthesizer, job)

    def _longest_ms(self, asked: float | None) -> float:
        if asked is not None:
            return asked
        most = self.config.backbone.max_seq_len
        return FRAME_MS * (MOST_FRAMES if 2 * most >= 3 * MOST_FRAMES else most // 2)

    def _stream(self, synthesizer: Synthesizer, job: Job) -> Iterator[np.ndarray]:
        try:
            yield from synthesizer.stream(job)
        except SynthesisError as error:
            raise GenerationError(str(error), [None], [0]) from error


def _before(job: Job) -> int:
    """Returns the positions of a job's voice that are not part of its prompt."""
    return 0 if job.voice is None else len(job.voice)


def _request(options: Mapping[str, Any], **given: Any) -> Request:
    known = {field.name for field in dataclasses.fields(Request)} - given.keys()
    if unknown := options.keys() - known:
        raise TypeError(
            f"unknown options {sorted(unknown)}: besides the named arguments (topk is one word) there "
            f"are {sorted(known)}"
        )
    return Request(**given, **options)


def load_csm_1b(
    source: str | Path = "sesame/csm-1b",
    *,
    dtype: Dtype | None = None,
    layout: str | None = None,
    codec: Implementation = "jax",
    watermark: Implementation | bool = "jax",
    watermark_key: Sequence[int] = DEFAULT_KEY,
    mesh: jax.sharding.Mesh | None = None,
    device: str | None = None,
) -> Generator:
    """Returns a ready generator.

    Compiled programs are kept in a persistent cache (`CSM_JAX_CACHE_DIR`, by default
    `~/.cache/csm_jax`), unless JAX has one configured already.

    Args:
        source: A hub id, a directory holding everything, a checkpoint file, or "demo", the small
            model inside the package, which knows 196 words and is never watermarked.
        dtype: Of weights and activations; by default bfloat16, on CPU float32.
        layout: The checkpoint's layout where its names cannot tell (`csm-hf` or `csm-mlx`).
        codec: "jax" runs Mimi beside the model, "torch" through the moshi package on torch's CPU.
        watermark: "jax" or "torch" likewise; False leaves the audio unmarked.
        watermark_key: Five bytes; the default is Sesame's public key.
        mesh: Devices to split the weights over; use the generator with this mesh set
            (`jax.set_mesh`). None takes one device.
        device: Sesame's argument, refused: JAX chooses the device (`JAX_PLATFORMS`).

    Raises:
        FileNotFoundError: A file is missing; the message says how to get it.
        ValueError: A file is damaged, or does not belong to the model.
        ImportError: "torch" was asked for and is not installed; the message has the command.
    """
    if str(source) in ("cuda", "cpu", "mps", "gpu", "tpu"):
        source, device = "", str(source)
    if device is not None:
        raise ValueError(
            f"load_csm_1b takes a model, not a device ({device!r}): JAX takes the accelerator it "
            "finds; set the environment variable JAX_PLATFORMS to choose"
        )
    if codec not in ("jax", "torch"):
        raise ValueError(f"codec must be 'jax' or 'torch', got {codec!r}")
    # Imported here: the hub client and the weights' readers are needed to load, not to define.
    from csm_jax import hub, weights

    enable_compilation_cache()
    files = hub.locate(source)
    marked = watermark if hub.is_watermarked(source) else False
    watermarker = load_watermarker(files.watermark_dir, marked)
    tokenizer = TextTokenizer.from_file(files.tokenizer())
    sizes = csm_config.read_config(files.config) if files.config is not None else None
    if mesh is not None and sizes is not None:
        param_shardings(sizes, mesh)  # what does not fit is an error before the weights are read
    config, params = weights.load_checkpoint(
        files.checkpoint,
        layout=layout,
        dtype=dtype or csm_config.default_dtype(jax.default_backend()),
        config=sizes,
    )
    if mesh is not None:
        params = jax.device_put(params, param_shardings(config, mesh))
    return Generator(
        config=config,
        params=params,
        tokenizer=tokenizer,
        codec=_open_codec(
            find_mimi(files) if codec == "jax" else files.mimi(),
            codec,
            num_codebooks=config.num_codebooks,
        ),
        watermarker=watermarker,
        watermark_key=watermark_key,
        vocabulary=files.vocabulary(),
    )


def load_codec(source: str | Path = "sesame/csm-1b", kind: Implementation = "jax") -> Codec:
    """Returns the codec of a model without the model; of one on the hub no checkpoint is fetched.

    Args:
        source: As `load_csm_1b`.
        kind: As `load_csm_1b`'s `codec`.

    Raises:
        FileNotFoundError, ValueError, ImportError: As `load_csm_1b`.
    """
    from csm_jax import hub

    enable_compilation_cache()
    # Of a model on this machine the checkpoint may hold Mimi.
    beside = kind == "jax" and hub.local_path(source) is not None
    path = find_mimi(hub.locate(source)) if beside else hub.locate_mimi(source)
    config = hub.locate_config(source)
    # A lone checkpoint has no config.json.
    sizes = csm_config.csm_1b() if config is None else csm_config.read_config(config)
    return _open_codec(path, kind, num_codebooks=sizes.num_codebooks)


def _open_codec(path: Path, kind: Implementation, *, num_codebooks: int) -> Codec:
    if kind == "torch":
        from csm_jax.bridge.mimi import TorchMimi

        return TorchMimi.from_file(path, num_codebooks=num_codebooks)
    from csm_jax.mimi.codec import JaxMimi
    from csm_jax.weights.mimi import load_mimi

    return JaxMimi(*load_mimi(path), num_codebooks=num_codebooks)


def find_mimi(files: ModelFiles) -> Path:
    """Returns where the native codec's weights are: beside the model, within its checkpoint, or fetched.

    Raises:
        FileNotFoundError: The model directory has none; all missing files are listed.
        HubError: They cannot be fetched.
    """
    from csm_jax.weights.mimi import holds_mimi

    beside = files.mimi_beside()
    if beside is None and holds_mimi(files.checkpoint):  # a checkpoint of transformers brings it
        return files.checkpoint
    return beside or files.mimi()


def load_watermarker(
    directory: Callable[[], Path], kind: Implementation | bool = "jax"
) -> Watermarker | None:
    """Returns the watermarker of a directory of silentcipher's files, None for `False`.

    Args:
        directory: Finds the directory; called only if it is needed.
        kind: As `load_csm_1b`'s `watermark`.

    Raises:
        FileNotFoundError, ValueError, ImportError: As `load_csm_1b`.
    """
    if kind is False:
        return None
    if kind == "torch":
        from csm_jax.bridge.watermark import TorchWatermarker

        return TorchWatermarker.from_dir(directory())
    if kind not in ("jax", True):
        raise ValueError(f"watermark must be 'jax', 'torch' or False, got {kind!r}")
    from csm_jax.watermark import JaxWatermarker

    return JaxWatermarker.from_dir(directory())


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, unless one is configured or none can be written."""
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        chosen = os.environ.get("CSM_JAX_CACHE_DIR")
        path = Path(chosen) if chosen else Path.home() / ".cache" / "csm_jax"
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        logger.info("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX settles at its first compilation whether it has a cache; that may be behind us.
    compilation_cache.reset_cache()
