"""Frozen weights in 4 or 8 bits below adapters (QLoRA), through qwix.

A `Quantised` weight stands in the tree in place of each projection of the blocks and multiplies as the
weight it was made from, rounded. It cannot be trained: adapters beside it can. The written-out weight
lives only while it multiplies; for a gradient it is written out again.
Source: Dettmers et al. 2023, "QLoRA" (nf4 and its blocks of 64).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from csm_jax.array_typing import Array, DTypeLike, Float, Params, pytree
from csm_jax.linear import StandIn, project
from csm_jax.train.lora import TARGETS
from csm_jax.train.settings import Quantization
from csm_jax.weights.tables import flatten, unflatten

if TYPE_CHECKING:
    from qwix import QArray

TILE = 64
"""Inputs that share a scale."""


@pytree
class Quantised(StandIn):
    """A weight `[O, I]` as codes and a scale for every `TILE` of a row.

    Attributes:
        array: Both; the scales have the dtype of the weight it was made from.
    """

    array: QArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.array.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weight."""
        return self.array.scale.dtype

    def astype(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        """Returns the weight written out."""
        import qwix

        return qwix.dequantize(self.array).astype(dtype)

    def product(self, x: Float[Array, "*batch I"], *, float32: bool) -> Float[Array, "*batch O"]:
        """Returns `x @ weight.T`."""

        # Without the checkpoint the written-out weight would be kept for the gradient of `x`.
        @jax.checkpoint
        def multiply(x: Array, weight: Quantised) -> Array:
            return project(x, weight.astype(x.dtype), float32=float32)

        return multiply(x, self)


def quantise(params: Params, kind: Quantization) -> Params:
    """Returns the tree with a `Quantised` in the place of every projection inside a block.

    Embeddings, norms and heads stay as they are.

    Args:
        params: Weights, one device's.
        kind: How a weight is coded, 4 or 8 bits each.

    Raises:
        ImportError: qwix is not installed; the message has the command.
        ValueError: A weight's inputs are not a multiple of `TILE`.
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "training over quantised weights needs qwix: pip install 'csm_jax[qlora]'"
        ) from error
    flat = flatten(params)
    chosen = [path for path in flat if ".layers." in path and path.split(".")[-1] in TARGETS]
    if odd := [
        f"{path} has {flat[path].shape[1]:,}" for path in chosen if flat[path].shape[1] % TILE
    ]:
        raise ValueError(f"inputs must be a multiple of {TILE}: {', '.join(odd)}")
    coded = jax.jit(partial(qwix.quantize, qtype=kind, channelwise_axes=(0,), tiled_axes={1: TILE}))
    for path in chosen:
        flat[path] = Quantised(array=coded(flat[path]))
    return unflatten(flat)
