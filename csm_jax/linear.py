"""The matrix product with a weight: the only place that decides how it is computed.

A weight is stored `[out, in]` and contracted on its last axis, whatever model it belongs to. A tree of
parameters may hold a `StandIn` in a weight's place, which multiplies in its own way.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
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

    if not exact or w.dtype != x.dtype or sharding.explicit_mesh():
        return product(x, w)
    rows = math.prod(x.shape[:-1])
    if rows in _FEW_ROWS:
        return jax.lax.platform_dependent(x, w, cpu=_few_rows_product, default=product)
    widening = x.ndim == 3 and rows >= _FEW_ROWS.stop and w.shape[0] > w.shape[1]
    # Nor inside of a shard_map, which wants to know what a gradient varies over.
    if widening and jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty:
        return _transposing_the_smaller(product)(x, w)
    return product(x, w)


def _transposing_the_smaller(
    product: Callable[[Array, Array], Array],
) -> Callable[[Array, Array], Array]:
    """Returns a product of `[A, B, I]` to more features, whose gradient transposes the inputs.

    The weight's gradient sums over the rows of both the inputs and the gradient of the outputs. XLA:CPU
    transposes the first of the two, which would be the outputs', the larger: the gradient of an MLP took
    1.2 times as long (measured on 2 AVX2 cores). Of two axes of rows it makes a product for its fast
    library, of one it does not. `jax.jvp` does not go through this.
    """

    @jax.custom_vjp
    def call(x: Array, w: Array) -> Array:
        return product(x, w)

    def forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
        return product(x, w), (x, w)

    def backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        x, w = kept
        exact = jax.lax.Precision.HIGHEST
        by_x = jnp.einsum("...o,oi->...i", gradient, w, precision=exact)
        by_w = jnp.einsum("abi,abo->io", x, gradient, precision=exact)
        return by_x, _fence(by_w).T  # without the fence XLA transposes within the product

    call.defvjp(forward, backward)
    return call


_FEW_ROWS = range(2, 65)


def _few_rows_product(x: Array, w: Array) -> Array:
    # XLA:CPU hands both forms to the same library, but as a product of a few rows it repacks the
    # weight each time, and as this sum, weight first, it reads it in place: 2 times as fast at 2 to 8
    # rows, 1.3 at 32, slower from 128 up and at 1 (measured on 2 AVX2 cores).
    # The barrier keeps x out of its neighbours: XLA would write out the broadcast that two weights share.
    # Without the fence behind it the sum is fused with what follows, which is wrong for a short `I` (jax 0.10.2: rows from the
    # 17th on, with 2,048 outputs) and ten times slower where several products follow each other.
    flat, w = jax.lax.optimization_barrier((x.reshape(-1, x.shape[-1]), w))
    y = _fence(jnp.sum(w[None] * flat[:, None], axis=-1))
    return y.reshape(*x.shape[:-1], w.shape[0])


def _fence(x: Array) -> Array:
    # Rounds float32 to float32, which neither fusion nor folding goes through on a CPU.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)


def _projected(x: Array, w: Array) -> jax.sharding.PartitionSpec | None:
    if not sharding.explicit_mesh():
        return None
    rows = jax.typeof(x).sharding.spec[: x.ndim - 1]
    return jax.sharding.PartitionSpec(*rows, jax.typeof(w).sharding.spec[0])
