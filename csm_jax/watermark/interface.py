"""What the watermark asks of its networks, whatever runs them: `Networks`.

`csm_jax.watermark.network` runs them in JAX, `csm_jax.bridge.silentcipher` in torch. All of the rest
(levels, windows, messages, the search, streams) is shared and knows numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from csm_jax.watermark.files import Sizes

MESSAGE_SDR_DB = 36.0
"""How far the mark lies below the audio (SesameAILabs/csm `watermarking.py`)."""

REFERENCE_POWER = 0.002837200844477648
"""Mean square the networks expect of an utterance: that of VCTK (silentcipher `server.py`)."""


def gain_of(power: float) -> float:
    """Returns what brings samples of this mean square to the level the networks expect."""
    return (REFERENCE_POWER / power) ** 0.5


@dataclass(frozen=True, kw_only=True)
class MarkJob:
    """Audio to be marked: an utterance, or a window of one.

    Attributes:
        framed: Samples [(n + 1) · hop] of n frames; see `csm_jax.watermark.stft`.
        symbols: Of each frame, int32 [n].
        gain: What brings the utterance's samples to `REFERENCE_POWER`.
        first_new: Frames before this one were counted by an earlier window.
        past_power: The sum over those earlier frames of each one's mean squared magnitude.
        power_frames: How many frames the utterance has up to this window's end.
    """

    framed: np.ndarray
    symbols: np.ndarray
    gain: float
    first_new: int
    past_power: float
    power_frames: int


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A job's result.

    Attributes:
        samples: From the first frame's centre to the last's, float32 [(n - 1) · hop].
        new_power: What this window adds to the next one's `past_power`.
    """

    samples: np.ndarray
    new_power: float


def check_marked(samples: np.ndarray) -> np.ndarray:
    """Returns the samples.

    Raises:
        RuntimeError: They are not finite.
    """
    if not np.isfinite(samples).all():
        raise RuntimeError("the watermark networks returned NaN or infinity for this audio")
    return samples


@runtime_checkable  # the tests check annotations at run time
class Networks(Protocol):
    """The networks of one directory of files."""

    sizes: Sizes

    def mark(self, jobs: Sequence[MarkJob]) -> list[Marked]:
        """Returns each job's marked samples; no job changes another's."""
        ...

    def read(self, framed: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns each audio's scores, [frames, symbols]; the audio is at `REFERENCE_POWER`."""
        ...
