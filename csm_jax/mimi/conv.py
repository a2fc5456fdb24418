"""Causal convolutions over time, computed piece by piece: what a piece needs of its past is its state.

Signals are channels-last, [B, T, I]. Each function takes the state the previous piece left and `counts`,
how many of its T steps each row really has (the rest is padding on the right), and returns the output
and the state after exactly those steps. So a whole utterance, any cutting of it, and rows of different
lengths all go through the same code and give the same numbers; a row with a count of 0 stands still.

A convolution of kernel K and stride S pads with K - S steps of the past (moshi `StreamingConv1d`). A
transposed convolution of kernel 2S and stride S (moshi `StreamingConvTranspose1d`, which cuts the last
half window off) is computed as a convolution: output steps t·S..t·S+S-1 depend on input steps t-1 and t
alone, so they are the S·O channels of a convolution of two taps.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Float, Int
from csm_jax.linear import project


def convolve(
    x: Float[Array, "B T I"],
    tail: Float[Array, "B P I"],
    counts: Int[Array, "B"],
    *,
    weight: Float[Array, "O K I"],
    bias: Float[Array, "O"] | None,
    stride: int,
    dilation: int,
) -> tuple[Float[Array, "B T2 O"], Float[Array, "B P I"]]:
    """Returns the causal convolution of the next `T` steps (a multiple of `stride`), and the new tail.

    Args:
        x: The next steps of each row.
        tail: The P = (K-1)·dilation + 1 - stride steps before them.
        counts: Steps of `x` that each row has, multiples of `stride`.
        weight: Kernel, earliest step first.
        bias: Added to every output step.
        stride: Input steps per output step.
        dilation: Input steps between the kernel's taps.
    """
    taps = weight.shape[1]
    past = tail.shape[1]
    joined = jnp.concatenate([tail, x], axis=1)
    steps = x.shape[1] // stride
    # One product over the windows, or XLA's convolution? On CPU the product is faster while the windows
    # are fewer than the kernel's rows (25 steps, 512 -> 1024 channels: 1.6 against 3.2 ms), and slower
    # once writing them out costs more (24,000 steps, 64 -> 32: 18 against 1.9 ms).
    if x.shape[0] * steps <= weight.shape[0]:
        starts = (jnp.arange(steps) * stride)[:, None] + jnp.arange(taps) * dilation
        spec = sharding.follow(x, 0, None, None, None)
        windows = joined.at[:, starts].get(out_sharding=spec).reshape(x.shape[0], steps, -1)
        y = project(windows, weight.reshape(weight.shape[0], -1))
    else:
        y = jax.lax.conv_general_dilated(
            joined,
            weight,
            window_strides=(stride,),
            padding="VALID",
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "OWI", "NWC"),
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        )
    if bias is not None:
        y = y + bias
    return y, _take(joined, counts, past)


def two_taps(weight: Float[Array, "K O I"]) -> Float[Array, "SO 2 I"]:
    """Returns a transposed convolution's kernel (K = 2S, earliest output step first) for `spread`."""
    taps, out, into = weight.shape
    first, second = weight.reshape(2, taps // 2 * out, into)
    return jnp.stack([second, first], axis=1)


def spread(
    x: Float[Array, "B T I"],
    tail: Float[Array, "B 1 I"],
    counts: Int[Array, "B"],
    *,
    weight: Float[Array, "SO 2 I"],
    bias: Float[Array, "O"],
) -> tuple[Float[Array, "B T2 O"], Float[Array, "B 1 I"]]:
    """Returns the transposed convolution of the next `T` steps, S output steps each, and the new tail.

    Args:
        x: The next steps of each row.
        tail: The step before them.
        counts: Steps of `x` that each row has.
        weight: The kernel as `two_taps` gives it.
        bias: Added to every output step.
    """
    y, tail = convolve(x, tail, counts, weight=weight, bias=None, stride=1, dilation=1)
    return _spread_out(y, bias.shape[0]) + bias, tail


def spread_channels(
    x: Float[Array, "B T D"],
    tail: Float[Array, "B 1 D"],
    counts: Int[Array, "B"],
    *,
    weight: Float[Array, "K D"],
) -> tuple[Float[Array, "B T2 D"], Float[Array, "B 1 D"]]:
    """Returns `spread` with a kernel of its own for every channel (K = 2S) and no bias."""
    first, second = jnp.split(weight, 2)
    joined = jnp.concatenate([tail, x], axis=1)
    y = joined[:, 1:, None] * first + joined[:, :-1, None] * second
    return _spread_out(y, x.shape[-1]), _take(joined, counts, 1)


def _spread_out(y: Array, channels: int) -> Float[Array, "B T2 O"]:
    shape = (y.shape[0], math.prod(y.shape[1:]) // channels, channels)
    return jnp.reshape(y, shape, out_sharding=sharding.follow(y, 0, None, None))


def elu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x where positive, exp(x) - 1 elsewhere."""
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


def _take(x: Array, starts: Int[Array, "B"], size: int) -> Array:
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x, starts)
