"""Synthesizers over small random models, what they are asked, and codecs and watermarks that fail."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from csm_jax.array_typing import Params
from csm_jax.codec import Codec, StreamRows
from csm_jax.config import SAMPLES_PER_FRAME
from csm_jax.jobs import JobMaker
from csm_jax.pipeline import Generator
from csm_jax.prompt import Segment, TextTokenizer
from csm_jax.request import Request
from csm_jax.slots import Programs, SlotSizes
from csm_jax.synthesizer import Result, Synthesizer
from csm_jax.synthesizer_settings import SynthesizerSettings
from csm_jax.voices import Voice, VoiceTurn, prefix_voice
from tests.support.codec import PlainCodec
from tests.support.engine import vectors
from tests.support.model import params_of, short_config
from tests.support.tokenizer import build_tokenizer

CONFIG = short_config()
KEY = (1, 2, 3, 4, 5)

# By sizes, so that the tests of one process compile each program once; the parameters have one shape.
_programs: dict[SlotSizes, Programs] = {}


@functools.cache
def tokenizer() -> TextTokenizer:
    """Returns a tokenizer whose ids fit the model."""
    return TextTokenizer(build_tokenizer(vocab_size=CONFIG.text_vocab_size))


def plain_codec() -> PlainCodec:
    """Returns a codec whose audio shows its codes."""
    return PlainCodec(num_codebooks=CONFIG.num_codebooks, codebook_size=CONFIG.codebook_size)


def settings(**changes: Any) -> SynthesizerSettings:
    """Returns settings of a small synthesizer."""
    given: dict[str, Any] = {
        "slots": 4,
        "capacity": 128,
        "chunk_frames": 2,
        "prefill_rows": 2,
        "look_ahead": True,
        "voice_segments": 2,
        "voice_capacity": 32,
        "codec_rows": 3,
        "codec_frames": 5,
        "stop_repetition": False,
    }
    return SynthesizerSettings(**given | changes)


def make(
    *,
    codec: Codec | None = None,
    watermarker: Any = None,
    params: Params | None = None,
    **changes: Any,
) -> Synthesizer:
    """Returns a synthesizer of `settings(**changes)`; programs are shared with others of its sizes."""
    codec = codec or plain_codec()
    chosen = settings(**changes)
    return Synthesizer(
        jobs=JobMaker(CONFIG, tokenizer(), codec),
        params=params or params_of(CONFIG),
        codec=codec,
        watermarker=watermarker,
        watermark_key=KEY,
        settings=chosen,
        programs=_programs.setdefault(chosen.sizes, {}),
    )


@functools.cache
def generator() -> Generator:
    """Returns what makes the same requests one by one."""
    return Generator(
        config=CONFIG,
        params=params_of(CONFIG),
        tokenizer=tokenizer(),
        codec=plain_codec(),
        watermarker=None,
        watermark_key=KEY,
    )


def request(seed: int, *, frames: int | None = 8, **changes: Any) -> Request:
    """Returns a request; None leaves the cap to the text, which is the shortest there is."""
    given: dict[str, Any] = {
        "text": "a",
        "speaker": 0,
        "seed": seed,
        "max_audio_length_ms": None if frames is None else 80 * frames,
    }
    return Request(**given | changes)


def voice(seed: int, *, frames: int = 12, codebooks: int = CONFIG.num_codebooks) -> Voice:
    """Returns a voice of one turn with random codes."""
    codes = np.random.default_rng(seed).integers(0, CONFIG.codebook_size, (frames, codebooks))
    turn = VoiceTurn(speaker=0, text="Hello.", codes=codes.astype(np.int32))
    return Voice(
        name=f"voice-{seed}",
        turns=(turn,),
        codebook_size=CONFIG.codebook_size,
        provenance={"source": "a test"},
    )


def prefix(seed: int, *, count: int = 6) -> Voice:
    """Returns a voice of random vectors."""
    return prefix_voice(
        f"prefix-{seed}",
        vectors(CONFIG, count, seed=seed),
        config=CONFIG,
        model="unknown",
        provenance={"source": "a test"},
    )


def mixed(count: int, *, seed: int = 0) -> list[Request]:
    """Returns requests that differ in everything: texts, lengths, settings, contexts, voices."""
    rng = np.random.default_rng(seed)
    texts = ("a", "Hello there.", "The quick brown fox jumps.", "Over and over, in and out.")
    voices = [None, None, voice(1), prefix(2), voice(3, frames=20)]
    requests = []
    for i in range(count):
        context = [
            Segment(
                speaker=1,
                text="Before.",
                audio=np.full(int(rng.integers(1, 8)) * SAMPLES_PER_FRAME, 0.25, np.float32),
            )
            for _ in range(rng.integers(0, 2))
        ]
        requests.append(
            request(
                int(rng.integers(2**31)),
                frames=int(rng.integers(1, 16)),
                text=texts[rng.integers(len(texts))],
                speaker=i % 3,
                context=context,
                voice=voices[rng.integers(len(voices))],
                temperature=float(rng.choice([0.0, 0.7, 0.9])),
                topk=int(rng.choice([0, 5, 50])),
                top_p=float(rng.choice([1.0, 0.9])),
            )
        )
    return requests


def solo(requests: Sequence[Request]) -> list[Result]:
    """Returns what becomes of each request when it is made alone."""
    return [generator().generate_codes([request], batch_size=1)[0] for request in requests]


def failure(message: str = "INTERNAL: planted") -> RuntimeError:
    """Returns what a device raises."""
    return jax.errors.JaxRuntimeError(message)


class Rows:
    """Rows of a codec that can fail, and that say what they were asked."""

    def __init__(self, codec: PlainCodec, rows: int, frames: int) -> None:
        self._inner = StreamRows(codec, rows, frames)
        self.rows, self.frames = rows, frames
        self.calls: list[tuple[dict[int, int], set[int]]] = []
        self.fail_begin: set[int] = set()
        self.fail_wait: set[int] = set()

    def begin(
        self, codes: Mapping[int, np.ndarray], fresh: Collection[int]
    ) -> Callable[[], dict[int, np.ndarray]]:
        """Fails if this call's number is in `fail_begin`, or its wait if it is in `fail_wait`."""
        number = len(self.calls)
        self.calls.append(({row: len(part) for row, part in codes.items()}, set(fresh)))
        if number in self.fail_begin:
            raise failure()
        wait = self._inner.begin(codes, fresh)

        def waited() -> dict[int, np.ndarray]:
            if number in self.fail_wait:
                raise failure()
            return wait()

        return waited


class Marker:
    """Adds 1 to every sample, holds a frame back in a stream, and may fail."""

    def __init__(self, bad: Callable[[np.ndarray], Exception | None] = lambda audio: None) -> None:
        self._bad = bad

    def embed_batch(
        self, audios: Sequence[np.ndarray], sample_rate: int, key: Sequence[int]
    ) -> list[np.ndarray]:
        """Fails if one of them is bad."""
        for audio in audios:
            self._check(audio)
        return [audio + 1 for audio in audios]

    def open_stream(self, sample_rate: int, key: Sequence[int]) -> MarkerStream:
        """Returns a stream."""
        return MarkerStream(self._check)

    def verify(self, audio: np.ndarray, sample_rate: int, key: Sequence[int]) -> bool:
        """Returns whether it may be marked."""
        return bool((audio >= 1).all())

    def detect(self, audio: np.ndarray, sample_rate: int) -> tuple[int, ...] | None:
        """Returns nothing."""
        return None

    def _check(self, audio: np.ndarray) -> None:
        error = self._bad(audio)
        if error is not None:
            raise error


class MarkerStream:
    """One stream of a `Marker`."""

    def __init__(self, check: Callable[[np.ndarray], None]) -> None:
        self._check, self._held = check, np.zeros(0, np.float32)

    def push(self, audio: np.ndarray) -> np.ndarray:
        """Returns all but the last frame."""
        self._check(audio)
        both = np.concatenate([self._held, audio + 1])
        self._held = both[-SAMPLES_PER_FRAME:]
        return both[:-SAMPLES_PER_FRAME]

    def flush(self) -> np.ndarray:
        """Returns the last frame."""
        return self._held
