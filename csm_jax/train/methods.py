"""What is trained: all weights, low-rank adapters beside them, or a prefix before every conversation.

Each method divides a model into a trainable tree, float32 between steps, and a frozen one, and says how
the two make the weights that a step computes with.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, DTypeLike, Float, Key, Params, PyTree
from csm_jax.config import CSMConfig
from csm_jax.linear import StandIn
from csm_jax.model import param_axes, param_shardings
from csm_jax.train.lora import LoraConfig, apply_lora, init_lora, lora_axes, lora_shardings
from csm_jax.train.settings import Quantization

PREFIX_INIT_SCALE = 0.02
"""Standard deviation of what the prefix's rows differ by at first, beside the mean embedding."""


@dataclass(frozen=True)
class Full:
    """All weights."""

    name = "full"
    prefix_positions = 0


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters; the weights stay, or stand rounded to fewer bits.

    Attributes:
        lora: The adapters.
        quantize: How the weights below them are kept, a name of `csm_jax.train.settings.Quantization`; None as they are.
    """

    lora: LoraConfig
    quantize: Quantization | None = None
    name = "lora"
    prefix_positions = 0


@dataclass(frozen=True)
class Prefix:
    """Input vectors of the backbone that come first; the weights stay."""

    prefix_positions: int
    name = "prefix"

    def __post_init__(self) -> None:
        if self.prefix_positions < 1:
            raise ValueError(f"a prefix needs at least 1 position, got {self.prefix_positions}")


Method = Full | Lora | Prefix


def divide(
    method: Method,
    params: Params,
    *,
    config: CSMConfig,
    key: Key[Array, ""],
    dtype: DTypeLike,
) -> tuple[PyTree, Params]:
    """Returns `(trainable, frozen)` of a model that is about to be trained.

    Args:
        method: What is trained.
        params: The weights; float32 for `Full`.
        config: Sizes.
        key: For what starts random.
        dtype: Of the frozen weights.

    Raises:
        ImportError: Weights are to be quantised, for which qwix is not installed.
        ValueError: All weights are to be trained and are not float32, or some cannot be quantised.
    """
    if isinstance(method, Full):
        check_masters(params)
        return params, {}
    frozen = jax.tree.map(lambda x: x.astype(dtype), params)
    if isinstance(method, Lora):
        if method.quantize is not None:
            from csm_jax.train.quantize import quantise

            frozen = quantise(frozen, method.quantize)
        return init_lora(config, method.lora, key), frozen
    return {"vectors": _first_prefix(method, params, config=config, key=key)}, frozen


def check_masters(params: Params) -> None:
    """Checks that weights which are to be trained are float32.

    Raises:
        ValueError: They are not.
    """
    kinds = {jnp.dtype(x.dtype).name for x in jax.tree.leaves(params)}
    if kinds - {"float32"}:
        raise ValueError(
            f"the weights to be trained are {', '.join(sorted(kinds))}, but must be float32: a step of "
            "Adam at learning rate 5e-6 would leave 92 % of bfloat16 weights exactly as they were. "
            "Load them with dtype='float32' (computing in bfloat16 is a setting of its own), or train "
            "adapters (LoRA)"
        )


def _first_prefix(
    method: Prefix, params: Params, *, config: CSMConfig, key: Key[Array, ""]
) -> Float[Array, "P D"]:
    # The mean input of an audio frame, which is a sum of one embedding per codebook.
    table = params["backbone"]["audio_embeddings"].astype(jnp.float32)
    mean = table.reshape(config.num_codebooks, config.audio_vocab_size, -1).mean(axis=1).sum(axis=0)
    shape = (method.prefix_positions, config.backbone.embed_dim)
    return mean[None] + PREFIX_INIT_SCALE * jax.random.normal(key, shape, jnp.float32)


def compute_copy(
    trainable: PyTree, method: Method, *, config: CSMConfig, dtype: DTypeLike
) -> PyTree:
    """Returns the trainable tree as a step computes with it: in `dtype`, and whole over `fsdp`.

    Linear: its transpose brings a gradient back to the slices, in float32.
    """
    if isinstance(method, Prefix):
        return trainable
    axes = lora_axes(config, method.lora) if isinstance(method, Lora) else param_axes(config)
    return _used(jax.tree.map(lambda x: x.astype(dtype), trainable), axes)


def assemble(
    copy: PyTree, frozen: Params, method: Method, *, config: CSMConfig
) -> tuple[Params, Float[Array, "P D"] | None]:
    """Returns `(params, prefix)` for `csm_jax.train.loss.loss_sums`.

    Args:
        copy: Of `compute_copy`.
        frozen: Of `divide`.
        method: What is trained.
        config: Sizes.
    """
    if isinstance(method, Full):
        return copy, None
    params = _used(frozen, param_axes(config))
    if isinstance(method, Lora):
        return apply_lora(params, copy, method.lora), None
    return params, copy["vectors"]


def _used(weights: Params, axes: Params) -> Params:
    def used(x: Array | StandIn, names: tuple[str | None, ...]) -> Array | StandIn:
        # What stands in for a weight is one device's.
        return x if isinstance(x, StandIn) else sharding.used_at(x, *names)

    return jax.tree.map(used, weights, axes, is_leaf=lambda x: isinstance(x, StandIn))


def trainable_shardings(method: Method, mesh: jax.sharding.Mesh, *, config: CSMConfig) -> PyTree:
    """Returns the placement of each leaf of the trainable tree on `mesh`."""
    if isinstance(method, Full):
        return param_shardings(config, mesh)
    if isinstance(method, Lora):
        return lora_shardings(config, method.lora, mesh)
    return {"vectors": sharding.named(mesh, None, None)}
