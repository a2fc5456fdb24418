"""Mimi's parameters, and its weights in and out of every layout, against the real models."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from math import prod
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from moshi.models import loaders
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from csm_jax import config as csm_config
from csm_jax.mimi.config import MimiConfig, mimi, tiny_mimi
from csm_jax.mimi.params import init_params, param_shapes
from csm_jax.mimi.published import to_moshi, to_transformers
from csm_jax.weights import WeightsError, mimi_tables
from csm_jax.weights.mimi import METADATA_KEY, MOSHI_NAME, holds_mimi, load_mimi, save_mimi
from csm_jax.weights.tables import CODEC_NAME, flatten
from tests.support import checkpoints
from tests.support.mimi import (
    empty_moshi,
    foreign_tensors,
    moshi_model,
    odd_mimi,
    random_params,
    small_config,
    transformers_model,
    write_mimi,
)

SIZES = [
    pytest.param(odd_mimi(), id="odd"),
    pytest.param(tiny_mimi(), id="tiny"),
    pytest.param(mimi(), id="mimi", marks=pytest.mark.slow),
]
LAYOUTS = list(mimi_tables.LAYOUTS)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Returns whether two flat or nested dicts of arrays are bit for bit the same."""
    one, other = flatten(one), flatten(other)
    return set(one) == set(other) and all(
        (a := np.asarray(one[name])).dtype == (b := np.asarray(other[name])).dtype
        and a.shape == b.shape
        and a.tobytes() == b.tobytes()
        for name in one
    )


def moshi_file(directory: Path, tensors: dict[str, np.ndarray], config: MimiConfig | None) -> Path:
    """Returns a file written by the safetensors package, not by us."""
    metadata = None if config is None else {METADATA_KEY: json.dumps(to_moshi(config))}
    save_file(tensors, directory / "mimi.safetensors", metadata=metadata)
    return directory / "mimi.safetensors"


@pytest.fixture(scope="module")
def odd() -> dict[str, Any]:
    return random_params(odd_mimi())


@pytest.fixture
def odd_tensors(odd) -> dict[str, np.ndarray]:
    return foreign_tensors("moshi", odd_mimi(), odd)


# --- parameters ---


@pytest.mark.parametrize("config", SIZES)
def test_init_follows_the_shapes(config):
    shapes, params = flatten(param_shapes(config)), flatten(init_params(config, jax.random.key(0)))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in params.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()
    }


def test_published_census():
    """350 tensors, as the codec inside the published CSM of transformers (538 - 188)."""
    leaves = flatten(param_shapes(mimi()))
    assert len(leaves) == 350
    assert sum(prod(leaf.shape) for leaf in leaves.values()) == 96_151_393
    for layout, count in (("transformers", 350), ("moshi", 350 - 2 * 2 * 8)):
        assert len(mimi_tables.bind(mimi_tables.LAYOUTS[layout], mimi())) == count


def test_random_codebooks_are_all_different():
    leaves = flatten(random_params(tiny_mimi()))
    vectors = [
        leaves[path] / leaves[path.replace("embedding_sum", "cluster_usage")][:, None]
        for path in leaves
        if path.endswith("embedding_sum")
    ]
    assert len(vectors) == 32
    assert min(leaf.min() for path, leaf in leaves.items() if "cluster_usage" in path) > 0.3
    # No two vectors of a book are nearly the same, and none is nearly zero.
    for book in vectors:
        distances = np.linalg.norm(book[:, None] - book, axis=-1) + 9.0 * np.eye(len(book))
        assert distances.min() > 0.01
        assert np.linalg.norm(book, axis=1).min() > 0.01


def test_random_parameters_depend_on_the_key():
    one, two = (random_params(odd_mimi(), seed=seed) for seed in (1, 2))
    assert same(one, random_params(odd_mimi(), seed=1))
    assert not np.array_equal(one["downsample"]["weight"], two["downsample"]["weight"])


# --- tables ---


@pytest.mark.parametrize("config", SIZES)
def test_names_and_shapes_are_the_models_own(config, tmp_path):
    moshi = empty_moshi(config).state_dict()
    published = {
        name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0", "out_proj"): x
        for name, x in moshi.items()
    }
    transformers.MimiModel(transformers.MimiConfig(**to_transformers(config))).save_pretrained(
        tmp_path
    )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for layout, tensors in (("moshi", published), ("transformers", saved)):
        ours = mimi_tables.bind(mimi_tables.LAYOUTS[layout], config)
        assert {binding.names[0]: binding.foreign_shape for binding in ours} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", SIZES)
def test_every_parameter_has_one_place(config, layout):
    bindings = mimi_tables.bind(mimi_tables.LAYOUTS[layout], config)
    paths = [part.path for binding in bindings for part in binding.parts]
    assert sorted(paths) == sorted(flatten(param_shapes(config)))
    names = [name for binding in bindings for name in binding.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", SIZES)
def test_each_binding_inverts_itself(config, layout):
    params = flatten(random_params(config))
    for binding in mimi_tables.bind(mimi_tables.LAYOUTS[layout], config):
        tensor = binding.to_theirs(params)
        assert tensor.shape == binding.foreign_shape
        for path, leaf in binding.to_ours(tensor):
            assert leaf.flags.c_contiguous
            np.testing.assert_array_equal(leaf, params[path], strict=True)


def test_row_orders_by_hand():
    """Heads of 6 rows: moshi pairs neighbours (0, 1), (2, 3), (4, 5), we rows 0..2 with 3..5."""
    config = odd_mimi()
    binding = next(
        binding
        for binding in mimi_tables.bind(mimi_tables.LAYOUTS["moshi"], config)
        if binding.names[0].endswith("in_proj_weight")
    )
    rows = np.repeat(np.arange(72.0, dtype=np.float32)[:, None], 24, axis=1)
    leaves = {path.rsplit(".", 1)[1]: leaf[:, 0].tolist() for path, leaf in binding.to_ours(rows)}
    q, k, v = leaves["q_proj"], leaves["k_proj"], leaves["v_proj"]
    assert q[:12] == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert k == [24 + row for row in q]
    assert v == list(range(48, 72))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_by_hand(odd, layout):
    """Where one number of a torch tensor is in ours; both layouts have torch's arrangement."""
    names = {
        "moshi": (
            "encoder.model.4.conv.conv",
            "decoder.model.2.convtr.convtr",
            "downsample.conv.conv.conv",
            "upsample.convtr.convtr.convtr",
            "quantizer.rvq_rest",
        ),
        "transformers": (
            "encoder.layers.4.conv",
            "decoder.layers.2.conv",
            "downsample.conv",
            "upsample.conv",
            "quantizer.acoustic_residual_vector_quantizer",
        ),
    }[layout]
    down, up, downsample, upsample, acoustic = (f"{name}.weight" for name in names)
    theirs = foreign_tensors(layout, odd_mimi(), odd)
    out, kernel, into = 5, 2, 3
    ours = odd["encoder"]["stages"]["0"]["down"]["weight"]  # the encoder's first stride is 3
    assert ours.shape == (12, 6, 6)
    assert ours[out, kernel, into] == theirs[down][out, into, kernel]
    ours = odd["decoder"]["stages"]["0"]["up"]["weight"]  # and the decoder's is 4
    assert ours.shape == (8, 12, 24)
    assert ours[kernel, out, into] == theirs[up][into, out, kernel]
    assert odd["downsample"]["weight"][out, kernel, into] == theirs[downsample][out, into, kernel]
    assert odd["upsample"]["weight"].shape == (4, 24)
    assert odd["upsample"]["weight"][kernel, out] == theirs[upsample][out, 0, kernel]
    projection = theirs[acoustic.replace("weight", "input_proj.weight")]
    assert odd["quantizer"]["acoustic"]["input_proj"][out, into] == projection[out, into, 0]


@pytest.mark.parametrize("config", SIZES)
def test_the_models_take_every_tensor(config):
    """Strictly: nothing missing, nothing extra, every shape right. Values come back unchanged."""
    params = random_params(config)
    moshi = moshi_model(config, params).state_dict()
    for name, tensor in foreign_tensors("moshi", config, params).items():
        name = name.replace("in_proj_weight", "in_projs.0.weight")
        theirs = moshi[name.replace("out_proj.", "out_projs.0.")]
        np.testing.assert_array_equal(theirs.numpy(), tensor, strict=True)
    theirs = transformers_model(config, params).state_dict()
    bindings = mimi_tables.bind(mimi_tables.LAYOUTS["transformers"], config)
    values = foreign_tensors("transformers", config, params)
    assert len(theirs) == len(bindings)
    for binding in bindings:
        name = next(name for name in reversed(binding.names) if name in theirs)
        np.testing.assert_array_equal(theirs[name].numpy(), values[binding.names[0]], strict=True)


# --- files: round trips ---


@pytest.mark.parametrize("config", SIZES)
def test_round_trips_are_bit_identical(config, tmp_path):
    """moshi -> ours -> transformers -> ours -> moshi, and each layout to itself."""
    tensors = foreign_tensors("moshi", config, random_params(config))
    source = moshi_file(tmp_path, tensors, None if config == mimi() else config)
    found, params = load_mimi(source)
    assert found == config
    assert all(isinstance(leaf, np.ndarray) for leaf in flatten(params).values())
    (again,) = save_mimi(tmp_path / "again.safetensors", found, params, layout="moshi")
    assert same(load_file(again), tensors)

    written = save_mimi(tmp_path / "hf", found, params, layout="transformers")
    assert [path.name for path in written] == ["model.safetensors", "config.json"]
    config_2, params_2 = load_mimi(tmp_path / "hf")
    assert config_2 == config
    assert same(params_2, params)
    save_mimi(tmp_path / "hf2", config_2, params_2, layout="transformers")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf2" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(small_config(), id="small"),
        pytest.param(None, id="published", marks=pytest.mark.slow),
    ],
)
def test_moshi_reads_what_is_written(config, tmp_path):
    source = write_mimi(tmp_path / "a.safetensors", config=config)
    found, params = load_mimi(source)
    (written,) = save_mimi(tmp_path / "b.safetensors", found, params, layout="moshi")
    one, other = (loaders.get_mimi(path, to_moshi(found)) for path in (source, written))
    expected = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_transformers_reads_what_is_written(tmp_path, odd):
    save_mimi(tmp_path / "hf", odd_mimi(), odd, layout="transformers")
    model, report = transformers.MimiModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values())
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_mimi(tmp_path / "theirs")
    assert config == odd_mimi()
    assert same(params, odd)


def test_the_export_has_the_published_spelling(tmp_path, odd):
    """What transformers' convert script and other readers of moshi's file look for."""
    (file,) = save_mimi(tmp_path / "m.safetensors", odd_mimi(), odd, layout="moshi")
    names = set(load_file(file))
    assert {
        "encoder.model.0.conv.conv.weight",
        "decoder.model.2.convtr.convtr.bias",
        "encoder_transformer.transformer.layers.2.self_attn.in_proj_weight",
        "decoder_transformer.transformer.layers.0.self_attn.out_proj.weight",
        "downsample.conv.conv.conv.weight",
        "upsample.convtr.convtr.convtr.weight",
        "quantizer.rvq_first.vq.layers.1._codebook._initialized",
        "quantizer.rvq_rest.vq.layers.2._codebook.embedding_sum",
        "quantizer.rvq_rest.vq.layers.2._codebook.cluster_usage",
    } <= names


SPELLINGS = [
    ("self_attn.in_proj_weight", "self_attn.in_proj.weight"),
    ("self_attn.in_proj_weight", "self_attn.in_projs.0.weight"),
    ("self_attn.out_proj.weight", "self_attn.out_projs.0.weight"),
    ("_codebook._initialized", "_codebook.inited"),
    ("_codebook.cluster_usage", "_codebook.cluster_size"),
    ("_codebook.embedding_sum", "_codebook.embed_sum"),
    ("_codebook.embedding_sum", "_codebook.embed_avg"),
]


@pytest.mark.parametrize(("published", "other"), SPELLINGS)
def test_every_spelling_moshi_reads_is_read(tmp_path, odd, odd_tensors, published, other):
    tensors = {name.replace(published, other): x for name, x in odd_tensors.items()}
    assert set(tensors) != set(odd_tensors)
    model = empty_moshi(odd_mimi())
    model.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})  # moshi does
    assert same(load_mimi(moshi_file(tmp_path, tensors, odd_mimi()))[1], odd)


def test_a_state_dict_of_transformers_is_read(tmp_path, odd):
    """Its modules have other names than its files."""
    state = transformers_model(odd_mimi(), odd).state_dict()
    save_file({name: x.numpy() for name, x in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(to_transformers(odd_mimi())))
    assert same(load_mimi(tmp_path)[1], odd)


def test_a_torch_file_is_read(tmp_path, odd):
    tensors = foreign_tensors("transformers", odd_mimi(), odd)
    file = tmp_path / "pytorch_model.bin"
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, file)
    (tmp_path / "config.json").write_text(json.dumps(to_transformers(odd_mimi())))
    assert same(load_mimi(file)[1], odd)


# --- files: a CSM's codec ---


@pytest.fixture(scope="module")
def csm(tmp_path_factory, odd) -> Path:
    """A transformers CSM in shards, as transformers saves it, its codec with our parameters."""
    config = odd_mimi()
    data = {
        **csm_config.to_transformers(
            dataclasses.replace(checkpoints.small(), audio_vocab_size=35, codebook_size=32)
        ),
        "codec_config": to_transformers(config),
    }
    torch.manual_seed(0)
    model = transformers.CsmForConditionalGeneration(transformers.CsmConfig(**data))
    model.codec_model = transformers_model(config, odd)
    path = tmp_path_factory.mktemp("csm") / "hf"
    model.save_pretrained(path, max_shard_size="100KB")
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_the_codec_of_a_sharded_csm(csm, odd, name):
    assert len(list(csm.glob("*.safetensors"))) > 2
    config, params = load_mimi(csm / name)
    assert config == odd_mimi()
    assert same(params, odd)


@pytest.mark.filterwarnings("ignore")
def test_the_codec_kept_beside_another_layout(csm, odd, tmp_path):
    """Conversion to Sesame's layout sets the codec aside; a Sesame checkpoint has none itself."""
    checkpoints.run(csm, tmp_path / "sesame", "sesame")
    for path in (tmp_path / "sesame", tmp_path / "sesame" / CODEC_NAME):
        config, params = load_mimi(path)
        assert config == odd_mimi()
        assert same(params, odd)
    with pytest.raises(WeightsError, match="not those of a Mimi"):
        load_mimi(tmp_path / "sesame" / "model.safetensors")
    (tmp_path / "sesame" / CODEC_NAME).unlink()
    with pytest.raises(WeightsError, match=r"none of model\.safetensors holds a Mimi"):
        load_mimi(tmp_path / "sesame")


@pytest.mark.filterwarnings("ignore")
def test_holds_mimi(csm, tmp_path, odd):
    assert holds_mimi(csm)
    assert holds_mimi(csm / "model.safetensors.index.json")
    checkpoints.run(csm, tmp_path / "sesame", "sesame")
    assert holds_mimi(tmp_path / "sesame")
    assert not holds_mimi(tmp_path / "sesame" / "model.safetensors")
    checkpoints.run(csm, tmp_path / "orbax", "orbax")
    assert not holds_mimi(tmp_path / "orbax" / "params")
    assert not holds_mimi(tmp_path / "none")


def test_moshis_file_in_a_model_directory(tmp_path, odd):
    save_mimi(tmp_path / MOSHI_NAME, odd_mimi(), odd, layout="moshi")
    (tmp_path / "config.json").write_text('{"model_type": "csm"}')
    (tmp_path / "model.safetensors").write_bytes(b"never opened")
    assert load_mimi(tmp_path)[0] == odd_mimi()


def test_the_file_has_its_published_name():
    assert MOSHI_NAME == loaders.MIMI_NAME


# --- dtypes ---


def test_stored_dtypes_are_kept_unless_another_is_asked_for(tmp_path, odd, odd_tensors):
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in odd_tensors.items()}
    file = moshi_file(tmp_path, half, odd_mimi())
    config, params = load_mimi(file)
    assert {leaf.dtype.name for leaf in flatten(params).values()} == {"bfloat16"}
    (again,) = save_mimi(tmp_path / "again.safetensors", config, params, layout="moshi")
    assert same(load_file(again), half)

    wide = flatten(load_mimi(file, dtype="float32")[1])
    for path, leaf in wide.items():
        assert (leaf.dtype == np.float32) == (".codebooks." not in path)
    expected = odd["encoder"]["conv_in"]["weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(wide["encoder.conv_in.weight"], expected.astype(np.float32))


def test_codebooks_are_never_narrowed(tmp_path, odd, odd_tensors):
    params = flatten(load_mimi(moshi_file(tmp_path, odd_tensors, odd_mimi()), dtype="bfloat16")[1])
    for path, leaf in params.items():
        assert leaf.dtype == (np.float32 if ".codebooks." in path else ml_dtypes.bfloat16)


def test_float16_overflow_is_refused(tmp_path, odd_tensors):
    odd_tensors["downsample.conv.conv.conv.weight"][0, 0, 0] = 1e6
    file = moshi_file(tmp_path, odd_tensors, odd_mimi())
    with pytest.raises(WeightsError, match=r"downsample.*do not fit in float16"):
        load_mimi(file, dtype="float16")


def test_jax_arrays_are_saved(tmp_path, odd):
    params = init_params(odd_mimi(), jax.random.key(0))
    (file,) = save_mimi(tmp_path / "m.safetensors", odd_mimi(), params, layout="moshi")
    assert same(load_mimi(file)[1], odd)


# --- damage ---


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_mimi(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=rf"no Mimi in this directory.*{MOSHI_NAME}"):
        load_mimi(tmp_path)


def test_truncated(tmp_path, odd_tensors):
    file = moshi_file(tmp_path, odd_tensors, odd_mimi())
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(WeightsError, match="truncated"):
        load_mimi(file)


def test_foreign(tmp_path):
    file = moshi_file(tmp_path, {"transformer.weight": np.zeros(3, np.float32)}, None)
    with pytest.raises(WeightsError, match=r"1 tensor names are not those of a Mimi.*transformer"):
        load_mimi(file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_wrong_is_listed_at_once(tmp_path, odd, layout):
    tensors = foreign_tensors(layout, odd_mimi(), odd)
    names = list(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:-1]
    tensors[names[2]] = tensors[names[2]].astype(np.float64)
    tensors["encoder.model.99.bias"] = np.zeros(3, np.float32)
    file = moshi_file(tmp_path, tensors, odd_mimi())
    (tmp_path / "config.json").write_text(json.dumps(to_transformers(odd_mimi())))
    with pytest.raises(WeightsError) as caught:
        load_mimi(file)
    assert caught.value.problems == (
        f"missing tensor {names[0]}",
        f"tensor {names[1]} has shape {list(tensors[names[1]].shape)}, "
        f"expected {list(foreign_tensors(layout, odd_mimi(), odd)[names[1]].shape)}",
        f"tensor {names[2]} has dtype float64, expected one of float32, bfloat16, float16",
        "extra tensor encoder.model.99.bias float32[3]",
    )


def test_one_tensor_under_two_names(tmp_path, odd_tensors):
    name = "quantizer.rvq_first.vq.layers.0._codebook.cluster_usage"
    odd_tensors[name.replace("usage", "size")] = odd_tensors[name]
    file = moshi_file(tmp_path, odd_tensors, odd_mimi())
    with pytest.raises(WeightsError, match=r"cluster_usage and .*cluster_size are one"):
        load_mimi(file)


def test_a_file_that_does_not_tell_its_sizes_is_held_against_the_published(tmp_path, odd_tensors):
    file = moshi_file(tmp_path, odd_tensors, None)
    with pytest.raises(WeightsError, match="the published Mimi: the checkpoint does not tell"):
        load_mimi(file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_non_finite_values_are_refused(tmp_path, odd_tensors, value, dtype):
    tensors = {name: x.astype(dtype) for name, x in odd_tensors.items()}
    names = [name for name in tensors if name.endswith("cluster_usage")][:2]
    tensors[names[0]][3] = value
    tensors[names[1]][:2] = value
    file = moshi_file(tmp_path, tensors, odd_mimi())
    with pytest.raises(WeightsError) as caught:
        load_mimi(file)
    assert caught.value.problems == (
        f"tensor {names[0]} holds 1 values that are NaN or infinite",
        f"tensor {names[1]} holds 2 values that are NaN or infinite",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "mimi_config in its metadata: damaged JSON"),
        ("[1]", "mimi_config in its metadata is not a JSON object"),
        ('{"sample_rate": NaN}', "NaN is not JSON"),
        ("{}", "mimi_config in its metadata: moshi's configuration: 3 problems"),
    ],
)
def test_damaged_metadata(tmp_path, odd_tensors, text, message):
    save_file(odd_tensors, tmp_path / "m.safetensors", metadata={METADATA_KEY: text})
    with pytest.raises(WeightsError, match=message):
        load_mimi(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"codec_config": 5}', "codec_config in config.json is not a JSON object"),
        (
            '{"model_type": "mimi", "pad_mode": "reflect"}',
            "config.json: transformers' configuration: pad_mode='reflect' is not supported",
        ),
    ],
)
def test_damaged_config(tmp_path, odd, text, message):
    save_mimi(tmp_path / "hf", odd_mimi(), odd, layout="transformers")
    (tmp_path / "hf" / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_mimi(tmp_path / "hf")


# --- saving ---


def test_wrong_parameters_are_listed(tmp_path, odd):
    params = flatten(odd)
    del params["upsample.weight"]
    params["downsample.weight"] = params["downsample.weight"][:-1]
    params["bias"] = np.zeros(2, np.float32)
    key = "encoder_transformer.layers.0.attn.k_proj"
    params[key] = params[key].astype(np.float16)
    with pytest.raises(WeightsError) as caught:
        save_mimi(tmp_path / "m.safetensors", odd_mimi(), params, layout="moshi")
    assert caught.value.where == "params"
    assert sorted(caught.value.problems) == [
        "encoder_transformer.layers.0.attn.q_proj, encoder_transformer.layers.0.attn.k_proj, "
        "encoder_transformer.layers.0.attn.v_proj have dtypes float16, float32, but are one "
        "tensor in layout 'moshi'",
        "extra tensor bias float32[2]",
        "missing tensor upsample.weight",
        "tensor downsample.weight has shape [23, 4, 24], expected [24, 4, 24]",
    ]
    assert not any(tmp_path.iterdir())


def test_files_are_not_overwritten_unasked(tmp_path, odd):
    for layout, path in (("moshi", tmp_path / "m.safetensors"), ("transformers", tmp_path / "hf")):
        save_mimi(path, odd_mimi(), odd, layout=layout)
        with pytest.raises(FileExistsError, match="already"):
            save_mimi(path, odd_mimi(), odd, layout=layout)
        save_mimi(path, odd_mimi(), odd, layout=layout, overwrite=True)
        assert same(load_mimi(path)[1], odd)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failed_save_leaves_what_was_there(tmp_path, odd, monkeypatch, layout):
    path = tmp_path / ("m.safetensors" if layout == "moshi" else "hf")
    save_mimi(path, odd_mimi(), odd, layout=layout)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    other = random_params(odd_mimi(), seed=5)
    with pytest.raises(OSError, match="no space left"):
        save_mimi(path, odd_mimi(), other, layout=layout, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()} == before


def test_wrong_destinations_and_layouts(tmp_path, odd):
    with pytest.raises(ValueError, match=r"unknown layout 'mlx' of a Mimi; known are moshi"):
        save_mimi(tmp_path / "x", odd_mimi(), odd, layout="mlx")
    with pytest.raises(ValueError, match=r"is a file that ends in \.safetensors"):
        save_mimi(tmp_path / "x", odd_mimi(), odd, layout="moshi")
    with pytest.raises(ValueError, match="a directory, not a file name"):
        save_mimi(tmp_path / "x.safetensors", odd_mimi(), odd, layout="transformers")
    config = dataclasses.replace(odd_mimi(), norm_eps=1e-6)
    with pytest.raises(ValueError, match="no norm_eps"):
        save_mimi(tmp_path / "x.safetensors", config, odd, layout="moshi")
    assert not any(tmp_path.iterdir())


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        load_mimi(tmp_path, dtype="int8")
