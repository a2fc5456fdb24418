"""What a watermarker does, for those that use one: `csm_jax.watermark.Watermarker` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable  # the tests check annotations at run time
class Watermarker(Protocol):
    """What puts the watermark in and finds it."""

    def embed_batch(
        self, audios: Sequence[np.ndarray], sample_rate: int, key: Sequence[int]
    ) -> list[np.ndarray]:
        """Returns each audio marked, same length and rate, as if it were alone."""
        ...

    def open_stream(self, sample_rate: int, key: Sequence[int]) -> WatermarkStream:
        """Returns a marker of audio that arrives in pieces."""
        ...

    def verify(self, audio: np.ndarray, sample_rate: int, key: Sequence[int]) -> bool:
        """Returns whether the audio carries this key."""
        ...

    def detect(self, audio: np.ndarray, sample_rate: int) -> tuple[int, ...] | None:
        """Returns the key in the audio, or None where no mark is read."""
        ...


@runtime_checkable  # the tests check annotations at run time
class WatermarkStream(Protocol):
    """Marks audio piece by piece; holds some back until its window is complete."""

    def push(self, audio: np.ndarray) -> np.ndarray:
        """Returns the marked audio that is ready, after taking one more piece."""
        ...

    def flush(self) -> np.ndarray:
        """Returns the rest."""
        ...
