"""Mimi's transformers: causal attention over a window of `context` positions, in pieces.

Per layer, on x [B, T, D] (25 positions per second):

    x = x + attn_scale * o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))
    x = x + mlp_scale * w_down(gelu(w_up(n)))          each with its own n = layer_norm(x)

A position sees itself and the `context - 1` before it. The state holds the last `context` keys and
values of each row in a ring: position p at index p mod context. No layer has biases except the norms.
Sources: moshi `StreamingTransformerLayer` and `StreamingMultiheadAttention`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from csm_jax.array_typing import Array, Float, Int, Params
from csm_jax.linear import project
from csm_jax.mimi.config import MimiConfig


def transform(
    params: Params,
    x: Float[Array, "B T D"],
    state: Params,
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    config: MimiConfig,
) -> tuple[Float[Array, "B T D"], Params]:
    """Returns the transformer's output for the next `T` positions, and the new rings.

    Args:
        params: Weights of one transformer.
        x: Inputs.
        state: Per layer, `k` and `v`, float [B, N, context, H].
        lengths: Positions each row had before.
        counts: Positions of `x` that each row has.
        config: Sizes.
    """
    rings: Params = {"layers": {}}
    for name in sorted(params["layers"], key=int):
        layer, ring = params["layers"][name], state["layers"][name]
        heads, rings["layers"][name] = _attention(
            layer["attn"],
            _layer_norm(x, layer["attn_norm"], eps=config.norm_eps),
            ring,
            lengths,
            counts,
            config=config,
        )
        x = x + layer["attn_scale"] * heads
        hidden = project(
            _layer_norm(x, layer["mlp_norm"], eps=config.norm_eps), layer["mlp"]["w_up"]
        )
        hidden = jax.nn.gelu(hidden, approximate=False)
        x = x + layer["mlp_scale"] * project(hidden, layer["mlp"]["w_down"])
    return x, rings


def _layer_norm(x: Array, params: Params, *, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * inverse).astype(x.dtype) * params["scale"] + params["bias"]


def _attention(
    params: Params,
    x: Float[Array, "B T D"],
    ring: Params,
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    config: MimiConfig,
) -> tuple[Float[Array, "B T D"], Params]:
    b, t, d = x.shape
    positions = lengths[:, None] + jnp.arange(t)

    def heads(weight: Array) -> Array:
        return jnp.swapaxes(project(x, weight).reshape(b, t, config.num_heads, -1), 1, 2)

    q = _rope(heads(params["q_proj"]), positions, base=config.rope_base)
    k = _rope(heads(params["k_proj"]), positions, base=config.rope_base)
    v = heads(params["v_proj"])

    # The ring as the previous piece left it, then this piece: writing first would overwrite keys that
    # the piece's first positions still see.
    window = config.context
    last = lengths[:, None] - 1
    stored = last - (last - jnp.arange(window)) % window
    age_stored = positions[:, :, None] - stored[:, None]
    age_new = jnp.arange(t)[:, None] - jnp.arange(t)
    seen_stored = (stored[:, None] >= 0) & (age_stored < window)
    seen_new = (age_new >= 0) & (age_new < window)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def scores(keys: Array, seen: Array) -> Array:
        products = jnp.einsum(
            "BNTH,BNSH->BNTS", q, keys, precision=precision, preferred_element_type=jnp.float32
        )
        return jnp.where(seen, products * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)

    weights = jax.nn.softmax(
        jnp.concatenate([scores(ring["k"], seen_stored[:, None]), scores(k, seen_new)], axis=-1),
        axis=-1,
    ).astype(v.dtype)

    def weighted(part: Array, values: Array) -> Array:
        return jnp.einsum("BNTS,BNSH->BTNH", part, values, precision=precision)

    joined = weighted(weights[..., :window], ring["v"]) + weighted(weights[..., window:], v)
    out = project(joined.reshape(b, t, d), params["o_proj"])

    # Of a piece longer than the ring only the last `window` positions are kept.
    steps = jnp.arange(t)
    kept = (steps < counts[:, None]) & (steps >= counts[:, None] - window)
    indices = jnp.where(kept, positions % window, window)
    return out, {"k": _write(ring["k"], k, indices), "v": _write(ring["v"], v, indices)}


def _write(ring_BNSH: Array, new_BNTH: Array, indices_BT: Array) -> Array:
    # An index beyond the ring writes nothing.
    return jax.vmap(lambda ring, new, indices: ring.at[:, indices].set(new, mode="drop"))(
        ring_BNSH, new_BNTH, indices_BT
    )


def _rope(x_BNTH: Array, positions_BT: Array, *, base: float) -> Array:
    half = x_BNTH.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT.astype(jnp.float32)[:, None, :, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BNTH.dtype)
