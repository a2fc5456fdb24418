"""SEANet: the convolutional encoder (audio to 25 features a second) and decoder (and back), in pieces.

    encoder   conv_in, then per stage: residual blocks, ELU, strided convolution (twice the channels);
              ELU, conv_out
    decoder   conv_in, then per stage: ELU, transposed convolution (half the channels), residual blocks;
              ELU, conv_out

A residual block is x + conv2(elu(conv1(elu(x)))), with half the channels between. The stages' strides
are `config.ratios`, in reverse for the encoder. Source: moshi `seanet.py`.
"""

from __future__ import annotations

from csm_jax.array_typing import Array, Float, Int, Params
from csm_jax.mimi.config import MimiConfig
from csm_jax.mimi.conv import convolve, elu, spread


def encode(
    params: Params,
    x: Float[Array, "B W 1"],
    state: Params,
    counts: Int[Array, "B"],
    *,
    config: MimiConfig,
) -> tuple[Float[Array, "B T D"], Params]:
    """Returns the features of the next samples, and the new state.

    Args:
        params: Weights of the encoder.
        x: Samples, a multiple of the strides' product.
        state: What the samples before left.
        counts: Samples that each row has, multiples of the strides' product.
        config: Sizes.
    """
    new: Params = {"stages": {}}
    x, new["conv_in"] = _conv(params["conv_in"], x, state["conv_in"], counts)
    for i, ratio in enumerate(reversed(config.ratios)):
        stage, before = params["stages"][str(i)], state["stages"][str(i)]
        after: Params = {}
        x, after["residual"] = _residuals(
            stage["residual"], x, before["residual"], counts, config=config
        )
        x, after["down"] = _conv(stage["down"], elu(x), before["down"], counts, stride=ratio)
        counts = counts // ratio
        new["stages"][str(i)] = after
    x, new["conv_out"] = _conv(params["conv_out"], elu(x), state["conv_out"], counts)
    return x, new


def decode(
    params: Params,
    x: Float[Array, "B T D"],
    state: Params,
    counts: Int[Array, "B"],
    *,
    config: MimiConfig,
) -> tuple[Float[Array, "B W 1"], Params]:
    """Returns the samples of the next features, and the new state.

    Args:
        params: Weights of the decoder, the transposed convolutions' as `conv.two_taps` gives them.
        x: Features.
        state: What the features before left.
        counts: Features that each row has.
        config: Sizes.
    """
    new: Params = {"stages": {}}
    x, new["conv_in"] = _conv(params["conv_in"], x, state["conv_in"], counts)
    for i, ratio in enumerate(config.ratios):
        stage, before = params["stages"][str(i)], state["stages"][str(i)]
        after: Params = {}
        x, after["up"] = spread(
            elu(x), before["up"], counts, weight=stage["up"]["weight"], bias=stage["up"]["bias"]
        )
        counts = counts * ratio
        x, after["residual"] = _residuals(
            stage["residual"], x, before["residual"], counts, config=config
        )
        new["stages"][str(i)] = after
    x, new["conv_out"] = _conv(params["conv_out"], elu(x), state["conv_out"], counts)
    return x, new


def _residuals(
    params: Params, x: Array, state: Params, counts: Array, *, config: MimiConfig
) -> tuple[Array, Params]:
    new: Params = {}
    for j in range(config.num_residual_layers):
        block, before = params[str(j)], state[str(j)]
        after: Params = {}
        hidden, after["conv1"] = _conv(
            block["conv1"], elu(x), before["conv1"], counts, dilation=config.dilation_growth**j
        )
        hidden, after["conv2"] = _conv(block["conv2"], elu(hidden), before["conv2"], counts)
        x = x + hidden
        new[str(j)] = after
    return x, new


def _conv(
    params: Params, x: Array, tail: Array, counts: Array, *, stride: int = 1, dilation: int = 1
) -> tuple[Array, Array]:
    return convolve(
        x,
        tail,
        counts,
        weight=params["weight"],
        bias=params["bias"],
        stride=stride,
        dilation=dilation,
    )
