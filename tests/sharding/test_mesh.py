"""One device and eight give the same scores, on every mesh; `test_engine_mesh` is about codes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from csm_jax import sharding
from csm_jax.array_typing import Params
from csm_jax.config import CSMConfig
from csm_jax.generate import (
    pad_prompts,
)
from csm_jax.model import forward, param_axes, param_shapes, param_shardings
from tests.support.model import params_of, prompt, short_config

CONFIG = short_config()
MESHES = {
    "data8": ((8,), ("data",)),
    "4x2": ((4, 2), ("data", "tensor")),
    "2x4": ((2, 4), ("data", "tensor")),
}
ROWS = 8
PROMPTS = [prompt(CONFIG, 3 + row, row, seed=row) for row in range(ROWS)]


@pytest.fixture(scope="module")
def params() -> Params:
    return params_of(CONFIG)


@pytest.fixture(params=MESHES, scope="module")
def mesh(request: pytest.FixtureRequest) -> jax.sharding.Mesh:
    shape, names = MESHES[request.param]
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(shape))


def batch(config: CSMConfig) -> tuple[jax.Array, jax.Array]:
    return pad_prompts(PROMPTS, config=config)


def test_scores_are_those_of_one_device(params: Params, mesh: jax.sharding.Mesh) -> None:
    frames, mask = batch(CONFIG)
    want = jax.jit(forward, static_argnames="config")(params, frames, mask, config=CONFIG)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, param_shardings(CONFIG, mesh))
        place = sharding.named(mesh, "batch", None, None)
        frames, mask = jax.device_put((frames, mask), place)
        got = jax.jit(forward, static_argnames="config")(sharded, frames, mask, config=CONFIG)
    # Sums over a split axis add the same terms in another order: the bound is the parity tests' for
    # a whole stack. Largest seen: 1.2e-5, once in 192,696 scores, with jax 0.12.
    for name, one, many in zip(("c0", "decoder"), want, got, strict=True):
        np.testing.assert_allclose(np.asarray(many), np.asarray(one), atol=2e-5, err_msg=name)
        assert jax.typeof(many).sharding.spec[0] == "data"


def test_parameters_are_split_as_the_table_says(mesh: jax.sharding.Mesh) -> None:
    shardings = param_shardings(CONFIG, mesh)
    tensor = "tensor" if "tensor" in mesh.axis_names else None
    layer = shardings["backbone"]["layers"]["0"]
    assert layer["attn"]["q_proj"].spec == P(tensor, None)
    assert layer["attn"]["o_proj"].spec == P(None, tensor)
    assert shardings["decoder"]["layers"]["0"]["mlp"]["w_down"].spec == P(None, tensor)
    assert shardings["decoder"]["layers"]["0"]["attn"]["k_proj"].spec == P(None, None)


def test_every_parameter_names_its_axes() -> None:
    shapes, axes = param_shapes(CONFIG), param_axes(CONFIG)
    assert jax.tree.structure(shapes) == jax.tree.structure(
        axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    for leaf, names in zip(
        jax.tree.leaves(shapes),
        jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)),
        strict=True,
    ):
        assert len(names) == leaf.ndim
        assert set(names) <= set(sharding.RULES)


def test_without_a_mesh_nothing_is_said() -> None:
    assert sharding.spec("batch", None) is None
    assert sharding.follow(jnp.zeros((2, 2)), 0, 1) is None


def test_a_mesh_of_automatic_axes_is_left_to_the_compiler(params: Params) -> None:
    frames, mask = batch(CONFIG)
    want = jax.jit(forward, static_argnames="config")(params, frames, mask, config=CONFIG)[0]
    auto = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(auto):
        frames, mask = jax.device_put((frames, mask), sharding.named(auto, "batch", None, None))
        got = jax.jit(forward, static_argnames="config")(params, frames, mask, config=CONFIG)[0]
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=1e-5)


def test_a_batch_is_split_where_it_divides(mesh: jax.sharding.Mesh) -> None:
    with jax.set_mesh(mesh):
        even, odd = jnp.zeros((8, 3)), jnp.zeros((3, 3))
        assert jax.typeof(sharding.split_batch(even)).sharding.spec == P("data", None)
        assert sharding.split_batch(odd) is odd
    assert sharding.split_batch(even) is even


def test_heads_that_do_not_divide_are_named() -> None:
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((1, 8), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    few = dataclasses.replace(
        CONFIG, backbone=dataclasses.replace(CONFIG.backbone, num_heads=12, num_kv_heads=6)
    )
    with pytest.raises(
        ValueError, match="num_kv_heads=6 does not divide by the 8 devices of 'tensor'"
    ):
        param_shardings(few, mesh)
