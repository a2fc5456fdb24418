"""Functions that close over arrays, as `jax.custom_vjp` must have them: with those arrays as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from csm_jax.array_typing import Array


def hoist(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Returns `(pure, consts)`, with `pure(consts, *args)` being `function(*args)`.

    Unlike `jax.closure_convert`, this hoists arrays of every kind, integers too: a gradient may be asked
    for outside of the `jax.jit` in which the function is called.

    Args:
        function: Of trees of arrays.
        args: What it will be called with, or arrays of those shapes.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(*args)
    tree = jax.tree.structure(result)

    def pure(consts: Sequence[Any], *args: Any) -> Any:
        run = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, list(consts)))
        return jax.tree.unflatten(tree, run(*jax.tree.leaves(args)))

    return pure, closed.consts


def computed_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `jax.checkpoint` does, in a form that XLA:CPU keeps.

    XLA:CPU removes the barriers that `jax.checkpoint` relies on, finds the second computation to be the
    same as the first, and keeps everything. Here the second one depends on the gradient that it waits for, as far
    as it reads `arrays`: what is made of closed-over arrays alone, such as weights from fewer bits, is kept.
    """

    def run(*arrays: Array) -> Any:
        pure, consts = hoist(function, *arrays)

        @jax.custom_vjp
        def call(consts: Sequence[Array], arrays: tuple[Array, ...]) -> Any:
            return pure(consts, *arrays)

        def forward(consts: Sequence[Array], arrays: tuple[Array, ...]) -> Any:
            return pure(consts, *arrays), (consts, arrays)

        def backward(kept: Any, gradient: Any) -> Any:
            consts, arrays = kept
            nothing = 0.0 * jax.tree.leaves(gradient)[0].sum()
            arrays = tuple(
                x + nothing.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
                for x in arrays
            )
            _, pull = jax.vjp(lambda consts, arrays: pure(consts, *arrays), consts, arrays)
            return pull(gradient)

        call.defvjp(forward, backward)
        return call(consts, arrays)

    return run
