"""The two published forms of Mimi's configuration, read and written.

What a form says besides the fields of `MimiConfig` is either fixed in this implementation, and
refused when it differs, or matters in training alone, and ignored.

Sources: kyutai-labs/moshi `moshi/models/loaders.py` (`_mimi_config`) and the constructors it is
handed to, transformers `configuration_mimi.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csm_jax.mimi.config import (
    FIELD_KINDS,
    MimiConfig,
    field_problems,
    is_number,
    is_size,
    listed,
)

# The published files give the layer scales' initial value (MimiConfig of transformers, moshi's
# `layer_scale`); the trained scales are weights, so reading ignores it and writing repeats it.
_LAYER_SCALE_INIT = 0.01
_MOSHI_NORM_EPS = 1e-5  # torch's default for LayerNorm; moshi's form has no place for another
_MISSING: Any = object()


@dataclass(frozen=True)
class _Fixed:
    """A key that this implementation knows one value of.

    Attributes:
        value: The value computed here.
        default: What the format's own code takes when the key is absent.
    """

    value: Any
    default: Any


# In moshi's code an absent key means its classes' default, which is often not Mimi's value.
_MOSHI_FIXED: Mapping[str, Mapping[str, _Fixed]] = {
    "": {"channels": _Fixed(1, _MISSING)},
    "seanet": {
        "channels": _Fixed(1, 1),
        "causal": _Fixed(True, False),
        "activation": _Fixed("ELU", "ELU"),
        "activation_params": _Fixed({"alpha": 1.0}, {"alpha": 1.0}),
        "norm": _Fixed("none", "none"),
        "pad_mode": _Fixed("constant", "reflect"),
        "true_skip": _Fixed(True, True),
    },
    "quantizer": {},
    "transformer": {
        "causal": _Fixed(True, False),
        "conv_layout": _Fixed(True, False),
        "gating": _Fixed("none", "none"),
        "norm": _Fixed("layer_norm", "layer_norm"),
        "positional_embedding": _Fixed("rope", "sin"),
        "kv_repeat": _Fixed(1, 1),
        "weights_per_step": _Fixed(0, 0),
        "cross_attention": _Fixed(False, False),
        "skip_self_attn": _Fixed(False, False),
        "quantize": _Fixed(False, False),
        "positional_scale": _Fixed(1.0, 1.0),
    },
}

# Keys of training, of parametrisations already folded into the weights, or without effect here.
_MOSHI_IGNORED: Mapping[str, frozenset[str]] = {
    "": frozenset({"seanet", "quantizer", "transformer"}),
    "seanet": frozenset({"disable_norm_outer_blocks", "norm_params"}),
    "quantizer": frozenset(
        {
            "q_dropout",
            "no_quantization_rate",
            "decay",
            "threshold_usage_ratio",
            "replaced_usage_ratio",
        }
    ),
    "transformer": frozenset({"layer_scale", "checkpointing", "betas"}),
}

# Our field -> (section, key), every key required.
_MOSHI_FIELDS: Mapping[str, tuple[str, str]] = {
    "sample_rate": ("", "sample_rate"),
    "frame_rate": ("", "frame_rate"),
    "num_filters": ("seanet", "n_filters"),
    "ratios": ("seanet", "ratios"),
    "num_residual_layers": ("seanet", "n_residual_layers"),
    "dilation_growth": ("seanet", "dilation_base"),
    "compress": ("seanet", "compress"),
    "kernel_size": ("seanet", "kernel_size"),
    "residual_kernel_size": ("seanet", "residual_kernel_size"),
    "last_kernel_size": ("seanet", "last_kernel_size"),
    "embed_dim": ("seanet", "dimension"),
    "num_layers": ("transformer", "num_layers"),
    "num_heads": ("transformer", "num_heads"),
    "intermediate_dim": ("transformer", "dim_feedforward"),
    "context": ("transformer", "context"),
    "rope_base": ("transformer", "max_period"),
    "num_codebooks": ("quantizer", "n_q"),
    "codebook_size": ("quantizer", "bins"),
    "codebook_dim": ("quantizer", "dimension"),
}

# Other keys that repeat the width of the latents.
_MOSHI_WIDTHS = (
    ("quantizer", "input_dimension"),
    ("quantizer", "output_dimension"),
    ("transformer", "d_model"),
    ("transformer", "input_dimension"),
)


def from_moshi(data: Mapping[str, Any]) -> MimiConfig:
    """Returns the config described by moshi's form (`loaders._mimi_config`, as parsed JSON).

    Raises:
        ValueError: Everything that is missing, unknown, or not computed by this implementation.
    """
    sections, problems = _moshi_sections(data)
    if problems:
        raise ValueError(listed("moshi's configuration", problems))
    for section, fixed in _MOSHI_FIXED.items():
        problems += _fixed_problems(sections[section], fixed, section)
    values: dict[str, Any] = {"norm_eps": _MOSHI_NORM_EPS}
    for field, (section, key) in _MOSHI_FIELDS.items():
        if key in sections[section]:
            values[field] = sections[section][key]
        else:
            problems.append(f"{_dotted(section, key)} is missing")
    values["num_semantic_codebooks"] = sections["quantizer"].get("n_q_semantic", 1)
    width = values.get("embed_dim")
    problems += [
        f"{_dotted(section, key)}={sections[section].get(key)!r} must be seanet.dimension={width!r}"
        for section, key in _MOSHI_WIDTHS
        if sections[section].get(key) != width
    ]
    outputs = sections["transformer"].get("output_dimensions")
    if not isinstance(outputs, Sequence) or list(outputs) != [width]:
        problems.append(
            f"transformer.output_dimensions={outputs!r} must be [seanet.dimension]=[{width!r}]"
        )
    if not is_number(sections["transformer"].get("layer_scale")):
        problems.append("transformer.layer_scale is missing: only layers with scales are supported")
    problems += _moshi_unknown(sections)
    return _build(values, problems, "moshi's configuration")


def _moshi_sections(data: Mapping[str, Any]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    sections: dict[str, Mapping[str, Any]] = {"": data}
    problems = []
    for name in ("seanet", "quantizer", "transformer"):
        section = data.get(name)
        if isinstance(section, Mapping):
            sections[name] = section
        else:
            problems.append(f"{name}={section!r} is not an object")
    return sections, problems


def _moshi_unknown(sections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    # moshi hands every key to a constructor, so a key unknown here may change what it computes.
    known = {name: set(_MOSHI_FIXED[name]) | _MOSHI_IGNORED[name] for name in sections}
    for section, key in (*_MOSHI_FIELDS.values(), *_MOSHI_WIDTHS):
        known[section].add(key)
    known["transformer"].add("output_dimensions")
    known["quantizer"].add("n_q_semantic")
    return [
        f"{_dotted(name, key)}={section[key]!r} is not known"
        for name, section in sections.items()
        for key in section
        if key not in known[name]
    ]


def to_moshi(config: MimiConfig) -> dict[str, Any]:
    """Returns moshi's form: the arguments of its constructors, for `loaders.get_mimi`.

    Raises:
        ValueError: moshi has no place for this `norm_eps`.
    """
    if config.norm_eps != _MOSHI_NORM_EPS:
        raise ValueError(
            f"moshi's configuration has no norm_eps: it is always {_MOSHI_NORM_EPS}, "
            f"not {config.norm_eps}"
        )
    width = config.embed_dim
    data: dict[str, Any] = {"channels": 1}
    data["seanet"] = {
        key: fixed.value
        for key, fixed in _MOSHI_FIXED["seanet"].items()
        if key != "activation_params"
    } | {"disable_norm_outer_blocks": 0}
    data["quantizer"] = {"input_dimension": width, "output_dimension": width}
    data["transformer"] = {
        "d_model": width,
        "causal": True,
        "layer_scale": _LAYER_SCALE_INIT,
        "conv_layout": True,
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "input_dimension": width,
        "output_dimensions": [width],
    }
    if config.num_semantic_codebooks != 1:
        data["quantizer"]["n_q_semantic"] = config.num_semantic_codebooks
    for field, (section, key) in _MOSHI_FIELDS.items():
        value = getattr(config, field)
        (data[section] if section else data)[key] = list(value) if field == "ratios" else value
    return data


# Our field -> (key, default): transformers leaves keys out of a file where they are its defaults.
_TRANSFORMERS_FIELDS: Mapping[str, tuple[str, Any]] = {
    "sample_rate": ("sampling_rate", 24_000),
    "num_filters": ("num_filters", 64),
    "ratios": ("upsampling_ratios", (8, 6, 5, 4)),
    "num_residual_layers": ("num_residual_layers", 1),
    "dilation_growth": ("dilation_growth_rate", 2),
    "compress": ("compress", 2),
    "kernel_size": ("kernel_size", 7),
    "residual_kernel_size": ("residual_kernel_size", 3),
    "last_kernel_size": ("last_kernel_size", 3),
    "embed_dim": ("hidden_size", 512),
    "num_layers": ("num_hidden_layers", 8),
    "num_heads": ("num_attention_heads", 8),
    "intermediate_dim": ("intermediate_size", 2048),
    "context": ("sliding_window", 250),
    "norm_eps": ("norm_eps", 1e-5),
    "num_codebooks": ("num_quantizers", 32),
    "num_semantic_codebooks": ("num_semantic_quantizers", 1),
    "codebook_size": ("codebook_size", 2048),
    "codebook_dim": ("codebook_dim", 256),
}

_TRANSFORMERS_FIXED: Mapping[str, _Fixed] = {
    "model_type": _Fixed("mimi", "mimi"),
    "audio_channels": _Fixed(1, 1),
    "use_causal_conv": _Fixed(True, True),
    "pad_mode": _Fixed("constant", "constant"),
    "trim_right_ratio": _Fixed(1.0, 1.0),
    "use_conv_shortcut": _Fixed(False, False),
    "hidden_act": _Fixed("gelu", "gelu"),
    "attention_bias": _Fixed(False, False),
}

# Written for readers' sake; the values are those of transformers' own default.
_TRANSFORMERS_WRITTEN: Mapping[str, Any] = {
    "architectures": ["MimiModel"],
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_scale_initial_scale": _LAYER_SCALE_INIT,
    "max_position_embeddings": 8000,
    "use_cache": False,
    "use_streaming": False,
}


def from_transformers(data: Mapping[str, Any]) -> MimiConfig:
    """Returns the config described by transformers' form: a Mimi's `config.json`, or the
    `codec_config` of a CSM's.

    Absent keys have transformers' default, as it leaves those out when it saves.

    Raises:
        ValueError: Everything that is not computed by this implementation.
    """
    values: dict[str, Any] = {
        field: data.get(key, default) for field, (key, default) in _TRANSFORMERS_FIELDS.items()
    }
    width, heads = values["embed_dim"], values["num_heads"]
    fixed = {
        **_TRANSFORMERS_FIXED,
        "num_key_value_heads": _Fixed(heads, 8),
        # Depthwise, as many groups as channels.
        "upsample_groups": _Fixed(width, 512),
        "vector_quantization_hidden_dimension": _Fixed(values["codebook_dim"], 256),
    }
    problems = _fixed_problems(data, fixed, "")
    head_dim = data.get("head_dim")
    if head_dim is not None and not (
        is_size(head_dim) and is_size(heads) and head_dim * heads == width
    ):
        problems.append(f"head_dim={head_dim!r} is not hidden_size / num_attention_heads")
    if values["codebook_dim"] == width:
        problems.append(
            f"vector_quantization_hidden_dimension={width!r} equals hidden_size, and then the "
            "quantizer has no projections in transformers: that is not supported"
        )
    for half in ("encoder_config", "decoder_config"):
        if half in data and data[half] is None:
            problems.append(f"{half}=None: a codec without that half is not supported")
    values["rope_base"], rope_problems = _transformers_rope(data)
    problems += rope_problems
    values["frame_rate"] = _transformers_frame_rate(data, values)
    return _build(values, problems, "transformers' configuration")


def _transformers_rope(data: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Returns RoPE's theta, and what is not supported."""
    # 5.x keeps theta inside rope_parameters; before, it stood by itself.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return None, [f"rope_parameters={rope!r} is not an object"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = []
    if kind != "default":
        problems.append(f"rope_type={kind!r} is not supported: it must be 'default'")
    return rope.get("rope_theta", data.get("rope_theta", 10_000.0)), problems


def _transformers_frame_rate(data: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    # 4.x writes frame_rate; 5.x keeps what was given as _frame_rate, and None means half the
    # rate of the latents (the resampling stride of 2 in its `frame_size`).
    for key in ("frame_rate", "_frame_rate"):
        if data.get(key) is not None:
            return data[key]
    try:
        return values["sample_rate"] / (2 * math.prod(values["ratios"]))
    except (TypeError, ZeroDivisionError):
        return 1.0  # sample_rate or ratios is at fault, and `MimiConfig` will say so


def to_transformers(config: MimiConfig) -> dict[str, Any]:
    """Returns transformers' form: a Mimi's `config.json`, or the `codec_config` of a CSM's.

    Raises:
        ValueError: transformers cannot build this config.
    """
    problems = []
    if config.codebook_dim == config.embed_dim:
        problems.append(
            f"codebook_dim={config.codebook_dim} equals embed_dim, and then transformers leaves "
            "the quantizer's projections out"
        )
    if config.codebook_size & (config.codebook_size - 1):
        problems.append(f"codebook_size={config.codebook_size} must be a power of 2")
    if problems:
        raise ValueError(listed("transformers' configuration", problems))
    data = {key: fixed.value for key, fixed in _TRANSFORMERS_FIXED.items()}
    data |= _TRANSFORMERS_WRITTEN
    for field, (key, _) in _TRANSFORMERS_FIELDS.items():
        value = getattr(config, field)
        data[key] = list(value) if field == "ratios" else value
    return data | {
        "frame_rate": config.frame_rate,
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_heads,
        "upsample_groups": config.embed_dim,
        "vector_quantization_hidden_dimension": config.codebook_dim,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }


def _fixed_problems(
    data: Mapping[str, Any], fixed: Mapping[str, _Fixed], section: str
) -> list[str]:
    problems = []
    for key, rule in fixed.items():
        value = data.get(key, rule.default)
        if value is _MISSING:
            problems.append(f"{_dotted(section, key)} is missing; only {rule.value!r} is supported")
        elif value != rule.value:
            problems.append(
                f"{_dotted(section, key)}={value!r} is not supported: it must be {rule.value!r}"
            )
    return problems


def _build(values: dict[str, Any], problems: list[str], what: str) -> MimiConfig:
    """Returns the config, or raises with everything that is wrong with it."""
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
        elif FIELD_KINDS[name] == "float" and is_number(value):
            values[name] = float(value)
    problems = [*problems, *field_problems(values)]
    if problems:
        raise ValueError(listed(what, problems))
    return MimiConfig(**values)


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key
