"""Frames from prompts: prefill, insert, and the jitted scan over frames.

    prompts -> prefill -> Prefix -> insert into slots of a DecodeState -> generate_frames (n at a time)
    voice -> voice_inputs -> prefill_inputs -> share: a beginning that many rows have in common

A `DecodeState` is a batch of slots. `generate_frames` is one `lax.scan` of n frames over all of them:
each step draws the C codes that follow every row's hidden state and feeds the frame to the backbone.
Rows differ in prompt, length, seed, settings and frame cap; a row's codes depend on none of its
neighbours and not on n. Everything else (one utterance, a batch, a stream) is a host loop around it.

A row ends by Sesame's rule: a frame whose C codes are all 0 ends the audio and is not part of it
(`generator.py`). It also ends at its frame cap, and when its scores are not finite, alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax import kvcache, sharding
from csm_jax.array_typing import Array, Bool, DTypeLike, Float, Int, Params, UInt, pytree
from csm_jax.config import CSMConfig
from csm_jax.kvcache import KVCache, SharedKV
from csm_jax.model import CSM, sample_frame
from csm_jax.sampling import Either, SamplingParams, frame_keys

PREFILL_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048)
"""Prompt lengths that are compiled; a prompt is padded to the next."""
WINDOW_BUCKETS = (128, 256, 512, 1024, 2048)
"""Read windows that are compiled; a step reads the first that covers the longest running row."""


class Status(IntEnum):
    """What a slot is doing."""

    EMPTY = 0
    RUNNING = 1
    EOS = 2
    """Ended itself with an all-zero frame."""
    LENGTH = 3
    """Reached its frame cap."""
    ERROR = 4
    """Produced scores that are not finite, or outgrew its cache or window."""


@pytree
class Prefix:
    """What a prompt leaves behind, per row.

    Attributes:
        k: Per layer, the prompt's keys.
        v: Per layer, the prompt's values.
        length: Prompt positions, padding not counted.
        hidden: The backbone's hidden state at the last of them.
    """

    k: tuple[Float[Array, "B K T H"], ...]
    v: tuple[Float[Array, "B K T H"], ...]
    length: Int[Array, "B"]
    hidden: Float[Array, "B D"]


@pytree
class RowSettings:
    """What a request asks for, per row.

    Attributes:
        key: Raw random keys (`csm_jax.sampling.request_keys`).
        max_frames: Most frames to make.
        segment: The shared segment that comes before the row (`csm_jax.kvcache.SharedKV`), -1 for none.
        sampling: Settings for code 0.
        decoder_sampling: Settings for codes 1..C-1.
    """

    key: UInt[Either, "B 2"]
    max_frames: Int[Either, "B"]
    segment: Int[Either, "B"]
    sampling: SamplingParams
    decoder_sampling: SamplingParams


@pytree
class DecodeState:
    """A batch of slots between two frames.

    Attributes:
        cache: The backbone's keys and values.
        hidden: The hidden state the next frame follows.
        frame: Frames made so far.
        status: A `Status`.
        settings: What each row asked for.
    """

    cache: KVCache
    hidden: Float[Array, "B D"]
    frame: Int[Array, "B"]
    status: Int[Array, "B"]
    settings: RowSettings


def bucket(length: int, buckets: Sequence[int], *, limit: int) -> int:
    """Returns the smallest of `buckets` that holds `length`, none above `limit`.

    Raises:
        ValueError: `length` exceeds `limit`.
    """
    if length > limit:
        raise ValueError(f"{length:,} positions do not fit max_seq_len={limit:,}")
    return next((size for size in buckets if length <= size <= limit), limit)


def pad_prompts(
    prompts: Sequence[tuple[np.ndarray, np.ndarray]], *, config: CSMConfig
) -> tuple[Int[Array, "B T C1"], Bool[Array, "B T C1"]]:
    """Returns prompts padded on the right to one prefill bucket, as device arrays.

    Args:
        prompts: `(frames [T, C+1], mask [T, C+1])` per row.
        config: Sizes.

    Raises:
        ValueError: See `check_prompt`; the message names the row.
    """
    for i, (frames, mask) in enumerate(prompts):
        check_prompt(frames, mask, config=config, name=f"prompt {i}")
    longest = max(len(frames) for frames, _ in prompts)
    size = bucket(longest, PREFILL_BUCKETS, limit=config.backbone.max_seq_len)
    frames, mask = stack_prompts(prompts, size)
    return jnp.asarray(frames), jnp.asarray(mask)


def check_prompt(
    frames: np.ndarray, mask: np.ndarray, *, config: CSMConfig, name: str = "prompt"
) -> None:
    """Checks that a prompt is one the backbone can read.

    Args:
        frames: Codes and text id per position, [T, C+1].
        mask: Which columns count, [T, C+1].
        config: Sizes.
        name: What errors call it.

    Raises:
        ValueError: It is empty, longer than the backbone holds, has another number of columns, or
            holds an id its embedding table lacks.
    """
    columns = config.num_codebooks + 1
    limits = np.array([config.audio_vocab_size] * config.num_codebooks + [config.text_vocab_size])
    if frames.ndim != 2 or frames.shape[1] != columns or frames.shape != mask.shape:
        raise ValueError(
            f"{name}: frames {frames.shape} and mask {mask.shape} must both be [T, {columns}]"
        )
    if not len(frames):
        raise ValueError(f"{name} is empty")
    if not mask.any(axis=1).all():
        raise ValueError(f"{name} has positions without any column; padding is added here")
    if np.any((frames < 0) | (frames >= limits)):
        raise ValueError(
            f"{name} holds an id out of range: audio codes must be in "
            f"[0, {config.audio_vocab_size}), text ids in [0, {config.text_vocab_size})"
        )
    bucket(len(frames), (), limit=config.backbone.max_seq_len)


def stack_prompts(
    prompts: Sequence[tuple[np.ndarray, np.ndarray]], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts padded on the right to `size` positions: int32 [B, T, C+1] and bool likewise."""
    columns = prompts[0][0].shape[1]
    frames_BTC = np.zeros((len(prompts), size, columns), np.int32)
    mask_BTC = np.zeros((len(prompts), size, columns), bool)
    for i, (frames, mask) in enumerate(prompts):
        frames_BTC[i, : len(frames)] = frames
        mask_BTC[i, : len(mask)] = mask
    return frames_BTC, mask_BTC


@functools.partial(jax.jit, static_argnames=("config",))
def prefill(
    params: Params,
    frames: Int[Array, "B T C1"],
    mask: Bool[Array, "B T C1"],
    shared: SharedKV | None = None,
    segment: Int[Array, "B"] | None = None,
    *,
    config: CSMConfig,
) -> Prefix:
    """Returns the keys, values and last hidden state of whole prompts, padded on the right.

    Args:
        params: Weights.
        frames: Codes and text id per position.
        mask: Which columns count; a row's length is its number of positions with any.
        shared: Segments that come before prompts; the result does not repeat them.
        segment: Each prompt's segment, -1 for none; given with `shared`.
        config: Sizes.
    """
    with jax.named_scope("prefill"):
        model = CSM.bind(config, params)
        length = mask.any(axis=-1).sum(axis=-1).astype(jnp.int32)
        return _read(model, model.backbone.embed(frames, mask), length, shared, segment)


@functools.partial(jax.jit, static_argnames=("config",))
def voice_inputs(
    params: Params,
    frames: Int[Array, "B T C1"],
    mask: Bool[Array, "B T C1"],
    vectors: Float[Array, "B T D"],
    count: Int[Array, ""],
    *,
    config: CSMConfig,
) -> Float[Array, "B T D"]:
    """Returns the backbone's inputs of a voice: trained vectors, then embedded frames.

    Args:
        params: Weights.
        frames: Codes and text id per position.
        mask: Which columns count.
        vectors: Inputs that stand for themselves, at the first `count` positions.
        count: How many of them there are.
        config: Sizes.
    """
    with jax.named_scope("voice_inputs"):
        embedded = CSM.bind(config, params).backbone.embed(frames, mask)
        trained = (jnp.arange(frames.shape[1]) < count)[None, :, None]
        return jnp.where(trained, vectors.astype(embedded.dtype), embedded)


@functools.partial(jax.jit, static_argnames=("config",))
def prefill_inputs(
    params: Params, inputs: Float[Array, "B T D"], length: Int[Array, "B"], *, config: CSMConfig
) -> Prefix:
    """Returns what `prefill` gives for positions whose inputs are known.

    Args:
        params: Weights.
        inputs: The backbone's inputs, padded on the right.
        length: Positions of each row.
        config: Sizes.
    """
    with jax.named_scope("prefill"):
        return _read(CSM.bind(config, params), inputs, length, None, None)


def _read(
    model: CSM, inputs: Array, length: Array, shared: SharedKV | None, segment: Array | None
) -> Prefix:
    y, (keys, values) = model.backbone.full(inputs, shared, segment)
    hidden = jnp.take_along_axis(y, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    return Prefix(k=keys, v=values, length=length, hidden=hidden)


def init_state(config: CSMConfig, *, batch: int, capacity: int, dtype: DTypeLike) -> DecodeState:
    """Returns `batch` empty slots of `capacity` positions."""
    rows = sharding.spec("batch")

    def zeros(dtype: DTypeLike, *shape: int) -> Array:
        spec = sharding.spec("batch", *[None] * len(shape))
        return jnp.zeros((batch, *shape), dtype, out_sharding=spec)

    def sampling() -> SamplingParams:
        # Separate arrays: a donated state may not hold one buffer twice.
        return SamplingParams(
            temperature=zeros(jnp.float32),
            top_k=zeros(jnp.int32),
            top_p=jnp.ones((batch,), jnp.float32, out_sharding=rows),
            min_p=zeros(jnp.float32),
        )

    return DecodeState(
        cache=kvcache.init(
            config.backbone, batch=batch, capacity=capacity, dtype=dtype, per_row=True
        ),
        hidden=zeros(dtype, config.backbone.embed_dim),
        frame=zeros(jnp.int32),
        status=zeros(jnp.int32),
        settings=RowSettings(
            key=zeros(jnp.uint32, 2),
            max_frames=zeros(jnp.int32),
            segment=jnp.full((batch,), -1, jnp.int32, out_sharding=rows),
            sampling=sampling(),
            decoder_sampling=sampling(),
        ),
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def insert(
    state: DecodeState, prefix: Prefix, settings: RowSettings, slot: Int[Array, "P"]
) -> DecodeState:
    """Returns the state with prompt `i` started in slot `slot[i]`.

    A slot is overwritten whole, zeros beyond the prompt: what its last user left there (a NaN times a
    masked zero is a NaN) must not reach the next. A prompt longer than the capacity ends at once in
    `Status.ERROR`.

    Args:
        state: Donated.
        prefix: P prompts.
        settings: What the P requests ask for.
        slot: Where each goes; no slot twice. A prompt with a slot beyond the batch goes nowhere.
    """
    count = prefix.hidden.shape[0]
    rest = state.cache.capacity - prefix.k[0].shape[2]

    def put(into: Array, rows: Array) -> Array:
        spec = jax.typeof(into).sharding if sharding.explicit_mesh() else None
        return into.at[slot].set(rows.astype(into.dtype), mode="drop", out_sharding=spec)

    def put_cache(into: Array, rows: Array) -> Array:
        # A prompt is padded to a bucket, which may exceed the capacity; its length does not.
        rows = rows[:, :, : state.cache.capacity]
        return put(into, jnp.pad(rows, ((0, 0), (0, 0), (0, max(rest, 0)), (0, 0))))

    return DecodeState(
        cache=KVCache(
            k=tuple(put_cache(a, b) for a, b in zip(state.cache.k, prefix.k, strict=True)),
            v=tuple(put_cache(a, b) for a, b in zip(state.cache.v, prefix.v, strict=True)),
            length=put(state.cache.length, prefix.length),
        ),
        hidden=put(state.hidden, prefix.hidden),
        frame=put(state.frame, jnp.zeros((count,), jnp.int32)),
        status=put(
            state.status,
            jnp.select(
                [prefix.length > state.cache.capacity, settings.max_frames > 0],
                [Status.ERROR, Status.RUNNING],
                Status.LENGTH,
            ).astype(jnp.int32),
        ),
        settings=jax.tree.map(put, state.settings, settings),
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def free(state: DecodeState, rows: Bool[Array, "B"]) -> DecodeState:
    """Returns the state with these rows' slots empty: they are no longer stepped; `insert` clears them.

    Args:
        state: Donated.
        rows: Which.
    """
    return dataclasses.replace(state, status=jnp.where(rows, Status.EMPTY, state.status))


@functools.partial(jax.jit, donate_argnames=("shared",))
def share(shared: SharedKV, prefix: Prefix, segment: Int[Array, ""]) -> SharedKV:
    """Returns the segments with one prompt put in place of segment `segment`, which is overwritten whole.

    Args:
        shared: Donated.
        prefix: One prompt, no longer than the segments.
        segment: Where it goes.
    """
    capacity = shared.k[0].shape[2]

    def put(into: Array, row: Array) -> Array:
        row = row[:, :, :capacity]
        row = jnp.pad(row, ((0, 0), (0, 0), (0, capacity - row.shape[2]), (0, 0)))
        # What stands beyond the prompt is padding's own, and no use to anybody.
        row = jnp.where((jnp.arange(capacity) < prefix.length[0])[:, None], row, 0)
        spec = jax.typeof(into).sharding if sharding.explicit_mesh() else None
        return into.at[segment].set(row[0].astype(into.dtype), out_sharding=spec)

    return SharedKV(
        k=tuple(put(a, b) for a, b in zip(shared.k, prefix.k, strict=True)),
        v=tuple(put(a, b) for a, b in zip(shared.v, prefix.v, strict=True)),
        length=shared.length.at[segment].set(prefix.length[0]),
    )


@functools.partial(
    jax.jit, static_argnames=("config", "num_frames", "window", "ranks"), donate_argnames=("state",)
)
def generate_frames(
    params: Params,
    state: DecodeState,
    shared: SharedKV | None = None,
    *,
    config: CSMConfig,
    num_frames: int,
    window: int,
    ranks: int,
) -> tuple[DecodeState, Int[Array, "B n C"], Bool[Array, "B n"]]:
    """Returns the state after `num_frames` more frames, their codes, and which of them count.

    Args:
        params: Weights.
        state: Donated.
        shared: The segments that rows' settings name; None where no row has one.
        config: Sizes.
        num_frames: Frames to make; any split of a number of frames gives the same codes.
        window: Cache positions to read; at least the longest running row plus `num_frames`. A
            row that reaches it ends in `Status.ERROR`.
        ranks: Scores sorted per draw; at least `csm_jax.sampling.ranks_needed` of the rows.

    Returns:
        `(state, codes, valid)`; codes are 0 where `valid` is false (row ended or slot empty).
    """
    model = CSM.bind(config, params)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Array, Array]]:
        keys = frame_keys(state.settings.key, state.frame)
        codes, finite = sample_frame(
            model,
            state.hidden,
            keys,
            state.settings.sampling,
            state.settings.decoder_sampling,
            ranks=ranks,
        )
        running = state.status == Status.RUNNING
        ended = running & ~(codes != 0).any(axis=-1)
        # A row that outgrows the window would not see what it writes: it must not go on unnoticed.
        failed = running & ~(finite & (state.cache.length < window))
        valid = running & ~ended & ~failed
        codes = jnp.where(valid[:, None], codes, 0)
        with jax.named_scope("backbone"):
            x = model.backbone.embed_audio(codes)
            y, cache = model.backbone.step(
                x,
                state.cache,
                window=window,
                shared=shared,
                segment=jnp.asarray(state.settings.segment),
            )
        frame = state.frame + valid
        status = jnp.where(
            valid & (frame >= state.settings.max_frames), Status.LENGTH, state.status
        )
        status = jnp.where(ended, Status.EOS, status)
        status = jnp.where(failed, Status.ERROR, status)
        state = DecodeState(
            cache=kvcache.advance(cache, valid.astype(jnp.int32)),
            hidden=jnp.where(valid[:, None], y[:, 0], state.hidden),
            frame=frame,
            status=status.astype(jnp.int32),
            settings=state.settings,
        )
        return state, (codes, valid)

    state, (codes, valid) = jax.lax.scan(step, state, length=num_frames)
    return state, jnp.swapaxes(codes, 0, 1), jnp.swapaxes(valid, 0, 1)
