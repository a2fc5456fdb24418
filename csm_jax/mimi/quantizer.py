"""Split residual vector quantisation: features [B, T, D] to and from codes [B, T, C].

The first `num_semantic_codebooks` codebooks quantise one projection of the features, the others another
projection of the same features; within each part every codebook quantises what the ones before left
over, and decoding adds up. Source: moshi `SplitResidualVectorQuantizer`.

A checkpoint stores the running sum of the vectors of each code and their number; `prepare` divides once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Float, Int, Params
from csm_jax.linear import project
from csm_jax.mimi.config import MimiConfig

MIN_USAGE = 1e-5
"""Least count a code's sum is divided by (moshi `EuclideanCodebook.epsilon`)."""


def prepare(params: Params, *, num_codebooks: int, config: MimiConfig) -> Params:
    """Returns the quantizer's weights as it runs: the codebooks of a part as one table [C, V, E].

    Args:
        params: The quantizer's part of a checkpoint.
        num_codebooks: Codes per frame to use.
        config: Sizes.
    """
    semantic = min(num_codebooks, config.num_semantic_codebooks)

    def part(params: Params, count: int) -> Params:
        books = [params["codebooks"][str(i)] for i in range(count)]
        tables = [
            jnp.asarray(book["embedding_sum"])
            / jnp.maximum(jnp.asarray(book["cluster_usage"]), MIN_USAGE)[:, None]
            for book in books
        ]
        return {
            "input_proj": jnp.asarray(params["input_proj"]),
            "output_proj": jnp.asarray(params["output_proj"]),
            "table": jnp.stack(tables),
        }

    parts = {"semantic": part(params["semantic"], semantic)}
    if num_codebooks > semantic:
        parts["acoustic"] = part(params["acoustic"], num_codebooks - semantic)
    return parts


def encode(params: Params, x: Float[Array, "B T D"]) -> Int[Array, "B T C"]:
    """Returns the codes of features."""
    codes = [
        _nearest(part["table"], project(x, part["input_proj"]))
        for part in (params[name] for name in _names(params))
    ]
    return jnp.concatenate(codes, axis=-1)


def decode(params: Params, codes: Int[Array, "B T C"]) -> Float[Array, "B T D"]:
    """Returns the features of codes in range."""
    features, first = [], 0
    for part in (params[name] for name in _names(params)):
        count, size, width = part["table"].shape
        rows = codes[..., first : first + count] + jnp.arange(count) * size
        vectors = _rows(part["table"].reshape(-1, width), rows)
        features.append(project(vectors.sum(axis=2), part["output_proj"]))
        first += count
    return sum(features[1:], features[0])


def _names(params: Params) -> tuple[str, ...]:
    return ("semantic", "acoustic") if "acoustic" in params else ("semantic",)


def _rows(table: Float[Array, "R E"], indices: Int[Array, "*batch"]) -> Float[Array, "*batch E"]:
    return table.at[indices].get(out_sharding=sharding.follow(indices, *range(indices.ndim), None))


def _nearest(table_CVE: Float[Array, "C V E"], x: Float[Array, "B T E"]) -> Int[Array, "B T C"]:
    # |x - e|^2 = |x|^2 - 2 (x·e - |e|^2 / 2): the nearest vector has the largest bracket.
    halves = 0.5 * jnp.sum(jnp.square(table_CVE), axis=-1)

    def step(residual: Array, book: tuple[Array, Array]) -> tuple[Array, Array]:
        vectors, half = book
        codes = jnp.argmax(project(residual, vectors) - half, axis=-1).astype(jnp.int32)
        return residual - _rows(vectors, codes), codes

    _, codes_CBT = jax.lax.scan(step, x, (table_CVE, halves))
    return jnp.moveaxis(codes_CBT, 0, -1)
