"""Foreign checkpoints made by hand: names and shapes written out here, not taken from the tables."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from csm_jax import weights
from csm_jax.config import CSMConfig, LlamaConfig, tiny, to_sesame
from csm_jax.weights import tables


def small(*, tied: bool = True) -> CSMConfig:
    """Returns a few thousand parameters, all sizes different so that no swap goes unnoticed."""
    base = tiny()
    return dataclasses.replace(
        base,
        backbone=dataclasses.replace(
            base.backbone,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            embed_dim=24,
            intermediate_dim=40,
        ),
        decoder=dataclasses.replace(
            base.decoder,
            num_heads=6,
            num_kv_heads=3,
            head_dim=4,
            embed_dim=16,
            intermediate_dim=28,
        ),
        text_vocab_size=50,
        audio_vocab_size=11,
        codebook_size=8,
        tie_codebooks_embeddings=tied,
    )


def _torchtune_body(prefix: str, sizes: LlamaConfig) -> dict[str, tuple[int, ...]]:
    dim, mlp = sizes.embed_dim, sizes.intermediate_dim
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.norm.scale": (dim,)}
    for i in range(sizes.num_layers):
        layer = f"{prefix}.layers.{i}"
        shapes |= {
            f"{layer}.attn.q_proj.weight": (queries, dim),
            f"{layer}.attn.k_proj.weight": (keys, dim),
            f"{layer}.attn.v_proj.weight": (keys, dim),
            f"{layer}.attn.output_proj.weight": (dim, queries),
            f"{layer}.mlp.w1.weight": (mlp, dim),
            f"{layer}.mlp.w2.weight": (dim, mlp),
            f"{layer}.mlp.w3.weight": (mlp, dim),
            f"{layer}.sa_norm.scale": (dim,),
            f"{layer}.mlp_norm.scale": (dim,),
        }
    return shapes


def sesame_shapes(config: CSMConfig) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of Sesame's layout (FACTS 1.2)."""
    backbone, decoder = config.backbone.embed_dim, config.decoder.embed_dim
    return {
        "text_embeddings.weight": (config.text_vocab_size, backbone),
        "audio_embeddings.weight": (config.num_codebooks * config.audio_vocab_size, backbone),
        "projection.weight": (decoder, backbone),
        "codebook0_head.weight": (config.audio_vocab_size, backbone),
        "audio_head": (config.num_codebooks - 1, decoder, config.audio_vocab_size),
        **_torchtune_body("backbone", config.backbone),
        **_torchtune_body("decoder", config.decoder),
    }


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: Any = np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns normal values, with a NaN payload, infinities and subnormals that a cast would lose."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(dtype)
        array.reshape(-1)[:3] = np.array([np.nan, -np.inf, 1e-40]).astype(dtype)
        tensors[name] = array
    return tensors


def write_sesame(
    directory: Path, config: CSMConfig, tensors: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Returns the tensors of a new directory with `model.safetensors` and `config.json`."""
    directory.mkdir(parents=True)
    tensors = dict(random_tensors(sesame_shapes(config)) if tensors is None else tensors)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(to_sesame(config)))
    return tensors


def assert_same_bits(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Fails unless both hold the same names, dtypes, shapes and bytes."""
    assert set(one) == set(other)
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def run(source: Path, destination: Path, to: str, **options: Any) -> list[Path]:
    """Returns the files of a conversion with everything else left at its default."""
    arguments = {
        "from_layout": None,
        "dtype": None,
        "overwrite": False,
        "progress": lambda a, b: None,
    }
    return weights.convert_checkpoint(source, destination, to_layout=to, **{**arguments, **options})


def params_of(config: CSMConfig, *, dtype: Any = np.float32, seed: int = 1) -> dict[str, Any]:
    """Returns random parameters of these sizes."""
    shapes = {path: tuple(shape) for path, shape in tables.model_shapes(config).items()}
    return tables.unflatten(random_tensors(shapes, dtype=dtype, seed=seed))


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """Returns every tensor in a checkpoint directory by name."""
    if (directory / tables.ORBAX_NAME).is_dir():
        return tables.flatten(weights.load_checkpoint(directory)[1])
    names = [name for name in os.listdir(directory) if name.endswith(".safetensors")]
    return {k: v for name in names for k, v in load_file(directory / name).items()}
