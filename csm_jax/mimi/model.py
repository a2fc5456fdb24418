"""Mimi: 24 kHz audio to and from frames of codes, in pieces, with the past as an explicit state.

    encode   SEANet encoder -> transformer -> downsample by 2 -> quantizer      1,920 samples -> 32 codes
    decode   quantizer -> upsample by 2 -> transformer -> SEANet decoder        32 codes -> 1,920 samples

`encode_frames` and `decode_frames` are jitted functions of a state with one row per batch slot. Each
row goes forward by its own number of frames, so rows start, pause and stop at different times; `reset`
gives a slot to a new utterance. Any cutting of an utterance into pieces gives the same result. States
are donated: a state that was passed in must not be used again.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Bool, DTypeLike, Float, Int, Params
from csm_jax.mimi import conv, quantizer, seanet
from csm_jax.mimi.config import MimiConfig
from csm_jax.mimi.transformer import transform

State = Params
"""Nested dicts of arrays [B, ...]: the convolutions' past, the transformer's rings and `length`, the
positions (25 per second) each row has been through, int32 [B]."""


def prepare(params: Params, *, num_codebooks: int, config: MimiConfig) -> Params:
    """Returns a checkpoint's parameters as `encode_frames` and `decode_frames` take them, in float32.

    bfloat16 would leave 38 dB between the decoded audio and the reference's; float32 leaves 112.

    Args:
        params: The tree of `csm_jax.mimi.params.param_shapes(config)`.
        num_codebooks: Codes per frame to use.
        config: Sizes.

    Raises:
        ValueError: `num_codebooks` is not between 1 and the checkpoint's.
    """
    if not 1 <= num_codebooks <= config.num_codebooks:
        raise ValueError(
            f"num_codebooks={num_codebooks}, but this Mimi has {config.num_codebooks} codebooks"
        )
    tree = {name: part for name, part in params.items() if name != "quantizer"}
    tree["quantizer"] = quantizer.prepare(
        params["quantizer"], num_codebooks=num_codebooks, config=config
    )
    stages = {
        i: stage
        | {"up": stage["up"] | {"weight": conv.two_taps(jnp.asarray(stage["up"]["weight"]))}}
        for i, stage in params["decoder"]["stages"].items()
    }
    tree["decoder"] = params["decoder"] | {"stages": stages}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def init_decode_state(config: MimiConfig, *, batch: int) -> State:
    """Returns the state of `batch` rows at the start of an utterance, for `decode_frames`.

    On a mesh the rows are split over its data axis where they divide evenly; split what goes with
    them likewise (`csm_jax.sharding.split_batch`).
    """
    zeros = functools.partial(_zeros, batch, jnp.float32)
    channels = _channels(config)[::-1]
    stages = {
        str(i): {
            "up": zeros(1, before),
            "residual": _residual_state(zeros, after, config),
        }
        for i, (before, after) in enumerate(itertools.pairwise(channels))
    }
    return {
        "length": _zeros(batch, jnp.int32),
        "upsample": zeros(1, config.embed_dim),
        "transformer": _rings(zeros, config),
        "seanet": {
            "conv_in": zeros(config.kernel_size - 1, config.embed_dim),
            "stages": stages,
            "conv_out": zeros(config.last_kernel_size - 1, channels[-1]),
        },
    }


def init_encode_state(config: MimiConfig, *, batch: int) -> State:
    """Returns the state of `batch` rows at the start of an utterance, for `encode_frames`.

    On a mesh as `init_decode_state`.
    """
    zeros = functools.partial(_zeros, batch, jnp.float32)
    channels = _channels(config)
    stages = {
        str(i): {
            "residual": _residual_state(zeros, before, config),
            "down": zeros(ratio, before),
        }
        for i, (ratio, before) in enumerate(
            zip(reversed(config.ratios), channels[:-1], strict=True)
        )
    }
    return {
        "length": _zeros(batch, jnp.int32),
        "seanet": {
            "conv_in": zeros(config.kernel_size - 1, 1),
            "stages": stages,
            "conv_out": zeros(config.last_kernel_size - 1, channels[-1]),
        },
        "transformer": _rings(zeros, config),
        "downsample": zeros(config.resample_stride, config.embed_dim),
    }


def reset(state: State, rows: Bool[Array, "B"]) -> State:
    """Returns the state with these rows at the start of an utterance; nothing of theirs stays.

    Whatever a row held is replaced, not multiplied: also NaN leaves no trace.
    """

    def clear(leaf: Array) -> Array:
        chosen = rows.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(chosen, jnp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(clear, state)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
@jax.named_scope("mimi_decode")
def decode_frames(
    params: Params,
    state: State,
    codes: Int[Array, "B n C"],
    counts: Int[Array, "B"],
    *,
    config: MimiConfig,
) -> tuple[Float[Array, "B W"], State]:
    """Returns the audio of the next frames (float [B, n · samples per frame]), and the new state.

    Args:
        params: What `prepare` returned.
        state: What the frames before left.
        codes: In range, 0..codebook_size-1.
        counts: Frames that each row has; its audio and codes beyond them mean nothing.
        config: Sizes.
    """
    new: State = {}
    stride = config.resample_stride
    x = quantizer.decode(params["quantizer"], codes)
    x, new["upsample"] = conv.spread_channels(
        x, state["upsample"], counts, weight=params["upsample"]["weight"]
    )
    x, new["transformer"] = transform(
        params["decoder_transformer"],
        x,
        state["transformer"],
        state["length"],
        counts * stride,
        config=config,
    )
    x, new["seanet"] = seanet.decode(
        params["decoder"], x, state["seanet"], counts * stride, config=config
    )
    new["length"] = state["length"] + counts * stride
    return x[..., 0].astype(jnp.float32), new


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
@jax.named_scope("mimi_encode")
def encode_frames(
    params: Params,
    state: State,
    audio: Float[Array, "B W"],
    counts: Int[Array, "B"],
    *,
    config: MimiConfig,
) -> tuple[Int[Array, "B n C"], State]:
    """Returns the codes of the next frames of audio (W = n · samples per frame), and the new state.

    Args:
        params: What `prepare` returned.
        state: What the frames before left.
        audio: Around -1..1.
        counts: Frames that each row has; its codes beyond them mean nothing.
        config: Sizes.
    """
    features, state = encode_features(params, state, audio, counts, config=config)
    return quantizer.encode(params["quantizer"], features), state


def encode_features(
    params: Params,
    state: State,
    audio: Float[Array, "B W"],
    counts: Int[Array, "B"],
    *,
    config: MimiConfig,
) -> tuple[Float[Array, "B n D"], State]:
    """Returns what `encode_frames` quantises, and the new state."""
    new: State = {}
    x = audio[..., None].astype(params["downsample"]["weight"].dtype)
    x, new["seanet"] = seanet.encode(
        params["encoder"], x, state["seanet"], counts * config.samples_per_frame, config=config
    )
    positions = counts * config.resample_stride
    x, new["transformer"] = transform(
        params["encoder_transformer"],
        x,
        state["transformer"],
        state["length"],
        positions,
        config=config,
    )
    # Before the first features the downsampling sees that first one again and not silence (moshi
    # `ConvDownsample1d`, pad_mode "replicate").
    first = (state["length"] == 0)[:, None, None]
    x, new["downsample"] = conv.convolve(
        x,
        jnp.where(first, x[:, :1], state["downsample"]),
        positions,
        weight=params["downsample"]["weight"],
        bias=None,
        stride=config.resample_stride,
        dilation=1,
    )
    new["length"] = state["length"] + positions
    return x, new


def _zeros(batch: int, dtype: DTypeLike, *shape: int) -> Array:
    return sharding.split_batch(jnp.zeros((batch, *shape), dtype))


def _channels(config: MimiConfig) -> list[int]:
    # Of the encoder, from the waveform's end to the features'; the decoder's are these in reverse.
    return [config.num_filters * 2**i for i in range(len(config.ratios) + 1)]


def _residual_state(zeros: Any, channels: int, config: MimiConfig) -> State:
    span = config.residual_kernel_size - 1
    return {
        str(j): {
            "conv1": zeros(span * config.dilation_growth**j, channels),
            "conv2": zeros(0, channels // config.compress),
        }
        for j in range(config.num_residual_layers)
    }


def _rings(zeros: Any, config: MimiConfig) -> State:
    shape = (config.num_heads, config.context, config.embed_dim // config.num_heads)
    return {
        "layers": {
            str(i): {"k": zeros(*shape), "v": zeros(*shape)} for i in range(config.num_layers)
        }
    }
