"""Mimi's sizes against the published ones, and both published forms read and written."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import transformers
from moshi.models import loaders

from csm_jax.mimi.config import MimiConfig, mimi, tiny_mimi
from csm_jax.mimi.published import from_moshi, from_transformers, to_moshi, to_transformers
from tests.support.mimi import odd_mimi, small_config


def test_published_sizes():
    config = mimi()
    assert config.samples_per_frame == 1920
    assert config.encoder_stride == 960
    assert config.resample_stride == 2
    assert config.head_dim == 64
    assert config.num_acoustic_codebooks == 31


def test_tiny_keeps_the_published_strides():
    tiny = tiny_mimi()
    same = ("sample_rate", "frame_rate", "ratios", "kernel_size", "context", "num_codebooks")
    assert all(getattr(tiny, name) == getattr(mimi(), name) for name in same)
    assert from_moshi(small_config()) == tiny


def test_loads_without_jax():
    code = "import sys, csm_jax.mimi.published; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A value of another type does not reach the check here: the tests' type checker is in front of it.
INT_FIELDS = [field.name for field in dataclasses.fields(MimiConfig) if field.type == "int"]


@pytest.mark.parametrize("name", INT_FIELDS)
@pytest.mark.parametrize("value", [0, -1, True])
def test_a_size_is_a_positive_integer(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got"):
        dataclasses.replace(mimi(), **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": ()}, "ratios must be a tuple"),
        ({"ratios": (8, 0)}, "ratios must be a tuple"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number"),
        ({"rope_base": float("inf")}, "rope_base must be a positive number"),
        ({"frame_rate": 0}, "frame_rate must be a positive number"),
        ({"num_heads": 7}, "embed_dim=512 must be an even multiple of num_heads=7"),
        ({"num_heads": 512}, "embed_dim=512 must be an even multiple of num_heads=512"),
        ({"compress": 65}, "compress=65 leaves no channels of num_filters=64"),
        ({"num_semantic_codebooks": 32}, "must be less than num_codebooks=32"),
        ({"frame_rate": 25.0}, "960 samples per frame, which must be twice or more whole times"),
        ({"frame_rate": 10.0}, "2400 samples per frame"),
        ({"ratios": (8, 6, 5, 3)}, r"1920 samples per frame.* 720, the product of ratios"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(mimi(), **changes)


def test_every_bad_field_is_named_at_once():
    with pytest.raises(ValueError, match=r"2 problems\n  - num_filters .*\n  - context ") as caught:
        dataclasses.replace(mimi(), num_filters=0, context=-1)
    assert str(caught.value).startswith("MimiConfig: ")


# --- moshi ---


def test_moshi_published_form():
    assert to_moshi(mimi()) == loaders._mimi_config
    assert from_moshi(loaders._mimi_config) == mimi()


@pytest.mark.parametrize("config", [mimi(), tiny_mimi(), odd_mimi()])
def test_moshi_round_trip_through_json(config):
    assert from_moshi(json.loads(json.dumps(to_moshi(config)))) == config


def test_moshi_has_no_place_for_norm_eps():
    with pytest.raises(ValueError, match=r"no norm_eps: it is always 1e-05, not 1e-06"):
        to_moshi(dataclasses.replace(mimi(), norm_eps=1e-6))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "channels", 2, "channels=2 is not supported: it must be 1"),
        (None, "sample_rate", "24k", "sample_rate must be a positive integer, got '24k'"),
        (None, "bandwidth", 1, "bandwidth=1 is not known"),
        (None, "quantizer", None, "quantizer=None is not an object"),
        ("seanet", "causal", False, "seanet.causal=False is not supported"),
        ("seanet", "activation", "ReLU", "seanet.activation='ReLU' is not supported"),
        ("seanet", "activation_params", {"alpha": 0.5}, "seanet.activation_params="),
        ("seanet", "norm", "weight_norm", "seanet.norm='weight_norm' is not supported"),
        ("seanet", "pad_mode", "reflect", "seanet.pad_mode='reflect' is not supported"),
        ("seanet", "true_skip", False, "seanet.true_skip=False is not supported"),
        ("seanet", "n_lstm", 2, "seanet.n_lstm=2 is not known"),
        ("seanet", "ratios", 8, "ratios must be a tuple of positive integers, got 8"),
        ("transformer", "causal", False, "transformer.causal=False is not supported"),
        ("transformer", "gating", "silu", "transformer.gating='silu' is not supported"),
        ("transformer", "norm", "rms_norm", "transformer.norm='rms_norm' is not supported"),
        ("transformer", "positional_embedding", "sin", "positional_embedding='sin'"),
        ("transformer", "kv_repeat", 2, "transformer.kv_repeat=2 is not supported"),
        ("transformer", "layer_scale", None, "transformer.layer_scale is missing"),
        ("transformer", "d_model", 256, "transformer.d_model=256 must be seanet.dimension=512"),
        ("transformer", "output_dimensions", [512, 512], "transformer.output_dimensions="),
        ("quantizer", "input_dimension", 256, "quantizer.input_dimension=256 must be"),
    ],
)
def test_moshi_refuses_what_is_not_computed(section, key, value, message):
    data = copy.deepcopy(loaders._mimi_config)
    (data[section] if section else data)[key] = value
    with pytest.raises(ValueError, match="moshi's configuration") as caught:
        from_moshi(data)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        (None, "channels", "channels is missing; only 1 is supported"),
        (None, "seanet", "seanet=None is not an object"),
        ("seanet", "ratios", "seanet.ratios is missing"),
        # moshi's own defaults of absent keys
        ("seanet", "causal", "seanet.causal=False is not supported"),
        ("seanet", "pad_mode", "seanet.pad_mode='reflect' is not supported"),
        ("transformer", "positional_embedding", "positional_embedding='sin' is not supported"),
        ("transformer", "context", "transformer.context is missing"),
        ("quantizer", "bins", "quantizer.bins is missing"),
    ],
)
def test_moshi_missing_keys(section, key, message):
    data = copy.deepcopy(loaders._mimi_config)
    del (data[section] if section else data)[key]
    with pytest.raises(ValueError, match="moshi's configuration") as caught:
        from_moshi(data)
    assert message in str(caught.value)


def test_moshi_lists_everything():
    data = copy.deepcopy(loaders._mimi_config)
    data["seanet"].update(causal=False, n_lstm=2)
    del data["transformer"]["num_layers"]
    data["quantizer"]["bins"] = "2048"
    with pytest.raises(ValueError, match="4 problems") as caught:
        from_moshi(data)
    for word in ("seanet.causal", "seanet.n_lstm", "transformer.num_layers", "codebook_size"):
        assert word in str(caught.value)


def test_moshi_training_keys_are_ignored():
    data = copy.deepcopy(loaders._mimi_config)
    data["quantizer"].update(q_dropout=True, no_quantization_rate=0.5)
    data["transformer"].update(layer_scale=0.3, checkpointing=True)
    assert from_moshi(data) == mimi()


# --- transformers ---


def test_transformers_default_is_the_published_mimi():
    assert from_transformers(transformers.MimiConfig().to_dict()) == mimi()
    assert from_transformers({}) == mimi()  # keys with their default value may be absent
    built = transformers.MimiConfig(**to_transformers(mimi())).to_dict()
    default = transformers.MimiConfig().to_dict()
    # Only these two differ: we say the frame rate, and the class that the weights are for.
    different = {key for key in built | default if built.get(key) != default.get(key)}
    assert different == {"_frame_rate", "architectures"}
    assert built["_frame_rate"] == transformers.MimiConfig().frame_rate


def test_transformers_codec_of_a_csm():
    assert from_transformers(transformers.CsmConfig().to_dict()["codec_config"]) == mimi()


def test_transformers_4_form():
    """Theta and the frame rate stood by themselves (kyutai/mimi's config.json)."""
    data = to_transformers(mimi())
    del data["rope_parameters"]
    assert (data["rope_theta"], data["frame_rate"]) == (10_000.0, 12.5)
    assert from_transformers(data) == mimi()
    assert from_transformers({**data, "rope_theta": 500}).rope_base == 500.0


@pytest.mark.parametrize(
    "config",
    # (Where frames are 4 latents long, transformers has to be told so.)
    [mimi(), tiny_mimi(), odd_mimi(), dataclasses.replace(mimi(), frame_rate=6.25)],
)
def test_transformers_round_trip(config):
    assert from_transformers(json.loads(json.dumps(to_transformers(config)))) == config
    theirs = transformers.MimiConfig(**to_transformers(config))
    assert from_transformers(theirs.to_dict()) == config
    assert theirs.frame_rate == config.frame_rate
    assert theirs.latent_stride == config.resample_stride


@pytest.mark.parametrize("write", [to_moshi, to_transformers])
def test_every_field_is_written(write):
    """A field that one form dropped would come back as it was published."""
    read = {to_moshi: from_moshi, to_transformers: from_transformers}[write]
    odd, published = odd_mimi(), mimi()
    for field in dataclasses.fields(MimiConfig):
        if field.name not in ("sample_rate", "norm_eps"):
            assert getattr(odd, field.name) != getattr(published, field.name), field.name
    assert read(write(odd)) == odd
    faster = dataclasses.replace(published, sample_rate=48_000, frame_rate=25.0)
    assert read(write(faster)) == faster


def test_transformers_keeps_norm_eps():
    config = dataclasses.replace(mimi(), norm_eps=1e-6)
    assert from_transformers(to_transformers(config)) == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "encodec", "model_type='encodec' is not supported: it must be 'mimi'"),
        ("audio_channels", 2, "audio_channels=2"),
        ("use_causal_conv", False, "use_causal_conv=False"),
        ("pad_mode", "reflect", "pad_mode='reflect'"),
        ("trim_right_ratio", 0.5, "trim_right_ratio=0.5"),
        ("use_conv_shortcut", True, "use_conv_shortcut=True"),
        ("hidden_act", "silu", "hidden_act='silu'"),
        ("attention_bias", True, "attention_bias=True"),
        ("num_key_value_heads", 4, "num_key_value_heads=4 is not supported: it must be 8"),
        ("upsample_groups", 1, "upsample_groups=1 is not supported: it must be 512"),
        ("hidden_size", 256, "upsample_groups=512 is not supported: it must be 256"),
        ("head_dim", 32, "head_dim=32 is not hidden_size / num_attention_heads"),
        ("vector_quantization_hidden_dimension", 128, "it must be 256"),
        ("codebook_dim", 512, "quantizer has no projections"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_type='yarn' is not supported"),
        ("rope_parameters", 5, "rope_parameters=5 is not an object"),
        ("encoder_config", None, "encoder_config=None"),
        ("decoder_config", None, "decoder_config=None"),
        ("upsampling_ratios", "8654", "ratios must be a tuple of positive integers"),
        ("upsampling_ratios", [0], "ratios must be a tuple of positive integers"),
        ("sampling_rate", "24k", "sample_rate must be a positive integer, got '24k'"),
    ],
)
def test_transformers_refuses_what_is_not_computed(key, value, message):
    with pytest.raises(ValueError, match="transformers' configuration") as caught:
        from_transformers({**transformers.MimiConfig().to_dict(), key: value})
    assert message in str(caught.value)


def test_transformers_lists_everything():
    with pytest.raises(ValueError, match=r"transformers' configuration: 2 problems"):
        from_transformers({"pad_mode": "reflect", "hidden_act": "relu"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_dim": 512}, "codebook_dim=512 equals embed_dim"),
        ({"codebook_size": 1000}, "codebook_size=1000 must be a power of 2"),
    ],
)
def test_transformers_cannot_build_every_config(changes, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(dataclasses.replace(mimi(), **changes))
