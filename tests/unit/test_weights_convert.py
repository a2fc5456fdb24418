"""Every layout in and out bit for bit, and everything wrong with an input said at once."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from csm_jax import weights
from csm_jax.config import to_transformers
from csm_jax.weights import LAYOUTS, WeightsError, convert, tables
from tests.support.checkpoints import (
    BFLOAT16,
    assert_same_bits,
    params_of,
    random_tensors,
    run,
    sesame_shapes,
    small,
    tensors_of,
    write_sesame,
)

ONE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
OTHER = "depth_decoder.model.embed_tokens.weight"
CODEC = {
    "codec_model.encoder.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "codec_model.quantizer.initialized": np.array([1], np.int64),
}
CODEC_CONFIG = {"model_type": "mimi", "codebook_size": 8}


# Each layout next to each of two others, both ways round: every pair would add no new code path.
PAIRS = list(itertools.pairwise([*LAYOUTS, next(iter(LAYOUTS))]))


def write_transformers(
    directory: Path, *, config=None, drop=(), codec=True
) -> dict[str, np.ndarray]:
    """A transformers checkpoint in our own export, then edited by other hands."""
    config = config or small()
    weights.save_checkpoint(directory, config, params_of(config), layout="transformers")
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: array for name, array in tensors.items() if name not in drop}
    tensors |= CODEC if codec else {}
    save_file(tensors, directory / "model.safetensors")
    data = {**to_transformers(config), "codec_config": CODEC_CONFIG, "pad_token_id": 7}
    (directory / "config.json").write_text(json.dumps(data))
    return tensors


# --- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_params_survive_every_layout(tmp_path, layout, dtype):
    config, params = small(), params_of(small(), dtype=dtype)
    weights.save_checkpoint(tmp_path / "m", config, params, layout=layout)
    read_config, read = weights.load_checkpoint(tmp_path / "m", layout=layout)
    assert read_config == config
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(read))
    assert_same_bits(tables.flatten(read), tables.flatten(params))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_survive_load_and_save(tmp_path, layout):
    weights.save_checkpoint(tmp_path / "one", small(), params_of(small()), layout=layout)
    config, params = weights.load_checkpoint(tmp_path / "one", layout=layout)
    weights.save_checkpoint(tmp_path / "two", config, params, layout=layout)
    assert_same_bits(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two"))
    assert (tmp_path / "one" / "config.json").read_text() == (
        tmp_path / "two" / "config.json"
    ).read_text()


@pytest.mark.parametrize(("there", "back"), [*PAIRS, *((b, a) for a, b in PAIRS)])
def test_sesame_file_through_two_layouts(tmp_path, there, back):
    original = write_sesame(tmp_path / "s", small())
    run(tmp_path / "s", tmp_path / "a", there)
    run(tmp_path / "a", tmp_path / "b", back, from_layout=there)
    run(tmp_path / "b", tmp_path / "c", "sesame", from_layout=back)
    assert_same_bits(tensors_of(tmp_path / "c"), original)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("nested", [False, True])
def test_ckpt_pt_equals_safetensors(tmp_path, prefix, nested):
    tensors = write_sesame(tmp_path / "s", small())
    state = {f"{prefix}{name}": torch.from_numpy(array) for name, array in tensors.items()}
    (tmp_path / "s" / "model.safetensors").unlink()
    torch.save({"model": state} if nested else state, tmp_path / "s" / "ckpt.pt")
    run(tmp_path / "s", tmp_path / "d", "sesame")
    assert_same_bits(tensors_of(tmp_path / "d"), tensors)
    config, params = weights.load_checkpoint(tmp_path / "s" / "ckpt.pt")
    weights.save_checkpoint(tmp_path / "e", config, params, layout="sesame")
    assert_same_bits(tensors_of(tmp_path / "e"), tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_rounds_to_nearest(tmp_path, dtype):
    tensors = write_sesame(tmp_path / "s", small())
    run(tmp_path / "s", tmp_path / "d", "sesame", dtype=dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = {name: array.astype(np.dtype(dtype)) for name, array in tensors.items()}
    assert_same_bits(tensors_of(tmp_path / "d"), expected)
    _, loaded = weights.load_checkpoint(tmp_path / "s", dtype=dtype)
    _, converted = weights.load_checkpoint(tmp_path / "d")
    assert_same_bits(tables.flatten(loaded), tables.flatten(converted))


def test_values_that_do_not_fit_are_refused(tmp_path):
    tensors = random_tensors(sesame_shapes(small()))
    tensors["projection.weight"][3, 3] = 1e6
    write_sesame(tmp_path / "s", small(), tensors)
    with pytest.raises(WeightsError, match=r"tensor projection\.weight holds values.*float16"):
        weights.load_checkpoint(tmp_path / "s", dtype="float16")
    with pytest.raises(WeightsError, match=r"tensor projection\.weight holds values.*float16"):
        run(tmp_path / "s", tmp_path / "d", "csm-hf", dtype="float16")
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("dtype", ["int8", "float64", np.float64])
def test_other_dtypes_are_no_target(tmp_path, dtype):
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        weights.load_checkpoint(tmp_path, dtype=dtype)


def test_small_chunks_give_the_same(tmp_path, monkeypatch):
    tensors = write_sesame(tmp_path / "s", small())
    for module in ("safetensors_io", "checkpoint", "torch_pickle"):
        monkeypatch.setattr(f"csm_jax.weights.{module}.CHUNK_BYTES", 64)
    run(tmp_path / "s", tmp_path / "d", "transformers")
    run(tmp_path / "d", tmp_path / "e", "orbax")
    run(tmp_path / "e", tmp_path / "f", "sesame")
    assert_same_bits(tensors_of(tmp_path / "f"), tensors)


# --- transformers: tying, codec, shards --------------------------------------------------------------


@pytest.mark.parametrize("drop", [(), (ONE,), (OTHER,)], ids=["both", "decoder's", "backbone's"])
def test_tying_variants(tmp_path, drop):
    tensors = write_transformers(tmp_path / "t", drop=drop)
    _, params = weights.load_checkpoint(tmp_path / "t")
    assert_same_bits(tables.flatten(params), tables.flatten(params_of(small())))
    run(tmp_path / "t", tmp_path / "same", "transformers")
    assert_same_bits(tensors_of(tmp_path / "same"), tensors)
    data = json.loads((tmp_path / "same" / "config.json").read_text())
    assert (data["pad_token_id"], data["codec_config"]) == (7, CODEC_CONFIG)


def test_copies_that_differ_are_named(tmp_path):
    tensors = write_transformers(tmp_path / "t")
    tensors[OTHER] = tensors[OTHER] + 1
    save_file(tensors, tmp_path / "t" / "model.safetensors")
    for action in (
        lambda: weights.load_checkpoint(tmp_path / "t"),
        lambda: run(tmp_path / "t", tmp_path / "d", "sesame"),
    ):
        with pytest.raises(WeightsError, match=f"{ONE} and {OTHER} differ"):
            action()
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("layout", ["transformers", "orbax"])
def test_untied_tables(tmp_path, layout):
    config = small(tied=False)
    params = params_of(config)
    weights.save_checkpoint(tmp_path / "m", config, params, layout=layout)
    read_config, read = weights.load_checkpoint(tmp_path / "m")
    assert read_config == config
    assert_same_bits(tables.flatten(read), tables.flatten(params))
    with pytest.raises(ValueError, match=r"decoder\.audio_embeddings"):
        run(tmp_path / "m", tmp_path / "s", "sesame")


@pytest.mark.parametrize("via", ["sesame", "csm-hf", "csm-mlx", "orbax"])
def test_codec_is_carried_along(tmp_path, via):
    tensors = write_transformers(tmp_path / "t")
    run(tmp_path / "t", tmp_path / "a", via, dtype="bfloat16")
    assert_same_bits(load_file(tmp_path / "a" / tables.CODEC_NAME), CODEC)
    run(tmp_path / "a", tmp_path / "b", "orbax", from_layout=via)
    run(tmp_path / "b", tmp_path / "c", "transformers", dtype="float32")
    back = tensors_of(tmp_path / "c")
    assert set(back) == set(tensors)
    assert_same_bits({name: back[name] for name in CODEC}, CODEC)
    data = json.loads((tmp_path / "c" / "config.json").read_text())
    assert data["codec_config"] == CODEC_CONFIG


def test_save_takes_the_codec_from_a_checkpoint(tmp_path):
    tensors = write_transformers(tmp_path / "t")
    config, params = weights.load_checkpoint(tmp_path / "t")
    weights.save_checkpoint(
        tmp_path / "d", config, params, layout="transformers", codec=tmp_path / "t"
    )
    assert_same_bits(tensors_of(tmp_path / "d"), tensors)
    write_sesame(tmp_path / "s", config)
    with pytest.raises(WeightsError, match="holds no codec"):
        weights.save_checkpoint(
            tmp_path / "e", config, params, layout="transformers", codec=tmp_path / "s"
        )
    with pytest.raises(FileNotFoundError, match="of the codec"):
        weights.save_checkpoint(
            tmp_path / "e", config, params, layout="transformers", codec=tmp_path / "none"
        )


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(convert, "SHARD_BYTES", 40_000)
    weights.save_checkpoint(tmp_path / "t", small(), params_of(small()), layout="transformers")
    return tmp_path / "t"


def test_shards_and_index(sharded):
    index = json.loads((sharded / tables.TRANSFORMERS_INDEX_NAME).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"transformers-00001-of-{len(files):05d}.safetensors"
    tensors = tensors_of(sharded)
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    for path in (sharded, sharded / tables.TRANSFORMERS_INDEX_NAME):
        _, params = weights.load_checkpoint(path)
        assert_same_bits(tables.flatten(params), tables.flatten(params_of(small())))


def test_shards_may_be_links_as_in_the_hubs_cache(sharded, tmp_path):
    (tmp_path / "blobs").mkdir()
    for file in list(sharded.glob("*.safetensors")):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    weights.load_checkpoint(sharded)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "", ".",
     "C:x.safetensors", "x.bin", "x\0.safetensors", ".safetensors", 5, None, ["x.safetensors"]],
)  # fmt: skip
def test_index_names_must_be_plain(sharded, tmp_path, name):
    index = json.loads((sharded / tables.TRANSFORMERS_INDEX_NAME).read_text())
    save_file({"lm_head.weight": np.zeros(1)}, tmp_path / "x.safetensors")
    index["weight_map"]["lm_head.weight"] = name
    (sharded / tables.TRANSFORMERS_INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(
        WeightsError, match=r"index\.json: .*(refused the file name|not a file name)"
    ):
        weights.load_checkpoint(sharded)


def test_index_must_list_exactly_what_is_there(sharded):
    path = sharded / tables.TRANSFORMERS_INDEX_NAME
    good = json.loads(path.read_text())
    first, second, *_ = sorted(set(good["weight_map"].values()))
    moved = next(name for name, file in good["weight_map"].items() if file == second)
    path.write_text(json.dumps({"weight_map": {**good["weight_map"], moved: first}}))
    with pytest.raises(WeightsError, match=f"tensor {moved} is not in {first}"):
        weights.load_checkpoint(sharded)
    short = {name: file for name, file in good["weight_map"].items() if name != moved}
    path.write_text(json.dumps({"weight_map": short}))
    with pytest.raises(WeightsError, match=f"tensor {moved} of {second} is not in the index"):
        weights.load_checkpoint(sharded)
    for content in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\udcff"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(WeightsError, match="damaged"):
            weights.load_checkpoint(sharded)
    path.write_text(json.dumps(good))
    (sharded / first).unlink()
    with pytest.raises(WeightsError, match=f"the file {first} is missing"):
        weights.load_checkpoint(sharded)


# --- what may go wrong on the way in -----------------------------------------------------------------


def test_everything_wrong_is_said_before_anything_is_read(tmp_path, monkeypatch):
    tensors = random_tensors(sesame_shapes(small()))
    del tensors["projection.weight"]
    tensors["audio_head"] = tensors["audio_head"].swapaxes(1, 2).copy()
    tensors["decoder.norm.scale"] = tensors["decoder.norm.scale"].astype(np.float64)
    tensors["text_embeddings.weight"] = np.zeros((50, 24), np.int8)
    tensors["lora_a"] = np.zeros(2, np.float32)
    write_sesame(tmp_path / "s", small(), tensors)
    monkeypatch.setattr(
        "csm_jax.weights.safetensors_io.read_fully", lambda *a, **k: pytest.fail("read")
    )
    monkeypatch.setattr(jax, "device_put", lambda *a, **k: pytest.fail("device memory"))
    for action in (
        lambda: weights.load_checkpoint(tmp_path / "s"),
        lambda: run(tmp_path / "s", tmp_path / "d", "csm-hf"),
    ):
        with pytest.raises(WeightsError, match="5 problems") as caught:
            action()
        for word in ("projection.weight", "audio_head", "decoder.norm.scale", "int8", "lora_a"):
            assert word in str(caught.value)
    assert not (tmp_path / "d").exists()


def test_bad_params_are_listed(tmp_path):
    flat = tables.flatten(params_of(small()))
    del flat["decoder.projection"]
    flat["backbone.extra"] = np.zeros(1, np.float32)
    flat["backbone.final_norm"] = np.zeros(3, np.float32)
    flat["decoder.final_norm"] = flat["decoder.final_norm"].view(np.int32)
    with pytest.raises(WeightsError, match="params: 4 problems"):
        weights.save_checkpoint(tmp_path / "d", small(), tables.unflatten(flat), layout="sesame")
    assert os.listdir(tmp_path) == []


def test_wrong_layout_is_said_in_one_line(tmp_path):
    write_sesame(tmp_path / "s", small())
    with pytest.raises(WeightsError, match="names are those of sesame, not of csm-hf") as caught:
        weights.load_checkpoint(tmp_path / "s", layout="csm-hf")
    assert len(caught.value.problems) == 1
    with pytest.raises(ValueError, match="unknown layout 'gguf'"):
        weights.load_checkpoint(tmp_path / "s", layout="gguf")


def test_csm_hf_and_csm_mlx_of_other_hands(tmp_path):
    config, params = small(), params_of(small())
    weights.save_checkpoint(tmp_path / "m", config, params, layout="csm-mlx")
    with pytest.raises(WeightsError, match="asked for, but the file was written as 'csm-mlx'"):
        weights.load_checkpoint(tmp_path / "m", layout="csm-hf")
    file = tmp_path / "m" / "ckpt.safetensors"
    save_file(load_file(file), file)  # drops the note our own exports carry
    with pytest.raises(WeightsError, match="cannot be told apart"):
        weights.load_checkpoint(tmp_path / "m")
    _, right = weights.load_checkpoint(tmp_path / "m", layout="csm-mlx")
    assert_same_bits(tables.flatten(right), tables.flatten(params))
    _, wrong = weights.load_checkpoint(file, layout="csm-hf")
    differ = {
        path.rsplit(".", 1)[1]
        for path, leaf in tables.flatten(wrong).items()
        if np.asarray(leaf).tobytes() != tables.flatten(params)[path].tobytes()
    }
    assert differ == {"q_proj", "k_proj"}


def test_config_is_needed_unless_it_is_csm_1b(tmp_path):
    write_sesame(tmp_path / "s", small())
    (tmp_path / "s" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"there is no config\.json beside it"):
        weights.load_checkpoint(tmp_path / "s" / "model.safetensors")
    config, _ = weights.load_checkpoint(tmp_path / "s" / "model.safetensors", config=small())
    assert config == small()
    for content in ("{", "[]"):
        (tmp_path / "s" / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=r"config\.json"):
            weights.load_checkpoint(tmp_path / "s")


def test_bare_file_of_csm_1b_size(tmp_path, monkeypatch):
    monkeypatch.setattr("csm_jax.config.csm_1b", small)
    write_sesame(tmp_path / "s", small())
    (tmp_path / "s" / "config.json").unlink()
    assert weights.load_checkpoint(tmp_path / "s" / "model.safetensors")[0] == small()


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        weights.load_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"looked for .*ckpt\.pt"):
        weights.load_checkpoint(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(WeightsError, match="unknown kind of file"):
        weights.load_checkpoint(tmp_path / "x.gguf")


def test_layout_chooses_among_the_files_of_the_hub(tmp_path):
    """The hub's directory holds Sesame's file and transformers' index side by side."""
    write_transformers(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "hub" / "t.safetensors")
    names = load_file(tmp_path / "hub" / "t.safetensors")
    index = {"weight_map": dict.fromkeys(names, "t.safetensors")}
    (tmp_path / "hub" / tables.TRANSFORMERS_INDEX_NAME).write_text(json.dumps(index))
    sesame = random_tensors(sesame_shapes(small()), seed=9)
    save_file(sesame, tmp_path / "hub" / "model.safetensors")
    for layout, projection in (
        (None, sesame["projection.weight"]),
        ("sesame", sesame["projection.weight"]),
        ("transformers", names["depth_decoder.model.inputs_embeds_projector.weight"]),
    ):
        _, params = weights.load_checkpoint(tmp_path / "hub", layout=layout)
        np.testing.assert_array_equal(params["decoder"]["projection"], projection)


@pytest.mark.parametrize(
    "damage", ["no metadata", "empty metadata", "no data", "cut data", "renamed"]
)
def test_damaged_orbax(tmp_path, damage):
    weights.save_checkpoint(tmp_path / "o", small(), params_of(small()), layout="orbax")
    params = tmp_path / "o" / "params"
    data = sorted(params.rglob("d/*"), key=lambda file: file.stat().st_size)
    if damage == "no metadata":
        (params / "_METADATA").unlink()
    elif damage == "empty metadata":
        (params / "_METADATA").write_text("")
    elif damage == "renamed":
        text = (params / "_METADATA").read_text()
        (params / "_METADATA").write_text(text.replace("projection", "protection"))
    else:
        keep = 0 if damage == "no data" else data[-1].stat().st_size // 2
        data[-1].write_bytes(data[-1].read_bytes()[:keep])
    expected = r"lists decoder\.protection" if damage == "renamed" else r"/o"
    with pytest.raises((WeightsError, FileNotFoundError), match=expected):
        weights.load_checkpoint(tmp_path / "o")


# --- what may go wrong on the way out ----------------------------------------------------------------


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("exists", [False, True])
def test_interrupted_conversion_leaves_nothing(tmp_path, layout, error, exists):
    write_sesame(tmp_path / "s", small())
    if exists:
        run(tmp_path / "s", tmp_path / "d", layout)
    before = snapshot(tmp_path)
    seen = []

    def progress(count: int, total: int) -> None:
        seen.append(count)
        if len(seen) == 9:
            raise error

    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        run(tmp_path / "s", tmp_path / "d", layout, overwrite=exists, progress=progress)
    assert snapshot(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == (["d", "s"] if exists else ["s"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overwrite_replaces_and_keeps_the_rest(tmp_path, layout):
    old = params_of(small(), seed=1)
    weights.save_checkpoint(tmp_path / "d", small(), old, layout=layout)
    (tmp_path / "d" / "tokenizer.json").write_text("mine")
    new = params_of(small(), seed=2)
    with pytest.raises(FileExistsError, match="already holds"):
        weights.save_checkpoint(tmp_path / "d", small(), new, layout=layout)
    _, read = weights.load_checkpoint(tmp_path / "d", layout=layout)
    assert_same_bits(tables.flatten(read), tables.flatten(old))
    files = weights.save_checkpoint(tmp_path / "d", small(), new, layout=layout, overwrite=True)
    assert sorted(os.listdir(tmp_path / "d")) == sorted(
        [*(f.name for f in files), "tokenizer.json"]
    )
    _, read = weights.load_checkpoint(tmp_path / "d", layout=layout)
    assert_same_bits(tables.flatten(read), tables.flatten(new))


def test_another_checkpoint_is_never_mixed_in(tmp_path):
    weights.save_checkpoint(tmp_path / "d", small(), params_of(small()), layout="orbax")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="already holds"):
            weights.save_checkpoint(
                tmp_path / "d", small(), params_of(small()), layout="sesame", overwrite=overwrite
            )
    assert sorted(os.listdir(tmp_path / "d")) == ["config.json", "params"]


def test_fresh_directories_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    weights.save_checkpoint(tmp_path / "d", small(), params_of(small()), layout="sesame")
    assert (tmp_path / "d").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_destinations_refused_before_any_work(tmp_path, monkeypatch):
    write_sesame(tmp_path / "s", small())
    weights.save_checkpoint(tmp_path / "o", small(), params_of(small()), layout="orbax")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(
        "csm_jax.weights.safetensors_io.read_fully", lambda *a, **k: pytest.fail("read")
    )
    for source, destination, words in (
        ("s", "s", "the source's own directory"),
        ("s/model.safetensors", "s/../s", "the source's own directory"),
        ("o", "o/params/x", "the source's own directory"),
        ("s", "file", "is a file"),
        ("s", "new/model.safetensors", "is a directory, not a file name"),
        ("s", "file/below", "Not a directory|File exists"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            run(tmp_path / source, tmp_path / destination, "csm-hf", overwrite=True)
    monkeypatch.setattr(
        "shutil.disk_usage",
        lambda path: os.statvfs_result((0,) * 10) and type("U", (), {"free": 5}),
    )
    with pytest.raises(OSError, match="bytes are needed, 5 are free"):
        run(tmp_path / "s", tmp_path / "d", "csm-hf")
    assert sorted(os.listdir(tmp_path)) == ["file", "o", "s"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_destination(tmp_path):
    write_sesame(tmp_path / "s", small())
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        run(tmp_path / "s", tmp_path / "locked" / "d", "csm-hf")
