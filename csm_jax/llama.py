"""The Llama block, shared by backbone and decoder.

Per block, on the residual stream x [B, T, D]:

    x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))   with n = rms_norm(x)
    x = x + w_down(silu(w_gate(n)) * w_up(n))                                with n = rms_norm(x)

and one more rms_norm after the last block. Queries have N heads, keys and values K; query head
n = k·G + g shares key head k. RoPE rotates half-pairs (i, i + H/2), as transformers does; layouts that
store interleaved pairs are permuted where they are read (`csm_jax.weights.transforms`).

Every projection is stored `[out, in]` and contracted on its last axis by `csm_jax.linear.project`.
Norms, rotation, softmax and logits are float32 in every precision
(torchtune `RMSNorm` and `Llama3ScaledRoPE` do the same; its softmax is the fused kernel's, also float32).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from csm_jax import kvcache, sharding
from csm_jax.array_typing import Array, Bool, Float, Int
from csm_jax.closures import computed_again
from csm_jax.config import LlamaConfig
from csm_jax.kvcache import KVCache, SharedKV
from csm_jax.linear import project


def parameter(shape: tuple[int, ...], axes: tuple[str, ...], *, scale: float | None) -> nnx.Param:
    """Returns a parameter's declaration: its shape, logical axes and initial scale, no data.

    Args:
        shape: Sizes, output axis first.
        axes: A logical axis name (`csm_jax.sharding.RULES`) per size.
        scale: Standard deviation of the random initial values; None for ones.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init_scale=scale)


def linear(out_dim: int, in_dim: int, axes: tuple[str, str]) -> nnx.Param:
    """Returns the declaration of a projection `[out, in]` with fan-in scaling."""
    return parameter((out_dim, in_dim), axes, scale=in_dim**-0.5)


def embed_codes(
    table: Float[Array, "R D"],
    codes: Int[Array, "*batch"],
    codebook: int | Int[Array, ""] | Int[Array, "C"],
    vocab: int,
) -> Float[Array, "*batch D"]:
    """Returns the rows of an audio table for codes of one codebook, or of one per place of the last axis."""
    rows = codes + codebook * vocab
    return table.at[rows].get(out_sharding=sharding.follow(codes, *range(codes.ndim), None))


def rms_norm(
    x: Float[Array, "B T D"], scale: Float[Array, "D"], *, eps: float
) -> Float[Array, "B T D"]:
    """Returns `x` divided by its root mean square in float32, cast back, times `scale`."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype) * scale.astype(x.dtype)


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Returns the rotation per position of each half-pair, float32 `[H/2]`, with Llama-3 scaling.

    Wavelengths longer than `old_context_len / low_freq_factor` are slowed by `scale_factor`, those
    shorter than `old_context_len / high_freq_factor` are kept, and those between are interpolated
    (Llama 3.1; torchtune `Llama3ScaledRoPE.apply_scaling`). It matters even at 32 positions.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(config.rope_base) ** exponents
    wavelengths = 2.0 * np.pi / frequencies.astype(np.float64)
    smooth = (config.old_context_len / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    scaled = frequencies / config.scale_factor
    return ((1.0 - smooth) * scaled + smooth * frequencies).astype(np.float32)


Rotation = tuple[Float[Array, "#B T 1 1 H2"], Float[Array, "#B T 1 1 H2"]]
"""Cosine and sine of `position · frequency_i`, float32."""


def rotation(positions: Int[Array, "#B T"], config: LlamaConfig) -> Rotation:
    """Returns what `rope` turns by at positions below `max_seq_len`.

    Looked up: XLA would put cosine and sine into the product behind them and compute them for every
    head again, ten times as dear as the rotation itself on a CPU.

    Raises:
        ValueError: There are more positions than that.
    """
    if positions.shape[1] > config.max_seq_len:
        raise ValueError(
            f"{positions.shape[1]:,} positions exceed max_seq_len={config.max_seq_len:,}"
        )
    angles = np.arange(config.max_seq_len, dtype=np.float32)[:, None] * rope_frequencies(config)
    spec = sharding.follow(positions, 0, 1, None)

    def look_up(table: np.ndarray) -> Array:
        return jnp.asarray(table).at[positions].get(out_sharding=spec)[:, :, None, None]

    return look_up(np.cos(angles)), look_up(np.sin(angles))


def rope(x: Float[Array, "B T K G H"], turn: Rotation) -> Float[Array, "B T K G H"]:
    """Returns `x` with half-pair (i, i + H/2) rotated, in float32."""
    cos, sin = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B T K G H"]:
    """Returns softmax(q·k / sqrt(H)) · v over the positions where `mask` holds, softmax in float32.

    The sum is divided after the product with the values: H numbers a query, not S.
    """
    product = _product(q)
    b, t, kv_heads, groups, dim = q.shape
    if t == 1:  # each row reads keys of its own, and twice as fast in this order
        scores = product("BTKGH,BKSH->BKGTS", q, k)
        _, weights, mass = _exponentials(scores, mask[:, None, None], dim)
        heads = product("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v) / mass
        return jnp.transpose(heads, (0, 3, 1, 2, 4)).astype(v.dtype)
    # Of many queries, those of a key head go one below the other into plain products. XLA would order
    # them otherwise and take twice the time on a CPU, three times for the gradient.
    rows = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(b, kv_heads, groups * t, dim)
    scores = product("BKMH,BKSH->BKMS", rows, k).reshape(b, kv_heads, groups, t, -1)
    _, weights, mass = _exponentials(scores, mask[:, None, None], dim)
    weights = weights.astype(v.dtype).reshape(b, kv_heads, groups * t, -1)
    heads = product("BKMS,BKSH->BKMH", weights, v).reshape(b, kv_heads, groups, t, dim) / mass
    return jnp.transpose(heads, (0, 3, 1, 2, 4)).astype(v.dtype)


def attend_shared(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
    shared_k: Float[Array, "M K Z H"],
    shared_v: Float[Array, "M K Z H"],
    shared_mask: Bool[Array, "M Z"],
    chosen: Bool[Array, "M B"],
) -> Float[Array, "B T K G H"]:
    """Returns attention over a row's own positions and those of the segment it has chosen.

    Both parts are computed apart, as sums not yet divided and their largest score, and merged by their
    log-sum-exp. In a step of one position every row is multiplied with every segment, which is then read
    once for all rows: with few segments that is cheaper than a copy of its segment for each row. Which segment a voice is in
    does not change a bit: segments are never summed over, but for one that is not zero.

    Args:
        q: Rotated queries.
        k: The rows' own keys.
        v: The rows' own values.
        mask: Which of them each step may attend to.
        shared_k: Keys of M segments of Z positions (`csm_jax.kvcache.SharedKV`).
        shared_v: Their values.
        shared_mask: Which of them are valid.
        chosen: Each row's segment, if any.
    """
    product = _product(q)
    row = chosen[:, :, None, None, None, None]

    own_best, own_weights, own_mass = _exponentials(
        product("BTKGH,BKSH->BKGTS", q, k), mask[:, None, None], q.shape[-1]
    )
    own = product("BKGTS,BKSH->BKGTH", own_weights.astype(v.dtype), v)

    # A prompt has many steps, for which multiplying with every segment would be dearer than the copy.
    copies = None
    if q.shape[1] > 1:
        place, spec = jnp.argmax(chosen, axis=0), sharding.follow(q, 0, 2, None, None)
        copies = [x.at[place].get(out_sharding=spec) for x in (shared_k, shared_v)]
    if copies is not None:
        scores = product("BTKGH,BKZH->BKGTZ", q, copies[0])
    else:
        scores = jnp.where(row, product("BTKGH,MKZH->MBKGTZ", q, shared_k), 0.0).sum(axis=0)
    valid = (chosen[:, :, None] & shared_mask[:, None]).any(axis=0)[:, None, None, None]
    best, weights, mass = _exponentials(scores, valid, q.shape[-1])
    best = jnp.where(valid.any(axis=-1, keepdims=True), best, -jnp.inf)  # no segment, no share
    weights = weights.astype(v.dtype)
    if copies is not None:
        heads = product("BKGTZ,BKZH->BKGTH", weights, copies[1])
    else:
        every = product("BKGTZ,MKZH->MBKGTH", weights, shared_v)
        heads = jnp.where(row, every, 0.0).sum(axis=0)

    most = jnp.maximum(own_best, best)
    own_share, share = jnp.exp(own_best - most), jnp.exp(best - most)
    merged = (own * own_share + heads * share) / (own_mass * own_share + mass * share)
    return jnp.transpose(merged, (0, 3, 1, 2, 4)).astype(v.dtype)


# Blocks of queries that attend at a time, and the least of one: what is kept for the gradient of all
# would be T² scores per head, and a block computes none for keys behind its end.
_QUERY_BLOCKS, _LEAST_QUERIES = 8, 128


def attend_packed(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T K G H"]:
    """Returns causal attention within each segment of packed rows.

    A block of queries at a time, with the keys up to its end; scores are computed again for the
    gradient and not kept.

    Args:
        q: Rotated queries.
        k: Rotated keys.
        v: Values.
        segments: A number per conversation of a row; the same number is one segment.
    """

    def block(q: Array, k: Array, v: Array, mine: Array, theirs: Array, start: int) -> Array:
        steps = start + jnp.arange(q.shape[1])
        causal = jnp.arange(k.shape[2])[None] <= steps[:, None]
        return attend(q, k, v, causal & (mine[:, :, None] == theirs[:, None]))

    block = jax.checkpoint(block, static_argnums=5)
    parts, size = [], max(_LEAST_QUERIES, -(-q.shape[1] // _QUERY_BLOCKS))
    for start in range(0, q.shape[1], size):
        end = min(start + size, q.shape[1])
        mine, theirs = segments[:, start:end], segments[:, :end]
        parts.append(block(q[:, start:end], k[:, :, :end], v[:, :, :end], mine, theirs, start))
    return jnp.concatenate(parts, axis=1)


def _product(q: Array) -> Callable[[str, Array, Array], Array]:
    """Returns an einsum into float32, exact for float32 operands."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    return functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)


def _exponentials(scores: Array, mask: Array, head_dim: int) -> tuple[Array, Array, Array]:
    """Returns the largest score, exp(score - largest) of all, and their sum."""
    scores = jnp.where(mask, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    # The result does not depend on it, so neither does a gradient.
    best = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - best)
    return best, weights, weights.sum(axis=-1, keepdims=True)


REMAT = ("none", "minimal", "full")
"""What is computed again for a gradient instead of kept: nothing; all but the products with weights
(MaxText's word); all but what goes from block to block."""


def rematerialise(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Returns a function with the same results whose gradient keeps less.

    Args:
        function: Of arrays; the weights may be its own.
        remat: A name of `REMAT`.

    Raises:
        ValueError: It is none.
    """
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {remat!r}")
    if remat == "none":
        return function
    if remat == "full" and jax.default_backend() == "cpu":
        return computed_again(function)
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "minimal" else None
    return jax.checkpoint(function, policy=keep)


class Attention(nnx.Module):
    """Grouped-query self-attention."""

    def __init__(self, config: LlamaConfig, *, heads_axis: str):
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.config = config
        self.q_proj = linear(queries, config.embed_dim, (heads_axis, "embed"))
        self.k_proj = linear(keys, config.embed_dim, (heads_axis, "embed"))
        self.v_proj = linear(keys, config.embed_dim, (heads_axis, "embed"))
        self.o_proj = linear(config.embed_dim, queries, ("embed", heads_axis))

    def qkv(
        self, x: Float[Array, "B T D"], turn: Rotation
    ) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Returns queries and keys, rotated as their positions say, and values."""
        c = self.config
        groups = c.num_heads // c.num_kv_heads
        q = _split_heads(project(x, self.q_proj[...]), c.num_kv_heads, groups, c.head_dim)
        k = _split_heads(project(x, self.k_proj[...]), c.num_kv_heads, 1, c.head_dim)
        v = _split_heads(project(x, self.v_proj[...]), c.num_kv_heads, 1, c.head_dim)
        q, k = rope(q, turn), rope(k, turn)
        return q, jnp.swapaxes(k[:, :, :, 0], 1, 2), jnp.swapaxes(v[:, :, :, 0], 1, 2)

    def out(self, heads: Float[Array, "B T K G H"]) -> Float[Array, "B T D"]:
        """Returns the heads joined and projected back to the residual stream."""
        b, t, k, g, h = heads.shape
        joined = jnp.reshape(heads, (b, t, k * g * h), out_sharding=sharding.follow(heads, 0, 1, 2))
        return project(joined, self.o_proj[...])


def _split_heads(x_BTI: Array, kv_heads: int, groups: int, head_dim: int) -> Array:
    b, t, _ = x_BTI.shape
    spec = sharding.follow(x_BTI, 0, 1, 2, None, None)
    return jnp.reshape(x_BTI, (b, t, kv_heads, groups, head_dim), out_sharding=spec)


class MLP(nnx.Module):
    """The SiLU-gated feed-forward layer, without biases."""

    def __init__(self, config: LlamaConfig, *, mlp_axis: str):
        self.w_gate = linear(config.intermediate_dim, config.embed_dim, (mlp_axis, "embed"))
        self.w_up = linear(config.intermediate_dim, config.embed_dim, (mlp_axis, "embed"))
        self.w_down = linear(config.embed_dim, config.intermediate_dim, ("embed", mlp_axis))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = project(x, self.w_gate[...])
        # In float32, rounded once: x and sigmoid(x) rounded apart would err more than the reference.
        gate = jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype)
        return project(gate * project(x, self.w_up[...]), self.w_down[...])


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: LlamaConfig, *, heads_axis: str, mlp_axis: str):
        self.eps = config.norm_eps
        self.attn_norm = parameter((config.embed_dim,), ("norm",), scale=None)
        self.attn = Attention(config, heads_axis=heads_axis)
        self.mlp_norm = parameter((config.embed_dim,), ("norm",), scale=None)
        self.mlp = MLP(config, mlp_axis=mlp_axis)

    def qkv(
        self, x: Float[Array, "B T D"], turn: Rotation
    ) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Returns what the normed stream attends with."""
        return self.attn.qkv(rms_norm(x, self.attn_norm[...], eps=self.eps), turn)

    def rest(
        self, x: Float[Array, "B T D"], heads: Float[Array, "B T K G H"]
    ) -> Float[Array, "B T D"]:
        """Returns the block's output, given what attention returned."""
        x = x + self.attn.out(heads)
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], eps=self.eps))


class Stack(nnx.Module):
    """The blocks and the final norm, unrolled: scanning over layers would copy weights and cache."""

    def __init__(self, config: LlamaConfig, *, heads_axis: str, mlp_axis: str):
        self.config = config
        self.layers = nnx.Dict(
            {
                str(i): Block(config, heads_axis=heads_axis, mlp_axis=mlp_axis)
                for i in range(config.num_layers)
            }
        )
        self.final_norm = parameter((config.embed_dim,), ("norm",), scale=None)

    def blocks(self) -> list[Block]:
        """Returns the blocks in order."""
        return [self.layers[str(i)] for i in range(self.config.num_layers)]

    def full(
        self,
        x: Float[Array, "B T D"],
        shared: SharedKV | None = None,
        segment: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[tuple[Array, ...], tuple[Array, ...]]]:
        """Returns the normed outputs of whole rows, and every layer's keys and values.

        Causal, positions 0..T-1, or those after the segment. Rows are padded on the right, so padding
        is never attended to by a real position.

        Args:
            x: Inputs.
            shared: Segments that come before rows.
            segment: Each row's segment, -1 for none; given with `shared`.

        Returns:
            The outputs `[B, T, D]`, and (keys, values), each a tuple of `[B, K, T, H]` per layer.
        """
        steps = jnp.arange(x.shape[1])
        causal = (steps[None, :] <= steps[:, None])[None]
        positions, attention = _after(shared, segment, steps[None])
        turn = rotation(positions, self.config)
        keys, values = [], []
        for i, block in enumerate(self.blocks()):
            q, k, v = block.qkv(x, turn)
            x = block.rest(x, attention(i, q, k, v, causal))
            keys.append(k)
            values.append(v)
        y = rms_norm(x, self.final_norm[...], eps=self.config.norm_eps)
        return y, (tuple(keys), tuple(values))

    def packed(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        *,
        remat: str,
    ) -> Float[Array, "B T D"]:
        """Returns the normed outputs of rows with several segments each, for training.

        Args:
            x: Inputs.
            positions: From 0 within each segment.
            segments: A number per conversation of a row; none attends to another.
            remat: What a gradient computes again, a name of `REMAT`.
        """
        turn = rotation(positions, self.config)

        def through(block: Block, x: Array) -> Array:
            q, k, v = block.qkv(x, turn)
            return block.rest(x, attend_packed(q, k, v, segments))

        for block in self.blocks():
            x = rematerialise(functools.partial(through, block), remat)(x)
        return rms_norm(x, self.final_norm[...], eps=self.config.norm_eps)

    def step(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        *,
        window: int,
        shared: SharedKV | None = None,
        segment: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Returns the normed outputs of the next `T` positions, and the cache holding them.

        The cache's length is left as it is: `kvcache.advance` says which rows moved.

        Args:
            x: Inputs at positions length..length+T-1 of each row.
            cache: Keys and values so far.
            window: Static number of leading positions to read; at least the longest row + T.
            shared: Segments that come before rows.
            segment: Each row's segment, -1 for none; given with `shared`.
        """
        positions, attention = _after(
            shared,
            segment,
            jnp.atleast_1d(cache.length)[:, None] + jnp.arange(x.shape[1])[None],
        )
        turn = rotation(positions, self.config)
        mask = kvcache.mask(cache, num_steps=x.shape[1], window=window)
        for i, block in enumerate(self.blocks()):
            q, k, v = block.qkv(x, turn)
            cache = kvcache.append(cache, i, k, v)
            heads = attention(i, q, cache.k[i][:, :, :window], cache.v[i][:, :, :window], mask)
            x = block.rest(x, heads)
        return rms_norm(x, self.final_norm[...], eps=self.config.norm_eps), cache


def _after(
    shared: SharedKV | None, segment: Array | None, positions: Array
) -> tuple[Array, Callable[[int, Array, Array, Array, Array], Array]]:
    """Returns the positions of steps that come after the rows' segments, and how layer i attends."""
    if shared is None or segment is None:
        return positions, lambda i, q, k, v, mask: attend(q, k, v, mask)
    chosen, shared_mask = shared.chosen(segment), shared.mask()

    def attention(i: int, q: Array, k: Array, v: Array, mask: Array) -> Array:
        return attend_shared(q, k, v, mask, shared.k[i], shared.v[i], shared_mask, chosen)

    return shared.offset(segment)[:, None] + positions, attention
