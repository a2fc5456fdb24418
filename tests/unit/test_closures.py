"""Closures made explicit: gradients asked for anywhere, and what is computed again is not kept."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.closures import computed_again, hoist
from csm_jax.llama import rematerialise

W = jax.random.normal(jax.random.key(0), (12, 64, 64)) / 8
X = jax.random.normal(jax.random.key(1), (512, 64))


def chain(wrap, weights: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
    def block(w: jax.Array, x: jax.Array) -> jax.Array:
        # Wide inside, and with integers of the caller's, as attention has.
        wide = jnp.where(mask[:, None] > 0, jnp.tanh(jnp.tile(x @ w, (1, 8))), 0.0)
        return x + (wide * jnp.sin(wide)).reshape(*x.shape[:-1], 8, -1).sum(axis=-2)

    for w in weights:
        x = wrap(functools.partial(block, w))(x)
    return (x**2).sum()


MASK = jnp.arange(512) % 3
WRAPS = {"plain": lambda f: f, "again": computed_again}


def test_every_array_becomes_an_argument() -> None:
    @jax.jit
    def pieces(w: jax.Array, ids: jax.Array) -> tuple[jax.Array, int]:
        pure, consts = hoist(lambda x: {"y": x[ids] @ w}, X)
        assert {const.dtype.kind for const in consts} == {"i", "f"}
        return pure([c * 2 if c.dtype.kind == "f" else c for c in consts], X)["y"]

    np.testing.assert_allclose(pieces(W[0], jnp.arange(4)), X[:4] @ (2 * W[0]), rtol=1e-5)


@pytest.mark.parametrize("outside", [False, True])
def test_the_same_gradient(outside: bool) -> None:
    def grads(name: str):
        value = functools.partial(chain, WRAPS[name])
        if outside:  # the function is compiled first and differentiated later
            return jax.grad(jax.jit(value), argnums=(0, 1))(W, X, MASK)
        return jax.jit(jax.grad(value, argnums=(0, 1)))(W, X, MASK)

    for ours, plain in zip(grads("again"), grads("plain"), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def temp_bytes(wrap) -> int:
    value = jax.grad(functools.partial(chain, wrap), argnums=(0, 1))
    found = jax.jit(value).lower(W, X, MASK).compile().memory_analysis()
    return found.temp_size_in_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU")
def test_what_is_computed_again_is_not_kept() -> None:
    plain = temp_bytes(WRAPS["plain"])
    assert temp_bytes(lambda f: rematerialise(f, "full")) < 0.5 * plain
    # Why there is a form of our own: this one saves hardly anything.
    assert temp_bytes(jax.checkpoint) > 0.8 * plain
