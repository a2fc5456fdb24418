"""Requests: what can be asked for one utterance, checked, and as the arrays the model reads."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from csm_jax.config import FRAME_MS
from csm_jax.generate import RowSettings
from csm_jax.prompt import Segment
from csm_jax.runaway import frame_cap
from csm_jax.sampling import ranks_needed, request_keys, sampling_params
from csm_jax.voices import Voice

MOST_FRAMES = 90_000 // FRAME_MS
"""Of a request that gives no length: Sesame's own default."""

FinishReason = Literal["eos", "length", "cancelled", "error"]
"""Why an utterance ended: the model said so; its cap, or a safety rule that `flags` names; whoever
asked for it; or something went wrong."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One utterance to speak.

    Types are checked when it is made, values against the model before any work.

    Attributes:
        text: What to say.
        speaker: Speaker id, as in the context.
        context: Earlier turns with their audio, oldest first.
        voice: A voice that many requests share; it comes before the context.
        max_audio_length_ms: Longest audio; rounded down to whole 80 ms frames. None takes what even a
            slow speaker would need for the text (`csm_jax.runaway.frame_cap`), and 90 s at most.
        temperature: 0 is greedy.
        topk: Codes kept at each draw; 0 keeps all.
        top_p: Probability mass kept; 1 keeps all.
        min_p: Least probability relative to the best; 0 keeps all.
        decoder_temperature: For codebooks 1..31; None means `temperature`.
        decoder_topk: For codebooks 1..31; None means `topk`.
        seed: Same seed, same request, same audio, whatever it is batched with.
        truncate_context: Drop the oldest turns when the context is too long, instead of raising.
    """

    text: str
    speaker: int
    context: Sequence[Segment] = ()
    voice: Voice | None = None
    max_audio_length_ms: float | None = None
    temperature: float = 0.9
    topk: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    decoder_temperature: float | None = None
    decoder_topk: int | None = None
    seed: int = 0
    truncate_context: bool = False

    def __post_init__(self) -> None:
        """Makes the context a tuple.

        Raises:
            TypeError: An argument has the wrong type; the message names it.
        """
        if not isinstance(self.text, str):
            raise TypeError(f"text must be a string, got {_shown(self.text)}")
        if isinstance(self.speaker, (bool, np.bool_)) or not hasattr(self.speaker, "__index__"):
            raise TypeError(f"speaker must be an integer, got {_shown(self.speaker)}")
        object.__setattr__(self, "context", _as_tuple(self.context, Segment, "context"))
        for name in _NUMBERS:
            _check_number(getattr(self, name), name)
        if self.voice is not None and not isinstance(self.voice, Voice):
            raise TypeError(f"voice must be a Voice, got {_shown(self.voice)}")
        for name in ("max_audio_length_ms", "decoder_temperature", "decoder_topk"):
            if getattr(self, name) is not None:
                _check_number(getattr(self, name), name)
        if not isinstance(self.truncate_context, (bool, np.bool_)):
            raise TypeError(f"truncate_context must be a bool, got {_shown(self.truncate_context)}")

    @property
    def max_frames(self) -> int:
        """Most frames to make.

        Raises:
            ValueError: Less than one frame, or no end, is asked for.
        """
        if self.max_audio_length_ms is None:
            return min(frame_cap(self.text), MOST_FRAMES)
        if not self.max_audio_length_ms >= FRAME_MS:
            raise ValueError(
                f"max_audio_length_ms={self.max_audio_length_ms} is less than one frame ({FRAME_MS} ms)"
            )
        if not self.max_audio_length_ms <= _MOST_MS:
            raise ValueError(
                f"max_audio_length_ms={self.max_audio_length_ms} is more than any model can make: "
                "give a finite number of milliseconds, such as 10000"
            )
        return int(self.max_audio_length_ms / FRAME_MS)


_NUMBERS = ("temperature", "topk", "top_p", "min_p", "seed")
_MOST_MS = 1e9  # eleven days


def as_requests(requests: Iterable[Request]) -> list[Request]:
    """Returns the requests as a list.

    Raises:
        TypeError: It is not an iterable, or an item is not a `Request`.
    """
    return list(_as_tuple(requests, Request, "requests"))


def _as_tuple(items: Any, kind: type, name: str) -> tuple[Any, ...]:
    if isinstance(items, kind):
        raise TypeError(f"{name} must hold {kind.__name__}s, got one by itself: write [it]")
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        raise TypeError(f"{name} must be a list of {kind.__name__}s, got {_shown(items)}")
    items = tuple(items)
    for i, item in enumerate(items):
        if not isinstance(item, kind):
            raise TypeError(f"{name}[{i}] must be a {kind.__name__}, got {_shown(item)}")
    return items


def _check_number(value: Any, name: str) -> None:
    # Numbers of numpy and scalars of jax as well. A value like 50.0 for topk is a matter of range.
    plain = not isinstance(value, (bool, np.bool_)) and getattr(value, "ndim", 0) == 0
    if not plain or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {_shown(value)}")


def _shown(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def row_settings(requests: Sequence[Request], *, segments: Sequence[int]) -> RowSettings:
    """Returns the requests' seeds, frame caps and sampling settings as arrays of the host.

    Args:
        requests: One per row.
        segments: The shared segment of each row, -1 for none.

    Raises:
        ValueError: A setting is out of range.
    """
    return RowSettings(
        key=request_keys([r.seed for r in requests]),
        max_frames=np.array([r.max_frames for r in requests], np.int32),
        segment=np.array(segments, np.int32),
        sampling=sampling_params(
            temperature=[r.temperature for r in requests],
            top_k=[r.topk for r in requests],
            top_p=[r.top_p for r in requests],
            min_p=[r.min_p for r in requests],
        ),
        decoder_sampling=sampling_params(
            temperature=[_either(r.decoder_temperature, r.temperature) for r in requests],
            top_k=[_either(r.decoder_topk, r.topk) for r in requests],
            top_p=[r.top_p for r in requests],
            min_p=[r.min_p for r in requests],
            prefix="decoder_",
        ),
    )


Number = TypeVar("Number", int, float)


def _either(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def check_settings(request: Request) -> None:
    """Checks a request's seed, frame cap and sampling settings.

    Raises:
        ValueError: A setting is out of range.
    """
    row_settings([request], segments=[-1])


def ranks_of(requests: Sequence[Request], *, codebook_size: int) -> int:
    """Returns how many scores must be sorted for these requests (`csm_jax.sampling.ranks_needed`)."""
    return ranks_needed(
        [k for r in requests for k in (r.topk, _either(r.decoder_topk, r.topk))],
        [r.top_p for r in requests for _ in range(2)],
        codebook_size=codebook_size,
    )
