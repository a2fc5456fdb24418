"""Frozen weights in few bits below adapters, and adapters that learn over them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csm_jax.array_typing import Array, Params
from csm_jax.linear import project
from csm_jax.model import forward, init_params
from csm_jax.train.lora import LoraConfig, apply_lora, init_lora, merge_lora
from csm_jax.weights.tables import flatten
from tests.support.checkpoints import small
from tests.support.model import prompt, short_config

pytest.importorskip("qwix")

from csm_jax.train.quantize import Quantised, quantise

CONFIG = short_config()
LORA = LoraConfig(rank=8)


@functools.cache
def params_of(dtype: str = "float32") -> Params:
    return init_params(CONFIG, jax.random.key(0), dtype=jnp.dtype(dtype))


@functools.cache
def quantised(kind: str, dtype: str = "float32") -> Params:
    return quantise(params_of(dtype), kind)


def batch() -> tuple[Array, Array]:
    frames, mask = prompt(CONFIG, 3, 6)
    return jnp.asarray(frames)[None], jnp.asarray(mask)[None]


def loss(adapters: Params, params: Params) -> Array:
    frames, mask = batch()
    c0, decoder = forward(apply_lora(params, adapters, LORA), frames, mask, config=CONFIG)
    heads = jnp.concatenate([c0[:, 2:-1, None], decoder[:, 2:]], axis=2)
    codes = frames[:, 3:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(heads, codes).mean()


def projections(params: Params) -> dict[str, Any]:
    return {
        path: leaf
        for path, leaf in flatten(params).items()
        if ".layers." in path and "norm" not in path
    }


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.11), ("int4", 0.13), ("int8", 0.008)])
def test_a_quantised_weight_is_near_the_weight(kind, error):
    # Relative root mean square over normal weights in blocks of 64; measured 0.093, 0.10 and 0.0067.
    whole, coded = projections(params_of()), projections(quantised(kind))
    assert set(whole) == set(coded)
    for path, weight in whole.items():
        assert isinstance(coded[path], Quantised)
        assert (coded[path].shape, coded[path].dtype) == (weight.shape, weight.dtype)
        distance = np.asarray(coded[path].astype(jnp.float32)) - np.asarray(weight)
        assert 0 < np.sqrt(np.mean(distance**2) / np.mean(np.square(weight))) < error, path


def test_only_projections_inside_blocks_are_quantised():
    before, after = flatten(params_of("float32")), flatten(quantised("nf4"))
    others = set(before) - set(projections(params_of()))
    assert {"backbone.text_embeddings", "decoder.audio_head", "backbone.final_norm"} <= others
    assert all(after[path] is before[path] for path in others)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int4", 4), ("int8", 8)])
def test_memory(kind, bits):
    # Bits of the codes' type: an accelerator packs them, the CPU takes a byte each.
    whole = projections(params_of("bfloat16"))
    coded = projections(quantised(kind, "bfloat16"))
    weights = sum(weight.size for weight in whole.values())
    codes = sum(
        weight.array.qvalue.size * jnp.iinfo(weight.array.qvalue.dtype).bits
        for weight in coded.values()
    )
    scales = sum(weight.array.scale.nbytes for weight in coded.values())
    assert codes == bits * weights
    assert scales == 2 * weights / 64
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(coded))
    assert held <= 0.52 * sum(weight.nbytes for weight in whole.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_that_of_the_written_out_weight(dtype):
    coded = projections(quantised("nf4", dtype))["backbone.layers.0.mlp.w_up"]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 128)), dtype)
    got = jax.jit(project)(x, coded)
    assert got.dtype == x.dtype
    want = np.asarray(x, np.float64) @ np.asarray(coded.astype(jnp.float32), np.float64).T
    error = 1e-5 if dtype == "float32" else 1e-2
    assert np.abs(np.asarray(got, np.float64) - want).max() < error * np.abs(want).max()


def test_the_loss_is_near_that_of_the_float_weights():
    adapters = init_lora(CONFIG, LORA, jax.random.key(1))
    value = jax.jit(loss)
    whole = float(value(adapters, params_of()))
    assert abs(float(value(adapters, quantised("int8"))) - whole) < 0.005 * whole
    assert 0 < abs(float(value(adapters, quantised("nf4"))) - whole) < 0.05 * whole


def test_adapters_learn_over_quantised_weights():
    params, adapters = quantised("nf4"), init_lora(CONFIG, LORA, jax.random.key(1))
    optimiser = optax.adam(3e-3)

    @jax.jit
    def step(adapters: Params, state: optax.OptState) -> tuple[Params, optax.OptState, Array]:
        value, gradient = jax.value_and_grad(loss)(adapters, params)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimiser.init(adapters), []
    for _ in range(30):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    # Merged with the rounded weights they were trained over, they act the same.
    merged = jax.jit(lambda *trees: merge_lora(*trees, LORA, dtype=None))(params, adapters)
    assert all(isinstance(leaf, jax.Array) for leaf in flatten(merged).values())
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    value = jax.jit(loss)
    assert float(value(zeros, merged)) == pytest.approx(float(value(adapters, params)), abs=1e-4)


def test_no_written_out_weight_is_kept_for_the_gradient():
    params, adapters = quantised("nf4"), init_lora(CONFIG, LORA, jax.random.key(1))
    mlp = params_of()["backbone"]["layers"]["0"]["mlp"]
    shapes = {weight.shape for weight in mlp.values()}  # which nothing else has

    def kept(params: Params) -> set[tuple[int, ...]]:
        pullback = jax.eval_shape(
            lambda params: jax.vjp(lambda adapters: loss(adapters, params), adapters)[1], params
        )
        return {leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32}

    assert not shapes & kept(params)
    assert shapes & kept(params_of())


def test_inputs_that_do_not_divide_are_named():
    odd = init_params(small(), jax.random.key(0), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"multiple of 64: .*backbone.layers.0.mlp.w_down has 40"):
        quantise(odd, "nf4")
