"""Meshes of 8 devices, a model that divides over them, and jobs for it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType

from csm_jax.config import CSMConfig
from csm_jax.engine import Engine, Job
from csm_jax.model import param_shardings
from csm_jax.slots import Slots, SlotSizes
from tests.support.engine import Collected, job, micro_config
from tests.support.model import params_of

SHAPES = {
    "data8": {"data": 8},
    "4x2": {"data": 4, "tensor": 2},
    "2x4": {"data": 2, "tensor": 4},
}

# One prefill bucket, and groups of 4 prompts, which divide the data axis of all shapes but the first.
SIZES = SlotSizes(
    slots=8,
    capacity=32,
    chunk_frames=2,
    prefill_rows=4,
    segments=2,
    segment_capacity=32,
)


def mesh_of(shape: dict[str, int], kind: AxisType = AxisType.Explicit) -> jax.sharding.Mesh:
    """Returns a mesh of all devices."""
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(kind,) * len(shape))


def split_config() -> CSMConfig:
    """Returns the smallest sizes whose heads, MLPs and embedding tables divide by 4."""
    sizes = micro_config()
    heads = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 8}
    return dataclasses.replace(
        sizes,
        backbone=dataclasses.replace(sizes.backbone, **heads),
        audio_vocab_size=8,
    )


def slots_of(config: CSMConfig, mesh: jax.sharding.Mesh | None) -> Slots:
    """Returns slots on a mesh, or on one device, under the rules in force."""
    params = params_of(config)
    if mesh is not None:
        # From the host: processes cannot copy what another one's device holds.
        params = jax.device_put(jax.tree.map(np.asarray, params), param_shardings(config, mesh))
    return Slots(config, params, SIZES, mesh=mesh)


def jobs_of(config: CSMConfig, count: int = 20) -> list[Job]:
    """Returns jobs that differ in voice, length and settings, every other one greedy."""
    rng = random.Random(0)
    return [
        job(
            config,
            seed,
            frames=rng.randint(1, 16),
            text=rng.randint(1, 6),
            audio=rng.choice([0, 0, 3, 9]),
            voice=rng.choice([None, None, 0, 1]),
            temperature=0.0 if seed % 2 else 1.2,
            top_p=rng.choice([1.0, 0.8]),
        )
        for seed in range(count)
    ]


def speak(slots: Slots, jobs: Sequence[Job], *, look_ahead: bool) -> list[np.ndarray]:
    """Returns the codes of all jobs: some come later, and two are given up on the way."""
    engine = Engine(slots, look_ahead=look_ahead, stop_repetition=False)
    seen = Collected()
    early = len(jobs) * 2 // 3
    tickets = [engine.submit(each) for each in jobs[:early]]
    seen.take(engine.step())
    given_up = [engine.submit(jobs[0]), engine.submit(jobs[1])]
    seen.take(engine.step())
    engine.cancel(tickets[-1])
    given_up += tickets[-1:]
    engine.cancel(given_up[0])
    tickets[-1] = engine.submit(jobs[early - 1])
    tickets += [engine.submit(each) for each in jobs[early:]]
    while engine.busy:
        seen.take(engine.step())
    assert seen.last[given_up[0]].finish_reason == "cancelled"
    return [seen.of(ticket) for ticket in tickets]
