"""Low-rank adapters: in the weights' place, merged, on a mesh, and as all that is trained."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from csm_jax import sharding
from csm_jax.array_typing import Array, Params
from csm_jax.config import csm_1b
from csm_jax.generate import pad_prompts
from csm_jax.linear import LowRank, project
from csm_jax.model import CSM, forward, param_axes, param_shardings
from csm_jax.train.lora import (
    TARGETS,
    LoraConfig,
    adapted,
    apply_lora,
    init_lora,
    lora_axes,
    lora_shardings,
    merge_lora,
    num_lora_params,
)
from csm_jax.weights.tables import flatten, unflatten
from tests.support.mesh import mesh_of, split_config
from tests.support.model import params_of, prompt, run, settings, start

CONFIG = split_config()
LORA = LoraConfig(rank=4, alpha=6.0)  # a scale of 1.5: not a power of two
scores = jax.jit(forward, static_argnames="config")


def batch(rows: int = 2) -> tuple[Array, Array]:
    prompts = [prompt(CONFIG, 3 + row % 2, 4, seed=row) for row in range(rows)]
    frames, mask = pad_prompts(prompts, config=CONFIG)
    return jnp.asarray(frames), jnp.asarray(mask)


@functools.cache
def trained_adapters() -> Params:
    """Returns adapters that are not at their start: they change every projection by a good part."""
    adapters = init_lora(CONFIG, LORA, jax.random.key(1))
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape).astype(np.float32)), adapters
    )


def test_the_number_of_parameters_for_csm_1b():
    # By hand: 16 · Σ (in + out) over both trunks.
    backbone = 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
    decoder = 4 * (2 * (1024 + 1024) + 2 * (1024 + 256) + 3 * (1024 + 8192))
    assert num_lora_params(csm_1b(), LoraConfig()) == 16 * (backbone + decoder) == 13_467_648
    only = LoraConfig(targets=("q_proj",), trunks=("decoder",))
    assert num_lora_params(csm_1b(), only) == 16 * 4 * 2048


def test_the_number_of_parameters_is_that_of_the_tree():
    adapters = init_lora(CONFIG, LORA, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(adapters)) == num_lora_params(CONFIG, LORA)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}


def test_the_model_starts_as_it_is():
    params, (frames, mask) = params_of(CONFIG), batch()
    adapters = init_lora(CONFIG, LORA, jax.random.key(0))
    assert any(leaf.any() for leaf in jax.tree.leaves(adapters))
    got = scores(apply_lora(params, adapters, LORA), frames, mask, config=CONFIG)
    for one, other in zip(scores(params, frames, mask, config=CONFIG), got, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_what_down_draws_does_not_depend_on_the_other_targets():
    every = flatten(init_lora(CONFIG, LORA, jax.random.key(3)))
    one = flatten(init_lora(CONFIG, LoraConfig(rank=4, targets=("w_up",)), jax.random.key(3)))
    assert one
    assert all(np.array_equal(leaf, every[path]) for path, leaf in one.items())
    downs = [leaf for path, leaf in every.items() if path.endswith("down")]
    assert len({leaf.tobytes() for leaf in map(np.asarray, downs)}) == len(downs)


def test_adapters_act_as_the_merged_weights_do():
    params, (frames, mask) = params_of(CONFIG), batch()
    merged = merge_lora(params, trained_adapters(), LORA, dtype=None)
    base = scores(params, frames, mask, config=CONFIG)
    want = scores(merged, frames, mask, config=CONFIG)
    got = scores(apply_lora(params, trained_adapters(), LORA), frames, mask, config=CONFIG)
    for before, one, other in zip(base, want, got, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.abs(before - one).max() > 0.05


@pytest.mark.parametrize("path", ["backbone.layers.0.attn.o_proj", "decoder.layers.0.mlp.w_gate"])
def test_merging_adds_alpha_over_rank_of_the_product(path):
    params = params_of(CONFIG)
    merged = flatten(merge_lora(params, trained_adapters(), LORA, dtype=None))
    leaves = flatten(trained_adapters())
    down, up = (np.asarray(leaves[f"{path}.{side}"], np.float64) for side in ("down", "up"))
    want = np.asarray(flatten(params)[path], np.float64) + 6 / 4 * up @ down
    np.testing.assert_allclose(merged[path], want, atol=1e-7)
    untouched = set(merged) - set(adapted(CONFIG, LORA))
    assert untouched
    assert all(np.array_equal(merged[path], flatten(params)[path]) for path in untouched)


def test_merging_rounds_once():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(CONFIG))
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    merged = merge_lora(half, trained_adapters(), LORA, dtype=jnp.bfloat16)
    exact = merge_lora(whole, trained_adapters(), LORA, dtype=None)
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(exact), strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.array_equal(one, other.astype(jnp.bfloat16))


def test_codes_are_those_of_the_merged_weights():
    prompts = [prompt(CONFIG, 5, 3, seed=4), prompt(CONFIG, 4, 0, seed=5)]
    rows = settings([1, 2], temperature=0.0)

    def speak(params: Params) -> np.ndarray:
        return run(CONFIG, params, start(CONFIG, params, prompts, rows), [6])[1]

    unmerged = apply_lora(params_of(CONFIG), trained_adapters(), LORA)
    codes = speak(unmerged)
    assert np.array_equal(
        codes, speak(merge_lora(params_of(CONFIG), trained_adapters(), LORA, dtype=None))
    )
    assert not np.array_equal(codes, speak(params_of(CONFIG)))


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_the_product_with_a_correction(rows, dtype, float32):
    rng = np.random.default_rng(rows)
    x, w, down, up = (
        jnp.asarray(rng.standard_normal(shape).astype(np.float32) * scale, dtype)
        for shape, scale in (((rows, 48), 1), ((32, 48), 0.1), ((4, 48), 0.1), ((32, 4), 0.1))
    )
    y = jax.jit(functools.partial(project, float32=float32))(x, LowRank(weight=w, down=down, up=up))
    assert y.dtype == (jnp.float32 if float32 else x.dtype)
    x64, w64, down64, up64 = (np.asarray(each, np.float64) for each in (x, w, down, up))
    want = x64 @ w64.T + x64 @ down64.T @ up64.T
    error = 1e-5 if dtype == "float32" else 2e-2
    assert np.abs(np.asarray(y, np.float64) - want).max() < error * np.abs(want).max()


def products(jaxpr: object) -> list[tuple[int, ...]]:
    """Returns the shapes of all matrix products in a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda each: hasattr(each, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += products(inner)
    return found


def test_a_gradient_multiplies_nothing_of_a_weights_size():
    adapters, params = trained_adapters(), params_of(CONFIG)
    frames, mask = batch()

    def loss(adapters: Params, params: Params) -> Array:
        c0, decoder = forward(apply_lora(params, adapters, LORA), frames, mask, config=CONFIG)
        return jnp.mean(c0**2) + jnp.mean(decoder**2)

    shapes = set(adapted(CONFIG, LORA).values())
    shapes |= {shape[::-1] for shape in shapes}
    frozen = products(jax.make_jaxpr(jax.grad(loss))(adapters, params).jaxpr)
    assert len(frozen) > 50
    assert not shapes & set(frozen)
    # The control: the weights' own gradients are of that size.
    assert shapes & set(products(jax.make_jaxpr(jax.grad(loss, argnums=1))(adapters, params).jaxpr))


def test_adapters_learn():
    params = params_of(CONFIG)
    frames, mask = (jnp.asarray(each)[None] for each in prompt(CONFIG, 3, 6))
    lora = LoraConfig(rank=8)
    adapters = init_lora(CONFIG, lora, jax.random.key(0))
    optimiser = optax.adam(3e-3)

    @jax.jit
    def step(adapters: Params, state: optax.OptState) -> tuple[Params, optax.OptState, Array]:
        def loss(adapters: Params) -> Array:
            applied = apply_lora(params, adapters, lora)
            c0, decoder = forward(applied, frames, mask, config=CONFIG)
            heads = jnp.concatenate([c0[:, 2:-1, None], decoder[:, 2:]], axis=2)
            codes = frames[:, 3:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(heads, codes).mean()

        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimiser.init(adapters), []
    for _ in range(40):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.2 * losses[0]
    # `up` starts at zero, so `down` moves from the second step on; both sides of all do.
    for one, other in zip(
        jax.tree.leaves(init_lora(CONFIG, lora, jax.random.key(0))),
        jax.tree.leaves(adapters),
        strict=True,
    ):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 4, "tensor": 2}, {"data": 2, "tensor": 4}])
def test_a_mesh_gives_the_scores_of_one_device(shape):
    params, (frames, mask) = params_of(CONFIG), batch(8)
    want = scores(apply_lora(params, trained_adapters(), LORA), frames, mask, config=CONFIG)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(CONFIG, mesh))
        adapters = jax.device_put(trained_adapters(), lora_shardings(CONFIG, LORA, mesh))
        rows = jax.device_put((frames, mask), sharding.named(mesh, "batch", None, None))
        merged = merge_lora(placed, adapters, LORA, dtype=None)
        for tree in (apply_lora(placed, adapters, LORA), merged):
            got = scores(tree, *rows, config=CONFIG)
            for one, other in zip(want, got, strict=True):
                np.testing.assert_allclose(one, other, atol=5e-5)
        for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(merged), strict=True):
            assert one.sharding == other.sharding


def test_adapters_are_split_as_their_weights_are():
    axes = lora_axes(CONFIG, LORA)["backbone"]["layers"]["0"]
    assert axes["attn"]["q_proj"] == {"down": (None, "embed"), "up": ("heads", None)}
    assert axes["mlp"]["w_down"] == {"down": (None, "mlp"), "up": ("embed", None)}
    mesh = mesh_of({"data": 4, "tensor": 2})
    placed = lora_shardings(CONFIG, LORA, mesh)["backbone"]["layers"]["0"]["mlp"]
    assert placed["w_down"]["down"].spec == P(None, "tensor")
    assert placed["w_gate"]["up"].spec == P("tensor", None)
    assert placed["w_down"]["up"].spec == placed["w_gate"]["down"].spec == P(None, None)


def test_slices_over_fsdp_are_gathered_as_weights_are():
    params, (frames, mask) = params_of(CONFIG), batch(8)
    want = scores(apply_lora(params, trained_adapters(), LORA), frames, mask, config=CONFIG)
    mesh = mesh_of({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use_rules(sharding.TRAINING_RULES), jax.set_mesh(mesh):
        places = lora_shardings(CONFIG, LORA, mesh)
        assert places["backbone"]["layers"]["0"]["mlp"]["w_down"]["up"].spec == P("fsdp", None)
        adapters = jax.device_put(trained_adapters(), places)
        rows = jax.device_put((frames, mask), sharding.named(mesh, "batch", None, None))
        placed = jax.device_put(params, param_shardings(CONFIG, mesh))

        def used(tree: Params, axes: Params) -> Params:
            return jax.tree.map(lambda x, names: sharding.used_at(x, *names), tree, axes)

        @jax.jit
        def gathered(params: Params, adapters: Params) -> tuple[Array, Array]:
            weights = used(params, param_axes(CONFIG))
            whole = used(adapters, lora_axes(CONFIG, LORA))
            return forward(apply_lora(weights, whole, LORA), *rows, config=CONFIG)

        for one, other in zip(want, gathered(placed, adapters), strict=True):
            np.testing.assert_allclose(one, other, atol=5e-5)


def test_adapters_that_do_not_fit_are_listed():
    adapters = flatten(trained_adapters())
    tree = {
        **{path: leaf for path, leaf in adapters.items() if path.split(".")[-2] != "k_proj"},
        "backbone.layers.0.attn.q_proj.down": jnp.zeros((4, 5)),
        "backbone.final_norm.up": jnp.zeros((4, 4)),
    }
    with pytest.raises(ValueError, match="not those of LoraConfig") as raised:
        apply_lora(params_of(CONFIG), unflatten(tree), LORA)
    message = str(raised.value)
    for problem in (
        "missing backbone.layers.0.attn.k_proj.up",
        "missing decoder.layers.0.attn.k_proj.down",
        "extra backbone.final_norm.up",
        "backbone.layers.0.attn.q_proj.down has shape [4, 5], expected [4, 32]",
    ):
        assert problem in message
    with pytest.raises(ValueError, match=r"has shape \[4, .*expected \[8, "):
        merge_lora(params_of(CONFIG), trained_adapters(), LoraConfig(rank=8), dtype=None)


def test_a_tree_with_adapters_is_still_checked():
    broken = apply_lora(params_of(CONFIG), trained_adapters(), LORA)
    broken = {"backbone": {**broken["backbone"]}, "decoder": broken["decoder"]}
    del broken["backbone"]["final_norm"]
    with pytest.raises(
        ValueError, match=r"missing \[\"\['backbone'\]\['final_norm'\]\"\], extra \[\]"
    ):
        CSM.bind(CONFIG, broken)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"rank": 0}, "rank must be a whole number of 1 or more, got 0"),
        ({"rank": True}, "rank must be"),
        ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"targets": ()}, "targets must be some of q_proj"),
        ({"targets": ("gate",)}, "got \\('gate',\\)"),
        ({"targets": ("q_proj", "q_proj")}, "each once"),
        ({"trunks": ("codec",)}, "trunks must be some of backbone, decoder"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        LoraConfig(**wrong)


def test_targets_are_every_projection_of_a_block():
    shapes = flatten(params_of(CONFIG))
    inside = {
        path.split(".")[-1]
        for path, leaf in shapes.items()
        if ".layers." in path and leaf.ndim == 2
    }
    assert set(TARGETS) == inside
