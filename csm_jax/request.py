"""A static batch of utterances: prompts prefilled together, then frames until the last row ends.

The host loop around `csm_jax.generate` that knows neither text nor audio: prompts in, codes out.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax import sharding
from csm_jax.array_typing import Array, Params
from csm_jax.config import FRAME_MS, CSMConfig
from csm_jax.generate import (
    PREFILL_BUCKETS,
    WINDOW_BUCKETS,
    DecodeState,
    RowSettings,
    Status,
    bucket,
    generate_frames,
    init_state,
    insert,
    pad_prompts,
    prefill,
)
from csm_jax.prompt import Prompt, Segment
from csm_jax.sampling import ranks_needed, request_keys, sampling_params

Progress = Callable[[int, int], None]
"""Called after every chunk with the frames made so far and the most there can be."""

# One layer's attention scores of a prefill are rows · heads · T² numbers: bound rows · T².
_PREFILL_AREA = 2**22


_FINISH: dict[int, Literal["eos", "length", "error"]] = {
    Status.EOS: "eos",
    Status.LENGTH: "length",
    Status.ERROR: "error",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One utterance to speak.

    Types are checked when it is made, values against the model before any work.

    Attributes:
        text: What to say.
        speaker: Speaker id, as in the context.
        context: Earlier turns with their audio, oldest first.
        max_audio_length_ms: Longest audio; rounded down to whole 80 ms frames.
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
    max_audio_length_ms: float = 90_000
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
        for name in ("decoder_temperature", "decoder_topk"):
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


_NUMBERS = ("max_audio_length_ms", "temperature", "topk", "top_p", "min_p", "seed")
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


@dataclass(frozen=True)
class Speech:
    """Codes of one utterance.

    Attributes:
        codes: int32 `[n, C]`; n is 0 when the model ended at once.
        finish_reason: "eos", "length", or "error" for scores that were not finite.
    """

    codes: np.ndarray
    finish_reason: Literal["eos", "length", "error"]

    @staticmethod
    def join(pieces: Sequence[np.ndarray], status: int) -> Speech:
        """Returns the speech of a row from its pieces and its last status."""
        return Speech(np.concatenate(pieces), _FINISH[status])


def row_settings(requests: Sequence[Request]) -> RowSettings:
    """Returns the requests' seeds, frame caps and sampling settings as arrays.

    Raises:
        ValueError: A setting is out of range.
    """
    return RowSettings(
        key=request_keys([r.seed for r in requests]),
        max_frames=jnp.asarray(np.array([r.max_frames for r in requests], np.int32)),
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


def chunk_frames() -> int:
    """Returns how many frames to make per call where nobody waits for the first."""
    # A frame takes most of a second on a CPU, where a call costs nothing; elsewhere it is the reverse.
    return 1 if jax.default_backend() == "cpu" else 8


class Chunk:
    """Frames of a batch that are being made."""

    def __init__(self, codes: Array, valid: Array, status: Array, rows: int):
        self._arrays, self._rows = (codes, valid, status), rows

    @functools.cached_property
    def _fetched(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes, valid, status = (np.asarray(array)[: self._rows] for array in self._arrays)
        return codes, valid, status

    def wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns codes `[B, n, C]`, which frames count `[B, n]`, and each row's status after them."""
        return self._fetched


class StaticBatch:
    """Requests that start together and run until the last of them ends."""

    def __init__(
        self,
        config: CSMConfig,
        params: Params,
        requests: Sequence[Request],
        prompts: Sequence[Prompt],
        *,
        rows: int,
    ):
        """Builds a batch.

        Args:
            config: Sizes.
            params: Weights.
            requests: At least one.
            prompts: One per request.
            rows: Slots, rounded up to what the mesh divides; those beyond the requests stay empty.
        """
        self.config = config
        self.params = params
        self.requests = list(requests)
        self.prompts = list(prompts)
        multiple = sharding.batch_multiple()
        self.rows = -(-rows // multiple) * multiple

    def run(self, frames_per_call: int, on_progress: Progress | None) -> Iterator[Chunk]:
        """Yields the batch's frames, each chunk as soon as the devices have been told to make it.

        A caller can finish work on the chunk before, while this one is being made. The next chunk is
        ordered when the caller comes back for it, and not before: nothing is made in vain.
        """
        config = self.config
        lengths = np.array([len(prompt.frames) for prompt in self.prompts])
        limits = np.array([request.max_frames for request in self.requests])
        limit = config.backbone.max_seq_len
        capacity = bucket(int((lengths + limits).max()), WINDOW_BUCKETS, limit=limit)
        state = self._prefilled(capacity)
        running = np.ones(len(self.requests), bool)
        ranks = ranks_needed(
            [k for r in self.requests for k in (r.topk, _either(r.decoder_topk, r.topk))],
            [r.top_p for r in self.requests for _ in range(2)],
            codebook_size=config.codebook_size,
        )
        made = 0
        while running.any():
            # Always the same size: rows stop at their caps, and another size is another program.
            size = frames_per_call
            longest = int(np.minimum(lengths + made + size, lengths + limits)[running].max())
            window = bucket(longest, WINDOW_BUCKETS, limit=capacity)
            state, codes, valid = generate_frames(
                self.params, state, config=config, num_frames=size, window=window, ranks=ranks
            )
            made += size
            chunk = Chunk(codes, valid, state.status, len(running))
            yield chunk
            # Fetched before the state, and the status in it, is given away to the next call.
            running = chunk.wait()[2] == Status.RUNNING
            if on_progress is not None:
                on_progress(min(made, int(limits.max())), int(limits.max()))

    def speeches(self, on_progress: Progress | None) -> list[Speech]:
        """Returns every request's codes, all frames of a row joined."""
        pieces: list[list[np.ndarray]] = [[] for _ in self.requests]
        last = np.zeros(len(self.requests), np.int32)
        for chunk in self.run(chunk_frames(), on_progress):
            codes, valid, last = chunk.wait()
            for row, kept in enumerate(pieces):
                kept.append(codes[row, valid[row]])
        return [Speech.join(kept, int(end)) for kept, end in zip(pieces, last, strict=True)]

    def _prefilled(self, capacity: int) -> DecodeState:
        config, params = self.config, self.params
        state = init_state(
            config,
            batch=self.rows,
            capacity=capacity,
            dtype=params["backbone"]["final_norm"].dtype,
        )
        longest = max(len(prompt.frames) for prompt in self.prompts)
        padded = bucket(longest, PREFILL_BUCKETS, limit=config.backbone.max_seq_len)
        group = max(1, _PREFILL_AREA // padded**2)
        for start in range(0, len(self.prompts), group):
            stop = min(start + group, len(self.prompts))
            pairs = [(prompt.frames, prompt.mask) for prompt in self.prompts[start:stop]]
            # On a mesh each device prefills its own rows; a rest that does not divide, every device.
            frames, mask = map(sharding.split_batch, pad_prompts(pairs, config=config))
            state = insert(
                state,
                prefill(params, frames, mask, config=config),
                row_settings(self.requests[start:stop]),
                jnp.arange(start, stop),
            )
        return state
