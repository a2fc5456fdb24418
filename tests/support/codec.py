"""A codec without weights: what it decodes shows its codes, frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from csm_jax.codec import StreamRows
from csm_jax.config import SAMPLE_RATE, SAMPLES_PER_FRAME


class PlainCodec:
    """Each frame of audio is constant: the sum of its codes over a thousand."""

    sample_rate = SAMPLE_RATE

    def __init__(self, *, num_codebooks: int, codebook_size: int) -> None:
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size

    def encode(self, audio: np.ndarray) -> np.ndarray:
        frames = -(-len(audio) // SAMPLES_PER_FRAME)
        return np.arange(frames * self.num_codebooks, dtype=np.int32).reshape(frames, -1) % (
            self.codebook_size
        )

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.repeat(codes.sum(axis=1) / 1000, SAMPLES_PER_FRAME).astype(np.float32)

    def decode_batch(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.decode(each) for each in codes]

    def begin(self, codes: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: self.decode(codes)

    def open_stream(self) -> PlainCodec:
        return self

    def open_rows(self, rows: int, frames: int) -> StreamRows:
        return StreamRows(self, rows, frames)

    def close(self) -> None: ...

    def __enter__(self) -> PlainCodec:
        return self

    def __exit__(self, *exception: object) -> None: ...
