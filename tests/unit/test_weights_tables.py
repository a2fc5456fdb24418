"""The tables against names, shapes and row orders written out by hand."""

from __future__ import annotations

import pickle
from math import prod

import numpy as np
import pytest

from csm_jax.config import csm_1b
from csm_jax.weights import LAYOUTS, WeightsError, tables
from csm_jax.weights.tables import TensorSpec
from csm_jax.weights.transforms import IDENTITY, PERMUTE_ROPE, TRANSPOSE_LAST_TWO
from tests.support.checkpoints import sesame_shapes, small


def specs_of(layout: str, config=None) -> dict[str, TensorSpec]:
    return {
        binding.name: TensorSpec("float32", binding.foreign_shape)
        for binding in tables.bind(LAYOUTS[layout], config or small())
    }


@pytest.mark.parametrize("config", [small(), csm_1b()], ids=["small", "csm_1b"])
def test_sesame_names_and_shapes(config):
    assert {name: spec.shape for name, spec in specs_of("sesame", config).items()} == (
        sesame_shapes(config)
    )


def test_published_census():
    """Counts and sizes of the published files (FACTS 1.2 and 1.3)."""
    sesame, transformers = (specs_of(name, csm_1b()) for name in ("sesame", "transformers"))
    assert len(sesame) == 187
    assert sum(prod(spec.shape) for spec in sesame.values()) == 1_552_791_552
    assert len(transformers) == 538 - 350


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_has_one_place(layout):
    config = small()
    paths = [binding.path for binding in tables.bind(LAYOUTS[layout], config)]
    assert set(paths) == set(tables.model_shapes(config))
    copies = {"transformers": 1}.get(layout, 0)
    assert len(paths) == len(set(paths)) + copies


@pytest.mark.parametrize("layout", ["sesame", "csm-hf", "csm-mlx"])
def test_untied_config_has_no_place(layout):
    with pytest.raises(ValueError, match=r"decoder\.audio_embeddings.*transformers"):
        tables.bind(LAYOUTS[layout], small(tied=False))


def test_transforms_per_layout():
    permuted = {
        layout: {
            binding.name.rsplit(".", 2)[-2]
            for binding in tables.bind(LAYOUTS[layout], small())
            if binding.transform is PERMUTE_ROPE
        }
        for layout in LAYOUTS
    }
    assert permuted == {
        "sesame": {"q_proj", "k_proj"},
        "csm-mlx": {"q_proj", "k_proj"},
        "csm-hf": set(),
        "transformers": set(),
        "orbax": set(),
    }


@pytest.mark.parametrize("name", ["backbone", "decoder"])
def test_permutation_uses_each_projections_own_heads(name):
    config = small()
    sizes = getattr(config, name)
    heads = {
        binding.path.rsplit(".", 1)[1]: binding.num_heads
        for binding in tables.bind(LAYOUTS["sesame"], config)
        if binding.path.startswith(f"{name}.layers.0.attn.")
    }
    assert heads["q_proj"] == sizes.num_heads
    assert heads["k_proj"] == sizes.num_kv_heads


def test_permute_rope_row_by_row():
    """Pair p of a head, rows (2p, 2p+1), goes to rows p and p + head_dim/2."""
    heads, head_dim, width = 3, 8, 5
    foreign = np.arange(heads * head_dim * width, dtype=np.float32).reshape(-1, width)
    ours = PERMUTE_ROPE.forward(foreign, heads)
    for head in range(heads):
        for pair in range(head_dim // 2):
            for part in range(2):
                np.testing.assert_array_equal(
                    ours[head * head_dim + part * head_dim // 2 + pair],
                    foreign[head * head_dim + 2 * pair + part],
                )
    np.testing.assert_array_equal(PERMUTE_ROPE.inverse(ours, heads), foreign)


def test_transpose_last_two():
    foreign = np.arange(24).reshape(2, 3, 4)
    ours = TRANSPOSE_LAST_TWO.forward(foreign, 0)
    assert ours[1, 3, 2] == foreign[1, 2, 3]
    assert TRANSPOSE_LAST_TWO.foreign_shape(ours.shape) == foreign.shape
    np.testing.assert_array_equal(TRANSPOSE_LAST_TWO.inverse(ours, 0), foreign)
    assert IDENTITY.forward(foreign, 0) is foreign


@pytest.mark.parametrize("layout", ["sesame", "transformers"])
def test_detect_by_names(layout):
    assert tables.detect(specs_of(layout), where="f", recorded=None) == layout


def test_csm_hf_and_csm_mlx_need_a_word():
    for layout in ("csm-hf", "csm-mlx"):
        with pytest.raises(WeightsError, match="layout='csm-hf' or layout='csm-mlx'"):
            tables.detect(specs_of(layout), where="f", recorded=None)
        assert tables.detect(specs_of(layout), where="f", recorded=layout) == layout
    # A note that contradicts the names is not believed.
    assert tables.detect(specs_of("sesame"), where="f", recorded="csm-hf") == "sesame"


def test_detect_refuses_strangers_and_quantised():
    with pytest.raises(WeightsError, match="fit no known layout"):
        tables.detect(["conv.weight"], where="f", recorded=None)
    names = [*specs_of("csm-mlx"), "backbone.layers.0.mlp.up_proj.scales"]
    with pytest.raises(WeightsError, match=r"quantised.*up_proj\.scales"):
        tables.detect(names, where="f", recorded=None)


def test_check_lists_everything_at_once():
    layout, config = LAYOUTS["sesame"], small()
    specs = specs_of("sesame")
    assert tables.check(layout, tables.bind(layout, config), specs) == []
    del specs["projection.weight"], specs["backbone.layers.2.mlp.w2.weight"]
    specs["stranger.weight"] = TensorSpec("float32", (1,))
    specs["audio_head"] = TensorSpec("float32", (31, 11, 16))
    specs["text_embeddings.weight"] = TensorSpec("int8", (50, 24))
    specs["decoder.norm.scale"] = TensorSpec("float64", (16,))
    problems = "\n".join(tables.check(layout, tables.bind(layout, config), specs))
    assert problems.count("\n") == 5
    for words in (
        "missing tensor projection.weight",
        "missing tensor backbone.layers.2.mlp.w2.weight",
        "extra tensor stranger.weight",
        "audio_head has shape [31, 11, 16], expected [31, 16, 11]",
        "text_embeddings.weight has dtype int8",
        "decoder.norm.scale has dtype float64",
    ):
        assert words in problems


def test_copies_of_the_audio_table():
    layout, config = LAYOUTS["transformers"], small()
    one = "backbone_model.embed_tokens.embed_audio_tokens.weight"
    other = "depth_decoder.model.embed_tokens.weight"
    for missing in ((), (one,), (other,)):
        specs = {
            name: spec for name, spec in specs_of("transformers").items() if name not in missing
        }
        assert tables.check(layout, tables.bind(layout, config), specs) == []
    specs = {
        name: spec for name, spec in specs_of("transformers").items() if name not in (one, other)
    }
    assert tables.check(layout, tables.bind(layout, config), specs) == [
        f"missing tensor {one} or {other}"
    ]
    untied = small(tied=False)
    specs = specs_of("transformers", untied)
    assert tables.check(layout, tables.bind(layout, untied), specs) == []
    del specs[other]
    assert tables.check(layout, tables.bind(layout, untied), specs) == [f"missing tensor {other}"]


def test_flatten_and_back():
    tree = {"a": {"0": 1, "1": {"b": 2}}, "c": 3}
    assert tables.flatten(tree) == {"a.0": 1, "a.1.b": 2, "c": 3}
    assert tables.unflatten(tables.flatten(tree)) == tree
    with pytest.raises(TypeError, match="0 under"):
        tables.flatten({"a": {0: 1}})


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(WeightsError("f", ["one", "two"])))
    assert error.problems == ("one", "two")
    assert "2 problems" in str(error)
