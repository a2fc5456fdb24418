"""The batch engine gives the same codes on every mesh, and its state stays where it was put."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from csm_jax import sharding
from csm_jax.engine import Engine
from csm_jax.model import param_shardings
from csm_jax.request import row_settings
from csm_jax.slots import Slots, VoicePrompt
from tests.support.engine import drain
from tests.support.mesh import SHAPES, SIZES, jobs_of, mesh_of, slots_of, speak, split_config
from tests.support.model import params_of, prompt

CONFIG = split_config()
JOBS = jobs_of(CONFIG)

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8"
)


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """What one device makes of the jobs."""
    return speak(slots_of(CONFIG, None), JOBS, look_ahead=False)


@pytest.fixture(params=SHAPES, scope="module")
def slots(request: pytest.FixtureRequest) -> Slots:
    """Slots on a mesh, warmed up."""
    slots = slots_of(CONFIG, mesh_of(SHAPES[request.param]))
    slots.warm_up()
    return slots


def state_of(slots: Slots) -> Any:
    return slots._state, slots._shared


def check_some(slots: Slots, expected: list[np.ndarray]) -> None:
    """Checks a few jobs without voices, which need few programs."""
    which = [i for i, job in enumerate(JOBS) if job.voice is None][:6]
    engine = Engine(slots, look_ahead=True, stop_repetition=False)
    tickets = {i: engine.submit(JOBS[i]) for i in which}
    seen = drain(engine)
    for i, ticket in tickets.items():
        np.testing.assert_array_equal(seen.of(ticket), expected[i], err_msg=f"job {i}")


def typed(tree: Any) -> list[tuple[tuple[int, ...], PartitionSpec]]:
    return [(leaf.shape, jax.typeof(leaf).sharding.spec) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("look_ahead", [False, True])
def test_codes_are_those_of_one_device(
    slots: Slots, expected: list[np.ndarray], look_ahead: bool
) -> None:
    slots.reset()
    compiled = slots.compilations
    for which, codes in enumerate(speak(slots, JOBS, look_ahead=look_ahead)):
        np.testing.assert_array_equal(codes, expected[which], err_msg=f"job {which}")
    assert slots.compilations == compiled


def test_the_jobs_say_something(expected: list[np.ndarray]) -> None:
    assert sum(len(codes) > 3 for codes in expected) > 10
    assert len({len(codes) for codes in expected}) > 5


def test_the_state_stays_split_through_every_verb(slots: Slots) -> None:
    slots.reset()
    state, shared = state_of(slots)
    shape = slots._mesh.shape
    tensor = "tensor" if "tensor" in shape else None
    # Rows over data, key/value heads over tensor; every segment is with every row.
    assert jax.typeof(state.cache.k[0]).sharding.spec == PartitionSpec("data", tensor, None, None)
    assert jax.typeof(shared.k[0]).sharding.spec == PartitionSpec(None, tensor, None, None)
    assert {spec[0] for _, spec in typed(state)} == {"data"}
    for leaf in (*state.cache.k, *state.cache.v):
        assert {part.data.nbytes for part in leaf.addressable_shards} == {leaf.nbytes // 8}
    want = typed((state, shared))

    words = prompt(CONFIG, 4, 0)
    assert slots.share(VoicePrompt(frames=words[0], mask=words[1]), 1)
    assert typed(state_of(slots)) == want
    prefix = slots.prefill([words, words], [1, -1])
    requests = [job.request for job in JOBS[:4]]
    slots.insert(prefix, row_settings(requests, segments=[1, -1, -1, -1]), [5, 0])
    assert typed(state_of(slots)) == want
    report = slots.advance(10, slots.config.codebook_size)
    assert typed(state_of(slots)) == want
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(report))
    slots.free([5])
    assert typed(state_of(slots)) == want
    assert np.asarray(slots._state.status)[5] == 0
    slots.reset()
    assert typed(state_of(slots)) == want


def test_a_group_of_prompts_is_split_where_it_divides(slots: Slots) -> None:
    prefix = slots.prefill([prompt(CONFIG, 4, 0)], [-1])
    rows = SIZES.prefill_group(32)
    divides = rows % slots._mesh.shape["data"] == 0
    assert prefix.hidden.sharding.shard_shape((rows, 1))[0] == (
        rows // slots._mesh.shape["data"] if divides else rows
    )


def test_frames_cost_as_many_collectives_as_the_document_says(slots: Slots) -> None:
    """`docs/sharding.md`: none over data, and over tensor one sum per split layer and step."""
    ranks = CONFIG.codebook_size
    text = slots.compiled(window=SIZES.capacity, ranks=ranks).as_text()
    backbone = 2 * CONFIG.backbone.num_layers
    decoder = (CONFIG.num_codebooks - 1) * CONFIG.decoder.num_layers
    per_frame = (backbone + decoder) if "tensor" in slots._mesh.shape else 0
    # The report's three arrays are gathered once per chunk.
    sums = {"all-reduce": SIZES.chunk_frames * per_frame} if per_frame else {}
    assert sharding.collectives(text) == {"all-gather": 3} | sums


def test_the_text_table_is_split_and_looked_up_where_it_is() -> None:
    mesh = mesh_of(SHAPES["2x4"])
    slots = slots_of(CONFIG, mesh)
    table = slots._params["backbone"]["text_embeddings"]
    assert table.sharding.shard_shape(table.shape) == (CONFIG.text_vocab_size // 4, 32)
    slots.prefill([prompt(CONFIG, 4, 0)], [-1])
    [program] = slots._programs.values()
    # A device adds zeros for the rows it does not hold: one sum, and no copy of the table.
    assert sharding.collectives(program.as_text()) == {
        "all-reduce": 1 + 2 * CONFIG.backbone.num_layers
    }


# --- rules of one's own ------------------------------------------------------------------------


def test_rules_of_ones_own_change_the_split_and_not_the_codes(expected: list[np.ndarray]) -> None:
    mesh = mesh_of(SHAPES["4x2"])
    changes = {"mlp": None, "decoder_mlp": None, "audio_rows": "tensor", "batch": None}
    with sharding.use_rules(changes):
        rules = dict(sharding.current_rules())
        slots = slots_of(CONFIG, mesh)
    assert (rules["mlp"], rules["heads"]) == (None, "tensor")
    assert sharding.current_rules() == tuple(sharding.RULES.items())
    weights = slots._params["backbone"]
    assert weights["layers"]["0"]["mlp"]["w_up"].sharding.is_fully_replicated
    assert weights["audio_embeddings"].sharding.spec == PartitionSpec("tensor", None)
    # Outside of the context, slots go on under the rules they were made under.
    slots.reset()
    assert slots._state.hidden.sharding.is_fully_replicated
    text = slots.compiled(window=SIZES.capacity, ranks=CONFIG.codebook_size).as_text()
    # The backbone's attention, and a sum for each look-up of a code: this is why the table is whole.
    per_frame = CONFIG.backbone.num_layers + CONFIG.num_codebooks
    assert sharding.collectives(text)["all-reduce"] == SIZES.chunk_frames * per_frame
    check_some(slots, expected)


def test_a_jitted_function_is_traced_again_under_other_rules() -> None:
    mesh = mesh_of(SHAPES["4x2"])

    @jax.jit
    def zeros() -> jax.Array:
        return jax.numpy.zeros((8, 8), out_sharding=sharding.spec("batch", "mlp"))

    with jax.set_mesh(mesh):
        assert jax.typeof(zeros()).sharding.spec == PartitionSpec("data", "tensor")
        with sharding.use_rules({"mlp": None, "batch": "tensor"}):
            assert jax.typeof(zeros()).sharding.spec == PartitionSpec("tensor", None)
            assert sharding.batch_multiple() == 2
        assert jax.typeof(zeros()).sharding.spec == PartitionSpec("data", "tensor")
        assert sharding.batch_multiple() == 4


def test_a_rule_for_no_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown logical axes \['head'\]; there are .*'heads'"):
        sharding.use_rules({"head": None})


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ({"codebook": "data"}, "num_codebooks - 1=2 does not divide by the 4 devices of 'data'"),
        ({"heads": "data", "decoder_heads": "data"}, "decoder.num_kv_heads=1 does not divide"),
        ({"text_vocab": "data"}, "text_vocab_size=30 does not divide by the 4 devices of 'data'"),
    ],
)
def test_what_does_not_divide_is_named_whatever_the_rules(
    rules: dict[str, str | None], complaint: str
) -> None:
    mesh = mesh_of(SHAPES["4x2"])
    with sharding.use_rules(rules), pytest.raises(ValueError, match=complaint):
        param_shardings(dataclasses.replace(CONFIG, text_vocab_size=30), mesh)


# --- other meshes, and none --------------------------------------------------------------------


def test_whole_weights_run_under_a_mesh_of_automatic_axes(expected: list[np.ndarray]) -> None:
    with jax.set_mesh(mesh_of(SHAPES["4x2"], AxisType.Auto)):
        check_some(slots_of(CONFIG, None), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, None])
def test_split_weights_without_explicit_axes_are_refused(kind: AxisType | None) -> None:
    mesh = mesh_of(SHAPES["4x2"], kind or AxisType.Explicit)
    params = jax.device_put(params_of(CONFIG), param_shardings(CONFIG, mesh))
    with pytest.raises(ValueError, match="split over devices, but no mesh of explicit axes"):
        Slots(CONFIG, params, SIZES, mesh=mesh if kind else None)


def test_weights_elsewhere_than_on_the_mesh_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not on the 8 devices.*jax.device_put"):
        Slots(CONFIG, params_of(CONFIG), SIZES, mesh=mesh_of(SHAPES["4x2"]))


def test_slots_that_do_not_divide_are_refused() -> None:
    mesh = mesh_of({"data": 8})
    params = jax.device_put(params_of(CONFIG), param_shardings(CONFIG, mesh))
    with pytest.raises(ValueError, match="slots=6 must be a multiple of the mesh's data axis, 8"):
        Slots(CONFIG, params, dataclasses.replace(SIZES, slots=6), mesh=mesh)
