"""Random Mimi weights in the published file format: small ones for tests, or the full sizes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from moshi.models import loaders
from moshi.models.compression import MimiModel
from safetensors.torch import save_file

from csm_jax.mimi.config import MimiConfig
from csm_jax.mimi.params import init_params
from csm_jax.mimi.published import to_moshi, to_transformers
from csm_jax.weights import mimi_tables
from csm_jax.weights.tables import flatten


def small_config(*, codebook_size: int = 256, context: int = 250) -> dict[str, Any]:
    """Returns moshi's Mimi configuration with the published strides and codebooks, but thin."""
    config = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(dimension=32, n_filters=2)
    config["quantizer"].update(
        dimension=16, bins=codebook_size, input_dimension=32, output_dimension=32
    )
    config["transformer"].update(
        d_model=32,
        num_heads=2,
        num_layers=2,
        dim_feedforward=64,
        context=context,
        input_dimension=32,
        output_dimensions=[32],
    )
    return config


def write_mimi(path: Path, *, config: dict[str, Any] | None, seed: int = 0) -> Path:
    """Returns `path` after writing random weights of `config` (None: the published sizes) there."""
    torch.manual_seed(seed)
    model = loaders.get_mimi(None, config)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("embedding_sum"):
            tensor = torch.randn_like(tensor)
        elif name.endswith(("cluster_usage", "_initialized")):
            tensor = torch.ones_like(tensor)
        elif ".layer_scale" in name:
            # The published initial value, 0.01, would hide the transformer from every comparison.
            tensor = torch.full_like(tensor, 0.5)
        state[name] = tensor.contiguous()
    metadata = None if config is None else {"mimi_config": json.dumps(config)}
    save_file(state, path, metadata=metadata)
    return path


def odd_mimi() -> MimiConfig:
    """Returns a few thousand parameters, all sizes unlike each other and unlike the published.

    Exceptions: moshi's form has no place for another `norm_eps`.
    """
    return MimiConfig(
        sample_rate=24_000,
        frame_rate=1_000.0,
        num_filters=6,
        ratios=(4, 3),
        num_residual_layers=2,
        dilation_growth=3,
        compress=3,
        kernel_size=5,
        residual_kernel_size=2,
        last_kernel_size=4,
        embed_dim=24,
        num_layers=3,
        num_heads=4,
        intermediate_dim=40,
        context=10,
        rope_base=500.0,
        norm_eps=1e-5,
        num_codebooks=5,
        num_semantic_codebooks=2,
        codebook_size=32,
        codebook_dim=12,
    )


def random_params(config: MimiConfig, *, seed: int = 0) -> dict[str, Any]:
    """Returns random parameters of `config`, as numpy arrays."""
    return jax.tree.map(np.asarray, init_params(config, jax.random.key(seed)))


def foreign_tensors(
    layout: str, config: MimiConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the tensors of a file in `layout` by name."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    return {
        binding.names[0]: binding.to_theirs(leaves)
        for binding in mimi_tables.bind(mimi_tables.get_layout(layout), config)
    }


def _torch_tensors(layout: str, config: MimiConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(np.array(tensor))  # jax's arrays cannot be written to
        for name, tensor in foreign_tensors(layout, config, params).items()
    }


def empty_moshi(config: MimiConfig) -> MimiModel:
    """Returns moshi's model as it is before weights are loaded."""
    return loaders.get_mimi(None, to_moshi(config), num_codebooks=config.num_codebooks)


def moshi_model(config: MimiConfig, params: Mapping[str, Any]) -> MimiModel:
    """Returns moshi's model with these parameters, for all codebooks.

    Raises:
        RuntimeError: A tensor is missing, extra or mis-shaped (torch's strict loading).
    """
    model = empty_moshi(config)
    model.load_state_dict(_torch_tensors("moshi", config, params), strict=True)
    return model.eval().requires_grad_(False)


def transformers_model(config: MimiConfig, params: Mapping[str, Any]) -> transformers.MimiModel:
    """Returns transformers' model with these parameters.

    Raises:
        RuntimeError: A tensor is missing, extra or mis-shaped.
    """
    # Through `from_pretrained`: it knows the names of files, which are no longer the modules'.
    model, loading = transformers.MimiModel.from_pretrained(
        None,
        config=transformers.MimiConfig(**to_transformers(config)),
        state_dict=_torch_tensors("transformers", config, params),
        output_loading_info=True,
    )
    problems = {kind: names for kind, names in loading.items() if names}
    if problems:
        raise RuntimeError(f"transformers could not place every tensor: {problems}")
    return model.eval().requires_grad_(False)
