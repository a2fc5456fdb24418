"""The matrix product with a weight, alone and with what models do right after it."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.linear import project


def gelu(y: np.ndarray) -> np.ndarray:
    return y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))


# What models do next, and the same in numpy.
AFTER: dict[str, tuple[Callable, Callable]] = {
    "nothing": (lambda y, b, r: y, lambda y, b, r: y),
    "minus": (lambda y, b, r: y - b, lambda y, b, r: y - b),
    "scaled residual": (lambda y, b, r: r + b * y, lambda y, b, r: r + b * y),
    "gelu": (lambda y, b, r: jax.nn.gelu(y, approximate=False), lambda y, b, r: gelu(y)),
    "gate": (lambda y, b, r: jax.nn.silu(y) * r, lambda y, b, r: y / (1 + np.exp(-y)) * r),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("inputs", [16, 96, 512])
@pytest.mark.parametrize("outputs", [64, 1024, 2048])
def test_is_the_product_at_any_number_of_rows(inputs, outputs, after):
    # Around the numbers of rows at which the CPU's form changes, and at which XLA fused it wrongly; all in
    # one program, and compared in numpy, where each operation by itself would be another to compile.
    rng = np.random.default_rng(inputs + outputs)
    then, reference = AFTER[after]
    shapes = ((outputs, inputs), (outputs,))
    cases = [
        [
            rng.standard_normal(shape, np.float32)
            for shape in ((rows, inputs), *shapes, (rows, outputs))
        ]
        for rows in (1, 2, 17, 33, 64, 65)
    ]
    run = jax.jit(lambda cases: [then(project(x, w), b, r) for x, w, b, r in cases])
    for found, (x, w, b, r) in zip(run(cases), cases, strict=True):
        expected = reference(x.astype(np.float64) @ w.T.astype(np.float64), b, r)
        error = np.abs(np.asarray(found) - expected).max()
        assert error <= 3e-6 * np.abs(expected).max(), len(x)


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
