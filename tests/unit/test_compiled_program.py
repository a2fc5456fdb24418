"""What the engine's compiled step does: no more arithmetic than it must, and no copies of what is large."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from csm_jax import generate, llama
from csm_jax.config import CSMConfig, csm_1b, tiny
from csm_jax.linear import project
from csm_jax.model import frame_cost
from csm_jax.slots import Slots, SlotSizes
from tests.support.program import abstract_params, aliased_shapes, loop_flops, once_flops, widened

WINDOW = 256


def shallow() -> CSMConfig:
    """Returns CSM-1B with one layer for each transformer: its products dominate, and it compiles soon."""
    full = csm_1b()
    return dataclasses.replace(
        full,
        backbone=dataclasses.replace(full.backbone, num_layers=1),
        decoder=dataclasses.replace(full.decoder, num_layers=1),
    )


CAPACITY = 1024
"""So much more than the window that a copy of a cache dwarfs what a step needs."""


def slots(config: CSMConfig, *, rows: int, chunk_frames: int, segments: int = 0) -> Slots:
    sizes = SlotSizes(
        slots=rows,
        capacity=CAPACITY,
        chunk_frames=chunk_frames,
        prefill_rows=1,
        segments=segments,
        segment_capacity=64 * (segments > 0),
    )
    return Slots(config, abstract_params(config, "float32"), sizes)


def program(config: CSMConfig, *, rows: int, chunk_frames: int, segments: int = 0) -> Any:
    made = slots(config, rows=rows, chunk_frames=chunk_frames, segments=segments)
    return made.compiled(window=WINDOW, ranks=64)


def excess(config: CSMConfig, *, rows: int, chunk_frames: int) -> float:
    """Returns the program's operations over those of the cost model."""
    flops = loop_flops(program(config, rows=rows, chunk_frames=chunk_frames))
    cost = frame_cost(config, itemsize=4, window=WINDOW)
    return flops / (cost.flops * rows * chunk_frames)


def test_operations_are_those_of_the_cost_model() -> None:
    assert 0.99 < excess(shallow(), rows=4, chunk_frames=2) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_operations_are_those_of_the_cost_model_at_full_size(rows: int) -> None:
    assert 0.99 < excess(csm_1b(), rows=rows, chunk_frames=8) < 1.1


def test_work_done_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return project(x, w) + project(x + 1, w)

    monkeypatch.setattr(llama, "project", twice)
    # Other sizes than above: a program of the same would come from jit's cache.
    assert excess(shallow(), rows=3, chunk_frames=2) > 1.1


def test_loops_are_counted_as_often_as_they_run() -> None:
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w), None

        def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.scan(inner, x, length=5)[0] @ w, None

        return jax.lax.scan(outer, x, length=7)[0]

    compiled = jax.jit(run).lower(jnp.ones((4, 64)), jnp.ones((64, 64))).compile()
    product = 2 * 4 * 64 * 64
    assert loop_flops(compiled) == pytest.approx(7 * 6 * product, rel=0.01)
    # What the multiplication is for. Where XLA counts rounds itself, it must go.
    assert once_flops(compiled.as_text() or "") == pytest.approx(2 * product, rel=0.01)


@pytest.mark.parametrize("segments", [0, 2])
def test_caches_change_in_place(segments: int) -> None:
    config, rows = tiny(), 4
    compiled = program(config, rows=rows, chunk_frames=4, segments=segments)
    back = config.backbone
    cache = (rows, back.num_kv_heads, CAPACITY, back.head_dim)
    assert aliased_shapes(compiled).count(cache) == 2 * back.num_layers
    # Nor is one copied on the way.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * math.prod(cache)


def test_caches_that_are_not_given_away_are_seen() -> None:
    config = tiny()
    made = slots(config, rows=4, chunk_frames=4)
    static = {"config": config, "num_frames": 4, "window": WINDOW, "ranks": 64}
    undonated = inspect.unwrap(generate.generate_frames)
    step = jax.jit(functools.partial(undonated, **static))
    compiled = step.lower(abstract_params(config, "float32"), made._state).compile()
    assert aliased_shapes(compiled) == []


def cuda_code(config: CSMConfig, *, rows: int, num_frames: int) -> str:
    """Returns the frame loop as it is lowered for CUDA in bfloat16."""
    state = jax.eval_shape(
        lambda: generate.init_state(config, batch=rows, capacity=512, dtype=jnp.bfloat16)
    )
    traced = generate.generate_frames.trace(
        abstract_params(config, "bfloat16"),
        state,
        config=config,
        num_frames=num_frames,
        window=WINDOW,
        ranks=64,
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def smallest_matrix(config: CSMConfig) -> int:
    leaves = jax.tree.leaves(abstract_params(config, "bfloat16"))
    return min(math.prod(leaf.shape) for leaf in leaves if len(leaf.shape) > 1)


def test_no_float32_copy_of_a_bfloat16_weight() -> None:
    shapes = widened(cuda_code(csm_1b(), rows=2, num_frames=8))
    assert shapes  # norms and logits
    assert math.prod(shapes[0]) < smallest_matrix(csm_1b()), shapes[0]


def test_a_float32_copy_of_a_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(x: jax.Array, w: jax.Array) -> jax.Array:
        return project(x.astype(jnp.float32), w.astype(jnp.float32)).astype(x.dtype)

    monkeypatch.setattr(llama, "project", wide)
    config = csm_1b()
    shapes = widened(cuda_code(config, rows=2, num_frames=7))
    sizes = config.backbone
    assert shapes.count((sizes.intermediate_dim, sizes.embed_dim)) == 2 * sizes.num_layers
