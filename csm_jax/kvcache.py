"""The key/value cache: the only owner of its layout, its writes, its mask and its overflow rule.

A frozen pytree with one array per layer, `[B, K, S, H]`: key/value heads unexpanded (8, not 32, in
CSM-1B) and next to the batch, so that attention is a batched product without transposes. One array
per layer, because writing into one slice of a stacked array copies the stack. `length` counts the
valid positions: one number per row for the backbone, whose rows differ, or one number for all rows
for the decoder, whose rows are always at the same codebook.

Positions at or beyond `length` are never attended to. A row's valid positions never exceed the
capacity: `csm_jax.generate` ends a row that would. A row that has ended goes on
being stepped with its batch; its writes are clamped into its own last position, where nobody reads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Bool, DTypeLike, Float, Int, pytree
from csm_jax.config import LlamaConfig


@pytree
class KVCache:
    """Keys and values of every layer.

    Attributes:
        k: Per layer, rotated keys.
        v: Per layer, values.
        length: Valid positions, per row or for all rows.
    """

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]
    length: Int[Array, "B"] | Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Positions a row can hold."""
        return self.k[0].shape[2]


def init(
    config: LlamaConfig,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    per_row: bool,
    heads: str = "heads",
    rows: str | None = "batch",
) -> KVCache:
    """Returns an empty cache of `batch` rows and `capacity` positions.

    Args:
        config: The transformer it belongs to.
        batch: Rows.
        capacity: Positions per row.
        dtype: Of keys and values.
        per_row: Whether each row has its own length.
        heads: Logical axis name of the key/value heads.
        rows: Logical axis name of the rows; None keeps all of them on every device.

    Raises:
        ValueError: `capacity` exceeds the transformer's `max_seq_len`.
    """
    if capacity > config.max_seq_len:
        raise ValueError(f"capacity={capacity} exceeds max_seq_len={config.max_seq_len}")
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    spec = sharding.spec(rows, heads, None, None)

    def layers() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(config.num_layers))

    length = (
        jnp.zeros((batch,), jnp.int32, out_sharding=sharding.spec("batch"))
        if per_row
        else jnp.zeros((), jnp.int32)
    )
    return KVCache(k=layers(), v=layers(), length=length)


@pytree
class SharedKV:
    """Read-only beginnings of rows: what a voice prompt leaves behind, kept once for all who use it.

    M segments of one size; a segment of length 0 is empty. A row names its segment by its place, -1
    for none, and its own positions come after the segment's.

    Attributes:
        k: Per layer, rotated keys; zeros beyond a segment's length.
        v: Per layer, values likewise.
        length: Valid positions per segment.
    """

    k: tuple[Float[Array, "M K Z H"], ...]
    v: tuple[Float[Array, "M K Z H"], ...]
    length: Int[Array, "M"]

    def chosen(self, segment: Int[Array, "B"]) -> Bool[Array, "M B"]:
        """Returns which segment each row uses; a row without one uses none."""
        return jnp.arange(self.length.shape[0])[:, None] == segment[None]

    def offset(self, segment: Int[Array, "B"]) -> Int[Array, "B"]:
        """Returns how many positions come before each row's own."""
        # Not a gather: a row of -1 has no segment to look up.
        return jnp.where(self.chosen(segment), self.length[:, None], 0).sum(axis=0)

    def mask(self) -> Bool[Array, "M Z"]:
        """Returns which positions of each segment are valid: every step after them sees them all."""
        return jnp.arange(self.k[0].shape[2])[None] < self.length[:, None]


def init_shared(config: LlamaConfig, *, segments: int, capacity: int, dtype: DTypeLike) -> SharedKV:
    """Returns `segments` empty segments of `capacity` positions.

    Raises:
        ValueError: `capacity` exceeds the transformer's `max_seq_len`.
    """
    empty = init(config, batch=segments, capacity=capacity, dtype=dtype, per_row=False, rows=None)
    spec = sharding.spec(None)
    return SharedKV(
        k=empty.k, v=empty.v, length=jnp.zeros((segments,), jnp.int32, out_sharding=spec)
    )


def append(
    cache: KVCache,
    layer: int,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
) -> KVCache:
    """Returns the cache with `T` positions of one layer written at each row's length.

    The length itself is advanced once per step, by `advance`.
    """

    def write(into: Array, new: Array) -> Array:
        new = new.astype(into.dtype)
        zero = jnp.zeros((), jnp.int32)
        if cache.length.ndim == 0:
            return jax.lax.dynamic_update_slice(into, new, (zero, zero, cache.length, zero))
        return jax.vmap(
            lambda row, update, start: jax.lax.dynamic_update_slice(
                row, update, (zero, start, zero)
            )
        )(into, new, cache.length)

    keys, values = list(cache.k), list(cache.v)
    keys[layer], values[layer] = write(keys[layer], k), write(values[layer], v)
    return KVCache(k=tuple(keys), v=tuple(values), length=cache.length)


def advance(cache: KVCache, steps: Int[Array, "B"] | int) -> KVCache:
    """Returns the cache with `steps` more positions valid (per row: 0 for a row that has ended)."""
    return KVCache(k=cache.k, v=cache.v, length=cache.length + steps)


def mask(
    cache: KVCache, *, num_steps: int, window: int
) -> Bool[Array, "B T S"] | Bool[Array, "1 T S"]:
    """Returns which of the first `window` positions each new step may attend to.

    Step `t` of a row of length `n` sees positions 0..n+t: its past and itself.
    """
    last = jnp.atleast_1d(cache.length)[:, None] + jnp.arange(num_steps)[None]
    return jnp.arange(window)[None, None] <= last[:, :, None]
