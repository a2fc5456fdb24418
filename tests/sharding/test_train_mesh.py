"""Training steps on meshes of 8 devices: the same as on one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax import sharding
from csm_jax.model import init_params, param_shardings
from csm_jax.train.lora import LoraConfig
from csm_jax.train.loss import LossConfig
from csm_jax.train.methods import Full, Lora, Method, Prefix, divide, trainable_shardings
from csm_jax.train.step import StepConfig, TrainState, init_state, make_step, place
from tests.support import training
from tests.support.model import short_config

CONFIG = dataclasses.replace(
    short_config(),
    backbone=dataclasses.replace(short_config().backbone, num_layers=1),
    decoder=dataclasses.replace(short_config().decoder, num_layers=1),
)
# Where a gradient is nearly 0, Adam would divide the rounding of a sum by itself.
OPTIMIZER = training.optimizer(1e-3, 10, weight_decay=0.1, adam_epsilon=1e-3)
METHODS: dict[str, Method] = {"full": Full(), "lora": Lora(LoraConfig()), "prefix": Prefix(4)}
CASES = (
    ("full", "data=2,fsdp=2,tensor=2"),
    # A minute of compiling each, and what is sharded in them is sharded above.
    pytest.param("full", "fsdp=4,tensor=2", marks=pytest.mark.slow),
    pytest.param("full", "fsdp=8", marks=pytest.mark.slow),
    pytest.param("full", "data=2,fsdp=4", marks=pytest.mark.slow),
    pytest.param("lora", "fsdp=4,tensor=2", marks=pytest.mark.slow),
    pytest.param("prefix", "data=2,fsdp=4", marks=pytest.mark.slow),
)


@functools.cache
def batch(prefix: int):
    """Returns two micro-batches of 8 rows."""
    rng = np.random.default_rng(0)

    def row(i: int):
        talks = [
            [
                training.random_turn(CONFIG, text=4, audio=5 + i % 4, rng=rng, trained=i % 3 > 0),
                training.random_turn(CONFIG, text=3, audio=7, rng=rng),
            ]
            for _ in range(2)
        ]
        return training.row(CONFIG, talks, length=64, prefix=prefix)

    rows = [row(i) for i in range(16)]
    return training.stack([training.join(rows[:8]), training.join(rows[8:])])


def train(method: Method, steps: int) -> tuple[list[dict[str, float]], TrainState]:
    """Returns the metrics of some steps, and the state, on the mesh that is set."""
    mesh = sharding.current_mesh()
    params = init_params(CONFIG, jax.random.key(0), dtype=jnp.float32)
    trainable, frozen = divide(
        method, params, config=CONFIG, key=jax.random.key(1), dtype="float32"
    )
    if mesh is not None:
        trainable = jax.device_put(trainable, trainable_shardings(method, mesh, config=CONFIG))
        frozen = jax.device_put(frozen, param_shardings(CONFIG, mesh)) if frozen else {}
    step = make_step(
        StepConfig(
            model=CONFIG,
            method=method,
            loss=LossConfig(amortization_ratio=8, decoder_loss_weight=1.0, remat="minimal"),
            optimizer=OPTIMIZER,
            dtype="float32",
            seed=3,
        )
    )
    state, told = init_state(trainable, OPTIMIZER), []
    for _ in range(steps):
        state, metrics = step(
            state, frozen, place(batch(method.prefix_positions), accumulated=True)
        )
        told.append({name: float(np.mean(x)) for name, x in jax.device_get(metrics).items()})
    return told, state


@functools.cache
def alone(name: str):
    return train(METHODS[name], 3)


@pytest.mark.parametrize(("method", "mesh"), CASES)
def test_three_steps_are_those_of_one_device(method, mesh):
    wanted, state = alone(method)
    with (
        sharding.use_rules(sharding.TRAINING_RULES),
        jax.set_mesh(sharding.parse_mesh(mesh)),
    ):
        found, split = train(METHODS[method], 3)
    for one, other in zip(wanted, found, strict=True):
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    for one, other in zip(
        jax.tree.leaves(state.trainable), jax.tree.leaves(split.trainable), strict=True
    ):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-5, atol=1e-5)


def test_weights_and_moments_lie_in_slices():
    with (
        sharding.use_rules(sharding.TRAINING_RULES),
        jax.set_mesh(sharding.parse_mesh("fsdp=8")),
    ):
        mesh = jax.sharding.get_mesh()
        params = init_params(CONFIG, jax.random.key(0), dtype=jnp.float32)
        placed = jax.device_put(params, trainable_shardings(Full(), mesh, config=CONFIG))
        state = init_state(placed, OPTIMIZER)
    whole = sum(x.size for x in jax.tree.leaves(state.trainable))
    here = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.trainable))
    moments = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.moments))
    assert here < whole / 8 * 1.02  # norms are whole everywhere
    assert moments < 2 * whole / 8 * 1.02
