"""Adapters in and out in PEFT's format, named as PEFT names those of transformers' CSM.

A directory with `adapter_model.safetensors` (`lora_A` is `down`, `lora_B` is `up`) and
`adapter_config.json`. The names are those of transformers' layout (`csm_jax.weights.tables`) after
PEFT's prefix, and `up` goes through the transform of its weight's rows.
Source: PEFT's documentation, "PEFT checkpoint format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from csm_jax.array_typing import Params
from csm_jax.config import CSMConfig
from csm_jax.train.lora import TARGETS, TRUNKS, LoraConfig, adapted, adapter_pairs
from csm_jax.weights import tables
from csm_jax.weights.errors import WeightsError
from csm_jax.weights.output import staged
from csm_jax.weights.safetensors_io import (
    Output,
    SafetensorsSource,
    load_json,
    nbytes,
    write_safetensors,
)
from csm_jax.weights.source import cast
from csm_jax.weights.tables import Binding, TensorSpec

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_PREFIX = "base_model.model."
_SIDES = {"down": "lora_A", "up": "lora_B"}

# Settings under which the tensors mean something else than `weight + alpha / r · B @ A`; off by default.
_MUST_BE_OFF = (
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
# Ways to start that leave the weights below as they are; the others (PiSSA, OLoRA, ...) change them.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class _Place(NamedTuple):
    """What one tensor of the file is: which side of which weight's adapter."""

    binding: Binding
    side: str

    def shape(self, rank: int) -> tuple[int, ...]:
        out, into = self.binding.foreign_shape
        return (rank, into) if self.side == "down" else (out, rank)


def save_adapters(
    path: str | Path,
    config: CSMConfig,
    lora: LoraConfig,
    adapters: Params,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Returns the files of a directory that PEFT loads over transformers' `CsmForConditionalGeneration`.

    Args:
        path: The directory; made if missing, and then it appears only when complete.
        config: The sizes of the model below.
        lora: The adapters' configuration.
        adapters: As `csm_jax.train.lora.init_lora` returns them; written as float32.
        base_model: Name or path of the model below, for whoever loads the adapters.
        overwrite: Whether adapters that are there may be replaced.

    Raises:
        FileExistsError: Adapters, or a checkpoint, are already there.
        OSError: The directory cannot be written.
        ValueError: The adapters are not of this configuration; lists everything.
    """
    pairs = adapter_pairs(adapters, tables.model_shapes(config), lora)
    places = _places(config, lora)

    def produce(place: _Place) -> Iterator[np.ndarray]:
        down, up = pairs[place.binding.path]
        if place.side == "down":
            yield np.asarray(down, np.float32)
        else:
            rows = np.asarray(up, np.float32)
            yield place.binding.transform.inverse(rows, place.binding.num_heads)

    outputs = [
        Output(name, TensorSpec("float32", place.shape(lora.rank)), partial(produce, place))
        for name, place in places.items()
    ]
    settings = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        # In full: the codec of transformers' model has layers that end in `q_proj` as well.
        "target_modules": [
            _module(place.binding) for place in places.values() if place.side == "up"
        ],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    destination, names = Path(path), [WEIGHTS_NAME, CONFIG_NAME]
    size = sum(nbytes(output.spec) for output in outputs)
    with staged(destination, names, overwrite=overwrite, nbytes=size) as staging:
        write_safetensors(
            staging / WEIGHTS_NAME, outputs, metadata={"format": "pt"}, progress=lambda count: None
        )
        with open(staging / CONFIG_NAME, "x", encoding="utf-8") as file:
            json.dump(settings, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
    return [destination / name for name in names]


def load_adapters(path: str | Path, config: CSMConfig) -> tuple[LoraConfig, Params]:
    """Returns the adapters in a directory written by PEFT or by `save_adapters`, and their configuration.

    PEFT given bare names such as `q_proj` adapts the codec as well, which no loss of CSM's trains: its
    adapters are passed over as long as they do nothing.

    Args:
        path: A directory with `adapter_model.safetensors` and `adapter_config.json`.
        config: The sizes of the model below.

    Raises:
        FileNotFoundError: One of the two files is missing.
        WeightsError: Every setting that means another kind of adapter, and every missing, extra, mis-shaped or
            wrong-dtype tensor by name; or damaged data.
    """
    directory = Path(path)
    settings = _read_settings(directory / CONFIG_NAME)
    file = directory / WEIGHTS_NAME
    with closing(SafetensorsSource([file], where=str(file))) as source:
        problems = _setting_problems(settings)
        everywhere = _places(config, LoraConfig())
        found = [everywhere[name].binding.path for name in source.specs if name in everywhere]
        if not found:
            problems.append("no tensor is an adapter of CSM's backbone or decoder")
        if problems:
            raise WeightsError(str(directory), problems)
        lora = LoraConfig(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            targets=tuple(name for name in TARGETS if any(p.endswith(f".{name}") for p in found)),
            trunks=tuple(name for name in TRUNKS if any(p.startswith(f"{name}.") for p in found)),
        )
        places = _places(config, lora)
        problems = _tensor_problems(source, places, lora)
        if problems:
            raise WeightsError(source.where, problems)
        leaves: dict[str, Any] = {}
        for name, (binding, side) in places.items():
            array = cast(source.read(name), "float32", name=name, where=source.where)
            if side == "up":
                array = binding.transform.forward(array, binding.num_heads)
            leaves[f"{binding.path}.{side}"] = jnp.asarray(array)
    return lora, tables.unflatten(leaves)


def _module(binding: Binding) -> str:
    return binding.name.removesuffix(".weight")


def _places(config: CSMConfig, lora: LoraConfig) -> dict[str, _Place]:
    """Returns every tensor of the file by name."""
    chosen = adapted(config, lora)
    return {
        f"{_PREFIX}{_module(binding)}.{letter}.weight": _Place(binding, side)
        for binding in tables.bind(tables.LAYOUTS["transformers"], config)
        if binding.path in chosen
        for side, letter in _SIDES.items()
    }


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(file, f"damaged JSON: {error}") from error
    settings = load_json(text, where=str(file))
    if not isinstance(settings, dict):
        raise WeightsError(file, "does not hold a JSON object")
    return settings


def _setting_problems(settings: Mapping[str, Any]) -> list[str]:
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(f"peft_type is {settings.get('peft_type')!r}, expected 'LORA'")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"r is {rank!r}, expected a whole number of 1 or more")
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, (int, float))
        or not 0 < alpha < float("inf")
    ):
        problems.append(f"lora_alpha is {alpha!r}, expected a positive number")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias is {settings['bias']!r}; CSM has no biases")
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights is {start!r}, which changes the weights below; convert the adapters to "
            "plain LoRA with PEFT first"
        )
    problems += [
        f"{key} is {settings[key]!r}, which is not supported"
        for key in _MUST_BE_OFF
        if settings.get(key)
    ]
    return problems


def _tensor_problems(
    source: SafetensorsSource, places: Mapping[str, _Place], lora: LoraConfig
) -> list[str]:
    codec = f"{_PREFIX}{tables.LAYOUTS['transformers'].set_aside}"
    problems = [f"missing tensor {name}" for name in places if name not in source.specs]
    for name, spec in source.specs.items():
        if name not in places:
            if not name.startswith(codec):
                problems.append(f"extra tensor {name} {spec.dtype}{list(spec.shape)}")
            elif name.endswith(".lora_B.weight") and any(
                chunk.any() for chunk in source.raw_chunks(name)
            ):
                problems.append(f"tensor {name} changes the codec, which is not supported")
            continue
        expected = places[name].shape(lora.rank)
        if spec.shape != expected:
            problems.append(
                f"tensor {name} has shape {list(spec.shape)}, expected {list(expected)}"
            )
        if spec.dtype not in tables.FLOAT_DTYPES:
            problems.append(
                f"tensor {name} has dtype {spec.dtype}, expected one of "
                f"{', '.join(tables.FLOAT_DTYPES)}"
            )
    return problems
