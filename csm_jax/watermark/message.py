"""What the mark says: a key as symbols, one per frame, and the key that read symbols spell.

The key's 5 bytes make 20 two-bit symbols (1..4); with an end symbol (0) they repeat every 21 frames.

Source: sony/silentcipher `server.py` (`encode_wav`, `decode_wav`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SHIFTS = (6, 4, 2, 0)  # the highest bits of a byte come first


def symbols(key: tuple[int, ...], first_frame: int, frames: int) -> np.ndarray:
    """Returns the symbols of `frames` frames from `first_frame` of the utterance on, int32."""
    pairs = [value >> shift & 3 for value in key for shift in _SHIFTS]
    period = np.array([*(pair + 1 for pair in pairs), 0], np.int32)
    return period[np.arange(first_frame, first_frame + frames) % period.size]


@dataclass(frozen=True)
class Reading:
    """A message read at one phase.

    Attributes:
        key: The key, or None where the message has not exactly one end symbol.
        agreement: How far the periods agree on their symbols, 0..1.
        clarity: The same, times how far the best symbol's score leads.
    """

    key: tuple[int, ...] | None
    agreement: float
    clarity: float


NOTHING = Reading(None, 0.0, 0.0)
"""What is read from audio too short or too silent for a message."""


def read(scores: np.ndarray, period: int) -> Reading:
    """Returns what the symbols' scores, [frames, symbols], say by a vote over the whole periods."""
    frames = len(scores) // period * period
    scores = scores[:frames]
    if not frames or not np.isfinite(scores).all():
        return NOTHING
    runner_up, best = np.moveaxis(np.partition(scores, (-2, -1), axis=1)[:, -2:], 1, 0)
    margin = float((best - runner_up).mean(dtype=np.float64))
    found = scores.argmax(axis=1).reshape(-1, period)
    votes = (found[:, :, None] == np.arange(scores.shape[1])).sum(axis=0)
    message = votes.argmax(axis=1)
    agreement = float(votes.max(axis=1).mean() / len(found))
    ends = np.flatnonzero(message == 0)
    if len(ends) != 1:
        return Reading(None, agreement, agreement * margin)
    pairs = np.roll(message, -int(ends[0]) - 1)[:-1] - 1
    values = pairs.reshape(-1, len(_SHIFTS)) @ (1 << np.array(_SHIFTS))
    return Reading(tuple(int(value) for value in values), agreement, agreement * margin)
