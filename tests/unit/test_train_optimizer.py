"""Optimisers: which weights Muon moves and how far, and that AdamW moves the rest as ever."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.model import init_params
from csm_jax.train.optimizer import make_optimizer, updates_made
from csm_jax.weights.tables import flatten
from tests.support import training
from tests.support.model import short_config

CONFIG = short_config()
CONFIG = dataclasses.replace(
    CONFIG,
    backbone=dataclasses.replace(CONFIG.backbone, num_layers=1),
    decoder=dataclasses.replace(CONFIG.decoder, num_layers=1),
)


def updates(optim: str, steps: int, **changes: float) -> dict[str, np.ndarray]:
    """Returns the last updates, by weight, under the same random gradients."""
    given = {"optim": optim, "max_grad_norm": 1e9} | changes
    optimizer = make_optimizer(training.optimizer(0.5, 100, **given))
    params = init_params(CONFIG, jax.random.key(0), dtype=jnp.float32)
    state, found = optimizer.init(params), params
    step = jax.jit(optimizer.update)
    for i in range(steps):
        rng = np.random.default_rng(i)
        grads = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)  # noqa: B023
        found, state = step(grads, state, params)
    return {name: np.asarray(x) for name, x in flatten(found).items()}


def is_matrix(name: str) -> bool:
    return ".layers." in name and "norm" not in name


def spread(matrix: np.ndarray) -> float:
    """Returns the tenth percentile of the singular values over the largest; a few stay small."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(np.quantile(values, 0.1) / values.max())


def test_muon_moves_the_projections_of_blocks_as_far_as_adamw_would():
    adamw, muon = updates("adamw", 3), updates("muon", 3)
    assert any(map(is_matrix, adamw))
    for name in adamw:
        if not is_matrix(name):
            np.testing.assert_array_equal(muon[name], adamw[name])
            continue
        # Orthogonal rows or columns: singular values near each other, and the size that was promised.
        assert spread(muon[name]) > 0.5 > 0.4 > spread(adamw[name]), name
        size = np.sqrt(np.mean(muon[name] ** 2)) / (0.5 * 0.2)
        assert 0.6 < size < 1.2, name


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_decay_shrinks_projections_and_heads_alone(optim):
    plain, decayed = updates(optim, 1), updates(optim, 1, weight_decay=0.1)
    params = flatten(init_params(CONFIG, jax.random.key(0), dtype=jnp.float32))
    for name, before in plain.items():
        spared = "norm" in name or "embeddings" in name
        shrunk = before - (0 if spared else 0.5 * 0.1 * np.asarray(params[name]))
        np.testing.assert_allclose(decayed[name], shrunk, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["learning_rate", "adam_epsilon", "weight_decay"])
def test_what_is_not_finite_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .* finite, got inf"):
        training.optimizer(**{"learning_rate": 1e-3, "max_steps": 10} | {name: float("inf")})


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_steps_that_moved_weights_are_counted(optim):
    optimizer = make_optimizer(training.optimizer(0.5, 100, optim=optim))
    params = init_params(CONFIG, jax.random.key(0), dtype=jnp.float32)
    state = optimizer.init(params)
    assert updates_made(state) == 0
    _, state = jax.jit(optimizer.update)(params, state, params)
    assert updates_made(state) == 1


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ValueError, match="optim must be one of adamw, muon, got 'sgd'"):
        training.optimizer(1e-3, 10, optim="sgd")
