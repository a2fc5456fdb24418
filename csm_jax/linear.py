"""The matrix product with a weight: the only place that decides how it is computed.

A weight is stored `[out, in]` and contracted on its last axis, whatever model it belongs to. A tree of
parameters may hold a `StandIn` in a weight's place, which multiplies in its own way.
"""

from __future__ import annotations

import abc
import math
from types import EllipsisType

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Float, pytree


class StandIn(abc.ABC):
    """What may stand in a tree of parameters in place of a weight `[out, in]`; a pytree of arrays."""

    @abc.abstractmethod
    def product(self, x: Float[Array, "*batch I"], *, float32: bool) -> Float[Array, "*batch O"]:
        """Returns what `project(x, weight, float32=float32)` would."""

    def __getitem__(self, everything: EllipsisType) -> StandIn:
        return self  # the modules read a variable as `self.q_proj[...]`


@pytree
class LowRank(StandIn):
    """A weight and a correction of low rank: `weight + up @ down`, never written out.

    Attributes:
        weight: The weight itself, or what stands in its place.
        down: Into the rank. Cast to the dtype it is multiplied with, as is `up`.
        up: Out of it.
    """

    weight: Float[Array, "O I"] | StandIn
    down: Float[Array, "R I"]
    up: Float[Array, "O R"]

    def product(self, x: Float[Array, "*batch I"], *, float32: bool) -> Float[Array, "*batch O"]:
        """Returns `x @ weight.T + x @ down.T @ up.T`."""
        inner = project(x, self.down.astype(x.dtype))
        whole = project(x, self.weight, float32=float32)
        return whole + project(inner, self.up.astype(x.dtype), float32=float32)


def project(
    x: Float[Array, "*batch I"], w: Float[Array, "O I"] | StandIn, *, float32: bool = False
) -> Float[Array, "*batch O"]:
    """Returns `x @ w.T` in the dtype of `x`, or in float32 for logits.

    float32 operands multiply in true float32 on every device: whoever asks for float32 wants the
    reference's numbers, not TF32 or three bf16 passes.
    """
    if isinstance(w, StandIn):
        return w.product(x, float32=float32)
    exact = x.dtype == jnp.float32

    def product(x: Array, w: Array) -> Array:
        return jnp.einsum(
            "...i,oi->...o",
            x,
            w,
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32 if float32 else x.dtype,
            out_sharding=_projected(x, w),
        )

    rows = math.prod(x.shape[:-1])
    if exact and w.dtype == x.dtype and rows in _FEW_ROWS and not sharding.explicit_mesh():
        return jax.lax.platform_dependent(x, w, cpu=_few_rows_product, default=product)
    return product(x, w)


_FEW_ROWS = range(2, 65)


def _few_rows_product(x: Array, w: Array) -> Array:
    # XLA:CPU hands both forms to the same library, but as a product of a few rows it repacks the
    # weight each time, and as this sum, weight first, it reads it in place: 2 times as fast at 2 to 8
    # rows, 1.3 at 32, slower from 128 up and at 1 (measured on 2 AVX2 cores).
    # The barrier keeps x out of its neighbours: XLA would write out the broadcast that two weights share.
    # The fence behind the sum, which rounds float32 to float32, is what XLA's fusion stops at. Without
    # it the sum is fused with what follows, which is wrong for a short `I` (jax 0.10.2: rows from the
    # 17th on, with 2,048 outputs) and ten times slower where several products follow each other.
    flat, w = jax.lax.optimization_barrier((x.reshape(-1, x.shape[-1]), w))
    y = jax.lax.reduce_precision(
        jnp.sum(w[None] * flat[:, None], axis=-1), exponent_bits=8, mantissa_bits=23
    )
    return y.reshape(*x.shape[:-1], w.shape[0])


def _projected(x: Array, w: Array) -> jax.sharding.PartitionSpec | None:
    if not sharding.explicit_mesh():
        return None
    rows = jax.typeof(x).sharding.spec[: x.ndim - 1]
    return jax.sharding.PartitionSpec(*rows, jax.typeof(w).sharding.spec[0])
