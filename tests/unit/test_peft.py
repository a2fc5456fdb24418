"""Adapters in PEFT's format, and adapted models in every layout."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from csm_jax import weights
from csm_jax.array_typing import Params
from csm_jax.config import CSMConfig, to_transformers
from csm_jax.model import forward, init_params
from csm_jax.train.lora import LoraConfig, apply_lora, init_lora, merge_lora
from csm_jax.train.peft import load_adapters, save_adapters
from csm_jax.weights import WeightsError
from csm_jax.weights.tables import flatten
from tests.support.checkpoints import assert_same_bits, small

LORA = LoraConfig(rank=4, alpha=6.0)
FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
CODEC = "base_model.model.codec_model.encoder_transformer.layers.0.self_attn.q_proj"


@functools.cache
def model_of(tied: bool = True) -> tuple[CSMConfig, Params]:
    config = small(tied=tied)
    return config, init_params(config, jax.random.key(0), dtype=jnp.float32)


def adapters_of(config: CSMConfig, lora: LoraConfig = LORA) -> Params:
    """Returns adapters that change every projection by about as much as it is."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape).astype(np.float32)),
        init_lora(config, lora, jax.random.key(1)),
    )


def modules(config: CSMConfig) -> dict[str, tuple[int, int]]:
    """Returns transformers' names of the adapted layers, and their shapes, written out by hand."""
    found = {}
    for prefix, sizes in (
        ("backbone_model", config.backbone),
        ("depth_decoder.model", config.decoder),
    ):
        dim, mlp = sizes.embed_dim, sizes.intermediate_dim
        queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        for i in range(sizes.num_layers):
            found |= {
                f"{prefix}.layers.{i}.{name}": shape
                for name, shape in {
                    "self_attn.q_proj": (queries, dim),
                    "self_attn.k_proj": (keys, dim),
                    "self_attn.v_proj": (keys, dim),
                    "self_attn.o_proj": (dim, queries),
                    "mlp.gate_proj": (mlp, dim),
                    "mlp.up_proj": (mlp, dim),
                    "mlp.down_proj": (dim, mlp),
                }.items()
            }
    return found


def conversation(config: CSMConfig) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    frames = np.zeros((2, 7, config.num_codebooks + 1), np.int32)
    mask = np.zeros(frames.shape, bool)
    frames[:, :3, -1] = rng.integers(0, config.text_vocab_size, (2, 3))
    mask[:, :3, -1] = True
    frames[:, 3:, :-1] = rng.integers(0, config.codebook_size, (2, 4, config.num_codebooks))
    mask[:, 3:, :-1] = True
    return frames, mask


def our_scores(config: CSMConfig, params: Params) -> tuple[np.ndarray, np.ndarray]:
    c0, decoder = jax.jit(forward, static_argnames="config")(
        params, *map(jnp.asarray, conversation(config)), config=config
    )
    return np.asarray(c0), np.asarray(decoder)


def their_scores(model: torch.nn.Module, config: CSMConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns what transformers' model, or PEFT's around it, makes of the conversation."""
    frames, mask = (torch.from_numpy(each) for each in conversation(config))
    frames = frames.long()
    with torch.inference_mode():
        text = model.embed_text_tokens(frames[..., -1])
        audio = model.backbone_model.embed_tokens(frames[..., :-1])
        hidden = model.backbone_model(
            inputs_embeds=torch.where(mask[..., -1:], text, audio), use_cache=False
        ).last_hidden_state
        codes = torch.nn.functional.pad(frames[:, 1:, : config.num_codebooks - 1], (1, 0))
        rest = model.depth_decoder(
            input_ids=codes.flatten(0, 1),
            backbone_last_hidden_state=hidden[:, :-1].flatten(0, 1),
            use_cache=True,  # as in tests/parity/reference/transformers.py
        ).logits
        c0 = model.lm_head(hidden)
    return c0.numpy(), rest.unflatten(0, (2, frames.shape[1] - 1)).numpy()


def tiny_codec() -> dict[str, object]:
    return {
        "model_type": "mimi", "hidden_size": 16, "num_filters": 2, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16,
        "codebook_size": 8, "codebook_dim": 8, "num_quantizers": 32,
        "vector_quantization_hidden_dimension": 8, "upsample_groups": 16,
    }  # fmt: skip


def transformers_model(directory: Path, config: CSMConfig, params: Params) -> torch.nn.Module:
    """Returns transformers' model over a checkpoint of ours."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    weights.save_checkpoint(directory, config, params, layout="transformers")
    theirs = CsmConfig(**{**to_transformers(config), "codec_config": tiny_codec()})
    model = CsmForConditionalGeneration.from_pretrained(
        directory, config=theirs, attn_implementation="eager"
    )
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_peft(tmp_path, tied):
    config, _ = model_of(tied)
    files = save_adapters(tmp_path / "a", config, LORA, adapters_of(config), base_model="x/y")
    assert sorted(file.name for file in files) == sorted([FILE, SETTINGS])
    tensors = load_file(tmp_path / "a" / FILE)
    want = {}
    for name, (out, into) in modules(config).items():
        want[f"base_model.model.{name}.lora_A.weight"] = (4, into)
        want[f"base_model.model.{name}.lora_B.weight"] = (out, 4)
    assert {name: array.shape for name, array in tensors.items()} == want
    settings = json.loads((tmp_path / "a" / SETTINGS).read_text())
    assert sorted(settings["target_modules"]) == sorted(modules(config))
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 6, "LORA")
    assert settings["base_model_name_or_path"] == "x/y"


@pytest.mark.parametrize(
    "lora",
    [LORA, LoraConfig(rank=3, alpha=0.5, targets=("o_proj", "w_up"), trunks=("decoder",))],
    ids=["all", "some"],
)
def test_round_trip(tmp_path, lora):
    config, _ = model_of()
    adapters = adapters_of(config, lora)
    save_adapters(tmp_path / "a", config, lora, adapters)
    again, loaded = load_adapters(tmp_path / "a", config)
    assert again == lora
    assert_same_bits(flatten(loaded), flatten(adapters))


def test_adapters_are_not_replaced_unasked(tmp_path):
    config, _ = model_of()
    adapters = adapters_of(config)
    save_adapters(tmp_path / "a", config, LORA, adapters)
    with pytest.raises(FileExistsError, match=r"already holds adapter_model\.safetensors"):
        save_adapters(tmp_path / "a", config, LORA, adapters)
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    save_adapters(tmp_path / "a", config, LORA, zeros, overwrite=True)
    assert not any(x.any() for x in jax.tree.leaves(load_adapters(tmp_path / "a", config)[1]))
    with pytest.raises(ValueError, match=r"has shape \[4, .*expected \[8, "):
        save_adapters(tmp_path / "b", config, LoraConfig(rank=8), adapters)
    assert not (tmp_path / "b").exists()


def rewrite(directory: Path, tensors: dict[str, np.ndarray], **changes: object) -> Path:
    settings = json.loads((directory / SETTINGS).read_text())
    (directory / SETTINGS).write_text(json.dumps({**settings, **changes}))
    save_file({**load_file(directory / FILE), **tensors}, directory / FILE)
    return directory


def test_everything_wrong_is_told_at_once(tmp_path):
    config, _ = model_of()
    save_adapters(tmp_path / "a", config, LORA, adapters_of(config))
    tensors = load_file(tmp_path / "a" / FILE)
    layer = "base_model.model.backbone_model.layers.0"
    del tensors[f"{layer}.self_attn.q_proj.lora_A.weight"]
    tensors[f"{layer}.mlp.up_proj.lora_B.weight"] = np.zeros((4, 5), np.float32)
    tensors[f"{layer}.mlp.up_proj.lora_A.weight"] = np.zeros((4, 24), np.float64)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 24), np.float32)
    save_file(tensors, tmp_path / "a" / FILE)
    with pytest.raises(WeightsError) as raised:
        load_adapters(tmp_path / "a", config)
    assert sorted(raised.value.problems) == [
        "extra tensor base_model.model.lm_head.lora_A.weight float32[4, 24]",
        f"missing tensor {layer}.self_attn.q_proj.lora_A.weight",
        f"tensor {layer}.mlp.up_proj.lora_A.weight has dtype float64, expected one of float32, "
        "bfloat16, float16",
        f"tensor {layer}.mlp.up_proj.lora_B.weight has shape [4, 5], expected [40, 4]",
    ]


def test_other_kinds_of_adapters_are_refused(tmp_path):
    config, _ = model_of()
    save_adapters(tmp_path / "a", config, LORA, adapters_of(config))
    rewrite(
        tmp_path / "a", {}, r=0, lora_alpha="much", use_dora=True, bias="all", peft_type="IA3",
        rank_pattern={"q_proj": 8}, init_lora_weights="pissa", modules_to_save=["lm_head"],
    )  # fmt: skip
    with pytest.raises(WeightsError) as raised:
        load_adapters(tmp_path / "a", config)
    told = " ".join(raised.value.problems)
    assert len(raised.value.problems) == 8
    for word in ("r is 0", "'much'", "use_dora", "bias", "IA3", "rank_pattern", "pissa", "lm_head"):
        assert word in told


def test_missing_and_damaged_files(tmp_path):
    config, _ = model_of()
    with pytest.raises(FileNotFoundError):
        load_adapters(tmp_path, config)
    save_adapters(tmp_path / "a", config, LORA, adapters_of(config))
    (tmp_path / "a" / SETTINGS).write_text("[1]")
    with pytest.raises(WeightsError, match="JSON object"):
        load_adapters(tmp_path / "a", config)


def test_adapters_of_the_codec_count_once_they_do_something(tmp_path):
    config, _ = model_of()
    adapters = adapters_of(config)
    save_adapters(tmp_path / "a", config, LORA, adapters)
    idle = {
        f"{CODEC}.lora_A.weight": np.ones((4, 16), np.float32),
        f"{CODEC}.lora_B.weight": np.zeros((16, 4), np.float32),
    }
    rewrite(tmp_path / "a", idle)
    assert_same_bits(flatten(load_adapters(tmp_path / "a", config)[1]), flatten(adapters))
    idle[f"{CODEC}.lora_B.weight"][3, 1] = 1e-3
    rewrite(tmp_path / "a", idle)
    with pytest.raises(WeightsError, match=r"lora_B.weight changes the codec"):
        load_adapters(tmp_path / "a", config)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_narrow_adapters_are_widened(tmp_path, kind):
    config, _ = model_of()
    save_adapters(tmp_path / "a", config, LORA, adapters_of(config))
    dtype = jnp.dtype(kind)
    rewrite(
        tmp_path / "a",
        {name: x.astype(dtype) for name, x in load_file(tmp_path / "a" / FILE).items()},
    )
    loaded = load_adapters(tmp_path / "a", config)[1]
    want = jax.tree.map(
        lambda x: np.asarray(x).astype(dtype).astype(np.float32), adapters_of(config)
    )
    assert_same_bits(flatten(loaded), flatten(want))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_scores_merged_weights_as_we_do(tmp_path, tied):
    config, params = model_of(tied)
    adapters = adapters_of(config)
    ours = our_scores(config, apply_lora(params, adapters, LORA))
    merged = merge_lora(params, adapters, LORA, dtype=None)
    theirs = their_scores(transformers_model(tmp_path / "hf", config, merged), config)
    for one, other, before in zip(ours, theirs, our_scores(config, params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
        assert np.abs(one - before).max() > 0.1


@pytest.mark.parametrize("layout", ["sesame", "csm-hf", "csm-mlx", "orbax", "transformers"])
def test_merged_weights_survive_every_layout(tmp_path, layout):
    config, params = model_of()
    merged = merge_lora(params, adapters_of(config), LORA, dtype=None)
    weights.save_checkpoint(tmp_path / "x", config, merged, layout=layout)
    again, loaded = weights.load_checkpoint(tmp_path / "x", layout=layout)
    assert again == config
    assert_same_bits(flatten(loaded), flatten(merged))


@pytest.fixture
def peft(monkeypatch):
    peft = pytest.importorskip("peft")
    # It refuses the old torchao that torchtune, another reference, needs; nothing here is of torchao.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    return peft


@pytest.mark.filterwarnings("ignore")
def test_peft_scores_our_adapters_as_we_do(tmp_path, peft):
    config, params = model_of()
    adapters = adapters_of(config)
    save_adapters(tmp_path / "a", config, LORA, adapters)
    base = transformers_model(tmp_path / "hf", config, params)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    touched = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    assert len(touched) == len(modules(config))
    ours = our_scores(config, apply_lora(params, adapters, LORA))
    for one, other in zip(ours, their_scores(model.base_model.model, config), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    lora, loaded = load_adapters(tmp_path / "again", config)
    assert lora == LORA
    assert_same_bits(flatten(loaded), flatten(adapters))


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_peft_made_by_bare_names_are_read(tmp_path, peft):
    config, params = model_of()
    base = transformers_model(tmp_path / "hf", config, params)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if "lora_B" in name and "codec_model" not in name:
            torch.nn.init.normal_(tensor, std=0.2)
    model.eval().save_pretrained(tmp_path / "a")
    assert any("codec_model" in name for name in load_file(tmp_path / "a" / FILE))
    lora, adapters = load_adapters(tmp_path / "a", config)
    assert (lora.targets, lora.trunks) == (("q_proj", "w_down"), ("backbone", "decoder"))
    ours = our_scores(config, apply_lora(params, adapters, lora))
    for one, other in zip(ours, their_scores(model.base_model.model, config), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
