"""Mimi through Kyutai's `moshi` package: audio at 24 kHz to and from 32 codes per 80 ms frame.

The tensors are moshi's: its `[batch, codebooks, frames]` is turned into `[frames, codebooks]` here
and nowhere else. The published weights are `tokenizer-e351c8d8-checkpoint125.safetensors` of
kyutai/moshiko-pytorch-bf16; a file with other sizes (the demo, tests) describes itself by moshi's
own configuration as JSON under the key `mimi_config` of its safetensors metadata.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.audio import check_audio
from csm_jax.bridge import missing_dependency
from csm_jax.codec import StreamRows, check_codes

try:
    import torch
except ImportError as error:
    raise missing_dependency("torch", "the Mimi codec") from error
try:
    from moshi.models import loaders
    from moshi.models.compression import MimiModel
    from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
    from moshi.utils.compile import no_compile, no_cuda_graph
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file
except ImportError as error:
    raise missing_dependency(error.name or "moshi", "the Mimi codec") from error

_STREAM_FRAMES = 16  # frames decoded per step of a stream; longer chunks are cut into such steps
_BATCH_FRAMES = 1_200  # padded frames per batched decode: 0.6 GB for the widest activation


class TorchMimi:
    """Mimi as a `csm_jax.codec.Codec`, on any torch device.

    Calls from several threads are safe: they take turns.
    """

    def __init__(self, model: MimiModel) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._lock = threading.Lock()
        self._samples_per_frame = model.frame_size

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, num_codebooks: int = 32, device: str = "cpu"
    ) -> TorchMimi:
        """Returns the codec whose weights are in the safetensors file at `path`.

        Args:
            path: The weights, in moshi's names.
            num_codebooks: Codes per frame to use, at most the codebooks in the file.
            device: A torch device.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated or damaged, is not a Mimi, or has too few codebooks.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no Mimi weights at {path}")
        config = _read_config(path)
        try:
            model = loaders.get_mimi(None, config, device=device, num_codebooks=1)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: its mimi_config does not describe a Mimi moshi can build: {error!r}"
            ) from error
        try:
            model.load_state_dict(load_file(path, device=str(device)))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        except RuntimeError as error:  # torch lists every missing, extra and mis-shaped tensor
            raise ValueError(f"{path} does not hold Mimi's weights: {error}") from error
        if not 1 <= num_codebooks <= model.total_codebooks:
            raise ValueError(
                f"num_codebooks={num_codebooks}, but {path} has {model.total_codebooks} codebooks"
            )
        model.set_num_codebooks(num_codebooks)
        return cls(model.eval().requires_grad_(False))

    @property
    def sample_rate(self) -> int:
        """Samples per second: 24,000."""
        return int(self._model.sample_rate)

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return self._model.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Codes run from 0 to this, exclusive: 2,048 in the published weights."""
        return self._model.cardinality

    @property
    def samples_per_frame(self) -> int:
        """Audio samples per frame: 1,920."""
        return self._samples_per_frame

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """Returns the codes (int32 [ceil(W / 1920), C]) of 24 kHz audio (float [W]).

        The last frame is filled up with silence.

        Raises:
            TypeError, ValueError: Bad audio, see `csm_jax.audio.check_audio`.
        """
        samples = torch.from_numpy(check_audio(audio, "audio")).to(self._device)
        with self._exclusive():
            codes = self._model.encode(samples[None, None])
        return codes[0].T.to(torch.int32).cpu().numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the audio (float32 [n * 1920]) of codes (int [n, C]).

        Raises:
            TypeError, ValueError: Bad codes, see `csm_jax.codec.check_codes`.
        """
        return self.decode_batch([codes])[0]

    def decode_batch(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the audio of each row of codes, decoded together; their lengths may differ.

        Shorter rows are filled up on the right and cut afterwards: Mimi is causal, so what follows
        a row's end cannot reach its samples.

        Raises:
            TypeError, ValueError: Bad codes, see `csm_jax.codec.check_codes`.
        """
        rows = [self._check_codes(row) for row in codes]
        # Rows of like length share a batch, so that little is spent on padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        audio: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
        pending = [index for index in order if len(rows[index])]
        while pending:
            longest = len(rows[pending[-1]])
            count = max(1, _BATCH_FRAMES // longest)
            group, pending = pending[-count:], pending[:-count]
            padded = np.zeros((len(group), longest, self.num_codebooks), np.int64)
            for slot, index in enumerate(group):
                padded[slot, : len(rows[index])] = rows[index]
            tensor = torch.from_numpy(padded).to(self._device).transpose(1, 2)
            with self._exclusive():
                decoded = self._model.decode(tensor)[:, 0].float().cpu().numpy()
            for slot, index in enumerate(group):
                audio[index] = decoded[slot, : len(rows[index]) * self._samples_per_frame].copy()
        return audio

    def open_stream(self) -> MimiStream:
        """Returns a decoder for one utterance in pieces; streams do not disturb each other."""
        return MimiStream(self)

    def open_rows(self, rows: int, frames: int) -> StreamRows:
        """Returns `rows` streams that are driven together."""
        return StreamRows(self, rows, frames)

    def _check_codes(self, codes: np.ndarray) -> np.ndarray:
        return check_codes(
            codes, num_codebooks=self.num_codebooks, codebook_size=self.codebook_size
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        # Without torch.compile (minutes at the first call) and CUDA graphs (fixed chunk sizes).
        with self._lock, torch.inference_mode(), no_compile(), no_cuda_graph():
            yield


class MimiStream:
    """One utterance decoded piece by piece, equal to decoding it whole.

    moshi keeps streaming state inside the modules; here each stream owns its state and lends it to
    the shared modules for the length of one call.
    """

    def __init__(self, codec: TorchMimi) -> None:
        self._codec = codec
        model = codec._model
        steps = _STREAM_FRAMES * int(model.encoder_frame_rate / model.frame_rate)
        with codec._exclusive():
            with model.streaming(batch_size=1):
                self._state: dict[str, Any] | None = model.get_streaming_state()
            for name, module in model.named_modules():
                if isinstance(module, StreamingMultiheadAttention):
                    _widen_cache(module, self._state[name], steps=steps)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the audio (float32 [n * 1920]) of the next frames (int [n, C]).

        Raises:
            TypeError, ValueError: Bad codes, see `csm_jax.codec.check_codes`; the stream is as it
                was before the call.
            RuntimeError: The stream is closed.
        """
        state, codec = self._state, self._codec
        if state is None:
            raise RuntimeError("this Mimi stream is closed; open another with open_stream()")
        rows = codec._check_codes(codes)
        audio = [np.zeros(0, np.float32)]
        with codec._exclusive():
            model = codec._model
            model.set_streaming_state(state)
            try:
                for start in range(0, len(rows), _STREAM_FRAMES):
                    step = torch.from_numpy(rows[start : start + _STREAM_FRAMES].astype(np.int64))
                    decoded = model.decode(step.to(codec._device).T[None])
                    audio.append(decoded[0, 0].float().cpu().numpy())
            finally:
                model.set_streaming_state(dict.fromkeys(state))
        return np.concatenate(audio)

    def begin(self, codes: np.ndarray) -> Callable[[], np.ndarray]:
        """Decodes the next frames (int [n, C]) at once; returns a function that gives the audio."""
        audio = self.decode(codes)
        return lambda: audio

    def close(self) -> None:
        """Frees the stream's state; closing twice does nothing."""
        self._state = None

    def __enter__(self) -> MimiStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _widen_cache(module: StreamingMultiheadAttention, state: Any, *, steps: int) -> None:
    # moshi's ring holds exactly the attention's context, and a chunk overwrites its oldest entries
    # before the chunk's first steps have read them: past 10 s a stream would drift away from the
    # whole. Room for one more chunk keeps every step's full context; the attention's own mask
    # still limits what it sees.
    ring, context = state.kv_cache, module.context
    if ring is None or context is None:
        raise RuntimeError("this Mimi has an attention without a bounded context; cannot stream it")
    _, batch_size, num_heads, _, head_dim = ring.cache.shape
    state.kv_cache = RingKVCache(
        batch_size,
        num_heads,
        head_dim,
        context + steps,
        device=ring.cache.device,
        dtype=ring.cache.dtype,
    )


def _read_config(path: Path) -> dict[str, Any] | None:
    # None means the published sizes, which moshi knows by itself.
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: Mimi's weights must be a .safetensors file")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if "mimi_config" not in metadata:
        return None
    try:
        config = json.loads(metadata["mimi_config"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the mimi_config in its metadata is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the mimi_config in its metadata is not a JSON object")
    return config
