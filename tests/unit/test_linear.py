"""The matrix product with a weight, alone and with what models do right after it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.linear import project

AFTER: dict[str, Callable] = {
    "nothing": lambda y, b, r: y,
    "minus": lambda y, b, r: y - b,
    "scaled residual": lambda y, b, r: r + b * y,
    "gelu": lambda y, b, r: jax.nn.gelu(y, approximate=False),
    "gate": lambda y, b, r: jax.nn.silu(y) * r,
}


def in_float64(name: str, *arrays: jax.Array) -> np.ndarray:
    with jax.enable_x64(True):
        x, w, b, r = (jnp.asarray(np.asarray(array), jnp.float64) for array in arrays)
        return np.asarray(AFTER[name](jnp.einsum("ti,oi->to", x, w), b, r))


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("inputs", [16, 96, 512])
@pytest.mark.parametrize("outputs", [64, 1024, 2048])
def test_is_the_product_at_any_number_of_rows(inputs, outputs, after):
    # Around the numbers of rows at which the CPU's form changes, and at which XLA fused it wrongly.
    rng = np.random.default_rng(inputs + outputs)
    run = jax.jit(lambda x, w, b, r: AFTER[after](project(x, w), b, r))
    for rows in (1, 2, 17, 33, 64, 65):
        x, w, b, r = (
            jnp.asarray(rng.standard_normal(shape, np.float32))
            for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
        )
        expected = in_float64(after, x, w, b, r)
        error = np.abs(run(x, w, b, r) - expected).max()
        assert error <= 3e-6 * np.abs(expected).max(), rows


def test_products_that_follow_each_other():
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.standard_normal((64, 64), np.float32) / 8) for _ in range(8)]
    x = jnp.asarray(rng.standard_normal((3, 5, 64), np.float32))

    def chain(x, weights):
        for weight in weights:
            x = x + project(jnp.maximum(project(x, weight), 0), weight)
        return x

    expected = np.asarray(x, np.float64)
    for weight in weights:
        w = np.asarray(weight, np.float64)
        expected = expected + np.maximum(expected @ w.T, 0) @ w.T
    error = np.abs(np.asarray(jax.jit(chain)(x, weights)) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()
    assert jax.jit(chain)(x, weights).shape == (3, 5, 64)


@pytest.mark.parametrize("outputs", [8, 40, 200])
def test_the_gradient_of_a_product_to_more_features(outputs: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 50, 40))
    w = jax.random.normal(keys[1], (outputs, 40))
    g = jax.random.normal(keys[2], (3, 50, outputs))
    _, pull = jax.vjp(project, x, w)
    by_x, by_w = pull(g)
    np.testing.assert_allclose(by_x, np.asarray(g) @ np.asarray(w), rtol=1e-4, atol=1e-4)
    expected = np.einsum("abo,abi->oi", np.asarray(g, np.float64), np.asarray(x, np.float64))
    np.testing.assert_allclose(by_w, expected, rtol=1e-4, atol=1e-4)
