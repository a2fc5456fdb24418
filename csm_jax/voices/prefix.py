"""Voices of trained vectors, and which model they were trained for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.voices.voice import Voice

MODEL_KEY = "model"
"""The key of a voice's provenance under which the hash of its model stands."""


def prefix_voice(
    name: str,
    vectors: np.ndarray,
    *,
    config: CSMConfig,
    model: str,
    provenance: Mapping[str, str],
) -> Voice:
    """Returns the voice of vectors that were trained to come before the text.

    Args:
        name: What to call it.
        vectors: Inputs of the backbone, [P, D].
        config: The sizes of the model they were trained for.
        model: That model's hash (`model_hash`).
        provenance: Where it comes from; see `csm_jax.voices.make_provenance`.

    Raises:
        TypeError, ValueError: Bad name, vectors or provenance.
    """
    voice = Voice(
        name=name,
        turns=(),
        vectors=vectors,
        codebook_size=config.codebook_size,
        num_codebooks=config.num_codebooks,
        provenance={**provenance, MODEL_KEY: model},
    )
    if vectors.shape[1] != config.backbone.embed_dim:
        raise ValueError(
            f"voice {name!r}: vectors {vectors.shape} must be [positions, embed_dim] with the model's "
            f"embed_dim={config.backbone.embed_dim:,}"
        )
    return voice


def model_hash(params: Mapping[str, Any]) -> str | None:
    """Returns what tells a model from others of its sizes: a hash of two weights of its backbone.

    They are the final norm and the first layer's `v_proj`: training changes one of them, or both,
    whether it trains all weights or adapters. They are rounded to bfloat16, so that a checkpoint has one
    hash in whatever precision it was loaded. None where other processes hold a part of them.
    """
    import jax  # not needed to read voices
    import ml_dtypes

    backbone = params["backbone"]
    weights = (backbone["final_norm"], backbone["layers"]["0"]["attn"]["v_proj"])
    digest = hashlib.blake2b(digest_size=16, person=b"csm_jax.model")
    for leaf in jax.tree.leaves(weights):
        if not leaf.is_fully_addressable:
            return None
        rounded = np.asarray(leaf).astype(ml_dtypes.bfloat16)
        digest.update(b"%d\n" % rounded.size)
        digest.update(rounded.view(np.uint16).astype("<u2").tobytes())
    return digest.hexdigest()
