"""Mimi on whole utterances, for training: the streaming functions' numbers, and gradients at a CPU's speed.

    encode_features   SEANet encoder -> transformer -> downsample     audio [B, W] -> features [B, n, D]
    decode_features   upsample -> transformer -> SEANet decoder       features [B, n, D] -> audio [B, W]

Transformer and upsampling are those of `csm_jax.mimi`, from the state that an utterance begins with. The
convolutions are not: here each is one matrix product over all steps, with the S steps of a stride taken as
one of S·I channels, and with its taps side by side. XLA's convolution is slower on CPU near the waveform,
where channels are few and steps many, above all for the gradient of the kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from csm_jax.array_typing import Array, Float, Params
from csm_jax.mimi.config import MimiConfig
from csm_jax.mimi.conv import spread_channels, two_taps
from csm_jax.mimi.model import init_decode_state, init_encode_state
from csm_jax.mimi.transformer import transform


def encode_features(
    params: Params, audio: Float[Array, "B W"], *, config: MimiConfig
) -> Float[Array, "B n D"]:
    """Returns what the quantizer gets for whole utterances (`csm_jax.mimi.model.encode_features`).

    Args:
        params: The tree of `csm_jax.mimi.params.param_shapes(config)`; the quantizer is not needed.
        audio: Around -1..1, a multiple of the samples per frame.
        config: Sizes.
    """
    encoder = params["encoder"]
    x = _convolve(audio[..., None], encoder["conv_in"])
    for i, ratio in enumerate(reversed(config.ratios)):
        stage = encoder["stages"][str(i)]
        x = _residuals(stage["residual"], x, config=config)
        x = _convolve(_elu(x), stage["down"], stride=ratio)
    x = _convolve(_elu(x), encoder["conv_out"])
    start = init_encode_state(config, batch=audio.shape[0])
    x = _transform(params["encoder_transformer"], x, start["transformer"], config=config)
    # An utterance begins as if its first feature had been there before.
    stride = config.resample_stride
    x = jnp.concatenate([jnp.repeat(x[:, :1], stride, axis=1), x], axis=1)
    return _convolve(x, params["downsample"], stride=stride)[:, 1:]


def decode_features(
    params: Params, x: Float[Array, "B n D"], *, config: MimiConfig
) -> Float[Array, "B W"]:
    """Returns the audio of whole utterances (`csm_jax.mimi.model.decode_frames` behind the quantizer).

    Args:
        params: As for `encode_features`.
        x: What the quantizer gives.
        config: Sizes.
    """
    b = x.shape[0]
    start = init_decode_state(config, batch=b)
    counts = jnp.full(b, x.shape[1], jnp.int32)
    x, _ = spread_channels(x, start["upsample"], counts, weight=params["upsample"]["weight"])
    x = _transform(params["decoder_transformer"], x, start["transformer"], config=config)
    decoder = params["decoder"]
    x = _convolve(x, decoder["conv_in"])
    for i, ratio in enumerate(config.ratios):
        stage = decoder["stages"][str(i)]
        weight, bias = stage["up"]["weight"], stage["up"]["bias"]
        up = {"weight": two_taps(weight), "bias": jnp.tile(bias, ratio)}
        x = _convolve(_elu(x), up).reshape(b, -1, bias.shape[0])
        x = _residuals(stage["residual"], x, config=config)
    return _convolve(_elu(x), decoder["conv_out"])[..., 0]


def _transform(params: Params, x: Array, rings: Params, *, config: MimiConfig) -> Array:
    b, t, _ = x.shape
    zeros = jnp.zeros(b, jnp.int32)
    return transform(params, x, rings, zeros, zeros + t, config=config)[0]


def _residuals(params: Params, x: Array, *, config: MimiConfig) -> Array:
    for j in range(config.num_residual_layers):
        block = params[str(j)]
        hidden = _convolve(_elu(x), block["conv1"], dilation=config.dilation_growth**j)
        x = x + _convolve(_elu(hidden), block["conv2"])
    return x


def _convolve(
    x: Float[Array, "B T I"], layer: Params, *, stride: int = 1, dilation: int = 1
) -> Float[Array, "B T2 O"]:
    """Returns the causal convolution; the kernel is a multiple of `stride`, and one of them is 1."""
    weight = layer["weight"]
    out, taps = weight.shape[0], weight.shape[1] // stride
    x = x.reshape(x.shape[0], -1, stride * x.shape[2])
    lags = [(taps - 1 - tap) * dilation for tap in range(taps)]
    # The shifted copies are made of whichever is narrower, what goes in or what comes out.
    if x.shape[2] < out:
        joined = jnp.concatenate([_later(x, lag) for lag in lags], axis=-1)
        y = _product(joined, weight.reshape(out, -1))
    else:
        kernel = jnp.swapaxes(weight.reshape(out, taps, -1), 0, 1)
        parts = _product(x, kernel.reshape(taps * out, -1))
        y, *others = (
            _later(part, lag)
            for part, lag in zip(jnp.split(parts, taps, axis=-1), lags, strict=True)
        )
        for other in others:
            y = y + other
    return y + layer["bias"] if "bias" in layer else y


def _product(x: Float[Array, "B T I"], matrix: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    # Rows first, and flat: of an einsum XLA makes `matrix @ x.T`, and copies to turn everything around.
    flat = x.reshape(-1, x.shape[-1])
    dimensions = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(flat, matrix, dimensions, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*x.shape[:-1], -1)


def _later(x: Array, steps: int) -> Array:
    steps = min(steps, x.shape[1])
    return jnp.pad(x[:, : x.shape[1] - steps], ((0, 0), (steps, 0), (0, 0))) if steps else x


@jax.custom_jvp
def _elu(x: Array) -> Array:
    # `conv.elu` is exact near 0 and takes four times as long; the difference is a rounding of 1.
    return jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1)


@_elu.defjvp
def _elu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _elu(*primals)
    return y, tangents[0] * jnp.where(y > 0, 1, y + 1)
