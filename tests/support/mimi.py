"""Random Mimi weights in the published file format: small ones for tests, or the full sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from safetensors.torch import save_file


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
