from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CsmConfig

from csm_jax import config as csm_config
from csm_jax.config import CSMConfig, from_published, read_config, to_sesame, to_transformers
from csm_jax.llama import rope_frequencies
from csm_jax.model import num_params

PRESETS = (csm_config.csm_1b, csm_config.tiny, csm_config.miso_tts_8b, csm_config.marvis_250m)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_both_published_forms(preset: Any) -> None:
    config = preset()
    assert from_published(json.loads(json.dumps(to_sesame(config)))) == config
    assert from_published(json.loads(json.dumps(to_transformers(config)))) == config


def test_the_published_file_of_csm_1b_is_the_preset() -> None:
    published = {
        "audio_num_codebooks": 32,
        "audio_vocab_size": 2051,
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
        "text_vocab_size": 128256,
    }
    assert from_published(published) == csm_config.csm_1b()
    assert to_sesame(csm_config.csm_1b()) == published


@pytest.mark.parametrize(
    ("original", "low", "high"), [(1024, 0.125, 0.5), (16, 0.001953125, 0.0078125), (8192, 1, 4)]
)
def test_transformers_rope_numbers_are_the_same_rope(
    original: int, low: float, high: float
) -> None:
    data = to_transformers(csm_config.csm_1b())
    for part in (data, data["depth_decoder_config"]):
        part["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        del part["rope_parameters"]  # the 4.52 form
    assert from_published(data) == csm_config.csm_1b()


def test_transformers_itself_reads_what_is_written() -> None:
    config = csm_config.tiny()
    data = to_transformers(config) | {"codec_config": {"codebook_size": config.codebook_size}}
    theirs = CsmConfig(**{key: data[key] for key in data if key != "architectures"})
    assert theirs.rope_parameters["rope_theta"] == config.backbone.rope_base
    assert theirs.depth_decoder_config.head_dim == config.decoder.head_dim
    assert from_published(theirs.to_dict()) == config


def test_parameter_counts_are_the_published_ones() -> None:
    assert num_params(csm_config.csm_1b()) == 1_552_791_552  # the size of model.safetensors / 4


def test_rope_scaling_slows_only_long_wavelengths() -> None:
    sizes = csm_config.csm_1b().backbone
    unscaled = dataclasses.replace(sizes, scale_factor=1.0)
    ratio = rope_frequencies(unscaled) / rope_frequencies(sizes)
    wavelengths = 2 * np.pi / rope_frequencies(unscaled)
    np.testing.assert_allclose(ratio[wavelengths < 8192 / 4], 1.0)
    np.testing.assert_allclose(ratio[wavelengths > 8192], 32.0, rtol=1e-6)
    assert 1 < ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)].max() < 32


def bad(change: Any) -> dict[str, Any]:
    data = to_transformers(csm_config.tiny())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("hidden_size"), "hidden_size"),
        (lambda d: d.update(mlp_bias=True), "mlp_bias"),
        (lambda d: d.update(hidden_act="gelu"), "hidden_act"),
        (lambda d: d["rope_parameters"].update(rope_type="default"), "rope_type"),
        (lambda d: d["depth_decoder_config"].update(num_codebooks=8), "num_codebooks"),
        (lambda d: d["depth_decoder_config"].update(backbone_hidden_size=8), "hidden_size"),
        (lambda d: d.update(num_key_value_heads=3), "num_kv_heads"),
        (lambda d: d.update(num_hidden_layers=0), "num_layers"),
    ],
)
def test_contradictions_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_published(bad(change))


def test_unknown_files_and_flavours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither Sesame's"):
        from_published({"model_type": "llama"})
    sesame = to_sesame(csm_config.csm_1b()) | {"backbone_flavor": "llama-3B"}
    with pytest.raises(ValueError, match="unknown flavour 'llama-3B'"):
        from_published(sesame)
    path = tmp_path / "config.json"
    path.write_text('{"backbone_flavor": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        read_config(tmp_path)


def test_an_untied_model_has_no_sesame_form() -> None:
    untied: CSMConfig = dataclasses.replace(csm_config.tiny(), tie_codebooks_embeddings=False)
    with pytest.raises(ValueError, match="tie_codebooks_embeddings"):
        to_sesame(untied)
    assert from_published(to_transformers(untied)) == untied
