"""A static batch of utterances: prompts prefilled together, then frames until the last row ends.

The host loop around `csm_jax.generate` that knows neither text nor audio: prompts in, codes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax import sharding
from csm_jax.array_typing import Params
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

    @property
    def max_frames(self) -> int:
        """Most frames to make.

        Raises:
            ValueError: Less than one frame is asked for.
        """
        if not self.max_audio_length_ms >= FRAME_MS:
            raise ValueError(
                f"max_audio_length_ms={self.max_audio_length_ms} is less than one frame ({FRAME_MS} ms)"
            )
        return int(min(self.max_audio_length_ms, 1e9) / FRAME_MS)


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
        ),
    )


Number = TypeVar("Number", int, float)


def _either(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def chunk_frames() -> int:
    """Returns how many frames to make per call where nobody waits for the first."""
    # A frame takes most of a second on a CPU, where a call costs nothing; elsewhere it is the reverse.
    return 1 if jax.default_backend() == "cpu" else 8


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

    def run(
        self, frames_per_call: int, on_progress: Progress | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields codes `[B, n, C]`, which frames count `[B, n]`, and each row's status after them."""
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
            status = np.asarray(state.status)[: len(running)]
            yield np.asarray(codes)[: len(running)], np.asarray(valid)[: len(running)], status
            running = status == Status.RUNNING
            if on_progress is not None:
                on_progress(min(made, int(limits.max())), int(limits.max()))

    def speeches(self, on_progress: Progress | None) -> list[Speech]:
        """Returns every request's codes, all frames of a row joined."""
        pieces: list[list[np.ndarray]] = [[] for _ in self.requests]
        last = np.zeros(len(self.requests), np.int32)
        for codes, valid, status in self.run(chunk_frames(), on_progress):
            last = status
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
