"""Mimi's parameter tree: the shape of every leaf, and random values to start from.

Nested dicts with strings as keys, numbered ones too. Matrices have the output axis first and the
input axis last (`[out, in]`); convolutions are `[out, kernel, in]`, transposed ones
`[kernel, out, in]`. RoPE rotates the two halves of a head. A codebook is kept as it is published,
as a running sum of vectors and their count; its vectors are `embedding_sum / cluster_usage`.

  encoder              conv_in, stages.{i} (residual.{j}, down), conv_out
  encoder_transformer  layers.{i}: attn_norm, attn, attn_scale, mlp_norm, mlp, mlp_scale
  downsample           weight
  quantizer            semantic, acoustic: input_proj, output_proj, codebooks.{i}
  upsample             weight [kernel, D]: each channel by itself
  decoder_transformer  as the encoder's
  decoder              conv_in, stages.{i} (up, residual.{j}), conv_out
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.mimi.config import MimiConfig

LAYER_SCALE = 0.5
"""Layer scales of random parameters. Training starts at 0.01, which would hide the transformers."""


class _Leaf(NamedTuple):
    """A parameter's path and shape, and the mean and deviation of its random values."""

    path: str
    shape: tuple[int, ...]
    mean: float
    deviation: float


def param_shapes(config: MimiConfig) -> dict[str, Any]:
    """Returns the parameter tree with a float32 `jax.ShapeDtypeStruct` as every leaf."""
    return _nest(
        {leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in _leaves(config)}
    )


def init_params(config: MimiConfig, key: jax.Array) -> dict[str, Any]:
    """Returns random float32 parameters that keep activations near 1 through the whole codec.

    Args:
        config: The sizes.
        key: A typed or raw PRNG key.
    """
    leaves = list(_leaves(config))
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    # One draw, cut on the host: a draw per shape would compile each for longer than it runs.
    draws = np.split(np.asarray(jax.random.normal(key, (sum(sizes),))), np.cumsum(sizes[:-1]))
    return _nest(
        {
            leaf.path: jnp.asarray(leaf.mean + leaf.deviation * draw.reshape(leaf.shape))
            for leaf, draw in zip(leaves, draws, strict=True)
        }
    )


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _leaves(config: MimiConfig) -> Iterator[_Leaf]:
    """Yields every parameter once."""
    width, channels = config.embed_dim, config.num_filters
    yield from _conv("encoder.conv_in", channels, config.kernel_size, 1, gain=1.0)
    for i, ratio in enumerate(reversed(config.ratios)):
        stage = f"encoder.stages.{i}"
        yield from _residual(f"{stage}.residual", channels, config)
        yield from _conv(f"{stage}.down", 2 * channels, 2 * ratio, channels, gain=_ELU_GAIN)
        channels *= 2
    yield from _conv("encoder.conv_out", width, config.last_kernel_size, channels, gain=_ELU_GAIN)
    yield from _transformer("encoder_transformer", config)
    kernel = 2 * config.resample_stride
    yield _matrix("downsample.weight", (width, kernel, width), fan_in=kernel * width, gain=1.0)
    yield from _quantizer("quantizer.semantic", config.num_semantic_codebooks, config)
    yield from _quantizer("quantizer.acoustic", config.num_acoustic_codebooks, config)
    # Each output of a transposed convolution with kernel 2 * stride sees two inputs.
    yield _matrix("upsample.weight", (kernel, width), fan_in=2, gain=1.0)
    yield from _transformer("decoder_transformer", config)
    yield from _conv("decoder.conv_in", channels, config.kernel_size, width, gain=1.0)
    for i, ratio in enumerate(config.ratios):
        stage, half = f"decoder.stages.{i}", channels // 2
        yield _matrix(
            f"{stage}.up.weight", (2 * ratio, half, channels), fan_in=2 * channels, gain=_ELU_GAIN
        )
        yield _Leaf(f"{stage}.up.bias", (half,), 0.0, _BIAS)
        yield from _residual(f"{stage}.residual", half, config)
        channels = half
    yield from _conv("decoder.conv_out", 1, config.last_kernel_size, channels, gain=_AUDIO_GAIN)


# Deviations that keep the variance of a unit normal near 1 through ELU (E[elu(x)^2] is 0.645).
_ELU_GAIN = 0.645**-0.5
_BRANCH_GAIN = 0.5  # a residual branch adds a quarter of the variance
_AUDIO_GAIN = 0.2  # audio well inside [-1, 1]
# Scales differ from channel to channel and from each other, so that no mix-up goes unnoticed.
_BIAS = 0.1
_SCALE_SPREAD = 0.1


def _matrix(path: str, shape: tuple[int, ...], *, fan_in: int, gain: float) -> _Leaf:
    return _Leaf(path, shape, 0.0, gain / math.sqrt(fan_in))


def _conv(path: str, out: int, kernel: int, into: int, *, gain: float) -> Iterator[_Leaf]:
    yield _matrix(f"{path}.weight", (out, kernel, into), fan_in=kernel * into, gain=gain)
    yield _Leaf(f"{path}.bias", (out,), 0.0, _BIAS)


def _residual(path: str, channels: int, config: MimiConfig) -> Iterator[_Leaf]:
    inside, kernel = channels // config.compress, config.residual_kernel_size
    for j in range(config.num_residual_layers):
        yield from _conv(f"{path}.{j}.conv1", inside, kernel, channels, gain=_ELU_GAIN)
        yield from _conv(f"{path}.{j}.conv2", channels, 1, inside, gain=_BRANCH_GAIN)


def _transformer(path: str, config: MimiConfig) -> Iterator[_Leaf]:
    width, inside = config.embed_dim, config.intermediate_dim
    for i in range(config.num_layers):
        layer = f"{path}.layers.{i}"
        yield from _norm(f"{layer}.attn_norm", width)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield _matrix(f"{layer}.attn.{name}", (width, width), fan_in=width, gain=1.0)
        yield _Leaf(f"{layer}.attn_scale", (width,), LAYER_SCALE, _SCALE_SPREAD)
        yield from _norm(f"{layer}.mlp_norm", width)
        yield _matrix(f"{layer}.mlp.w_up", (inside, width), fan_in=width, gain=1.0)
        yield _matrix(f"{layer}.mlp.w_down", (width, inside), fan_in=inside, gain=1.0)
        yield _Leaf(f"{layer}.mlp_scale", (width,), LAYER_SCALE, _SCALE_SPREAD)


def _norm(path: str, width: int) -> Iterator[_Leaf]:
    yield _Leaf(f"{path}.scale", (width,), 1.0, _SCALE_SPREAD)
    yield _Leaf(f"{path}.bias", (width,), 0.0, _BIAS)


def _quantizer(path: str, num_codebooks: int, config: MimiConfig) -> Iterator[_Leaf]:
    width, dim, size = config.embed_dim, config.codebook_dim, config.codebook_size
    yield _matrix(f"{path}.input_proj", (dim, width), fan_in=width, gain=1.0)
    yield _matrix(f"{path}.output_proj", (width, dim), fan_in=dim, gain=1.0)
    for i in range(num_codebooks):
        codebook = f"{path}.codebooks.{i}"
        yield _Leaf(f"{codebook}.embedding_sum", (size, dim), 0.0, _codebook_deviation(i, config))
        yield _Leaf(f"{codebook}.cluster_usage", (size,), 1.0, 0.1)
        yield _Leaf(f"{codebook}.initialized", (1,), 1.0, 0.0)


def _codebook_deviation(number: int, config: MimiConfig) -> float:
    # The best of V random directions in E dimensions covers about 2 ln V / E of a vector's square:
    # vectors of that length make the residual of the next codebook smaller, never larger. The floor
    # keeps the last codebooks above the rounding of the first.
    covered = min(2 * math.log(config.codebook_size) / config.codebook_dim, 0.5)
    return max(math.sqrt(covered * (1 - covered) ** number), 0.05)
