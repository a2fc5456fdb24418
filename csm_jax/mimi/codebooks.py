"""Learning the codebooks of a Mimi's quantizer, and what training does in the quantizer's place.

Gradients pass the quantizer as if it were not there. Codebooks are learned without: each is a running mean
of the vectors that chose it, in the form a checkpoint stores (`embedding_sum`, `cluster_usage`), and a code
that hardly anything chooses is put where a vector of the batch is. Until `start_codebooks` has put them among the
encoder's vectors (`initialized`), what goes through the quantizer is left as it is.

Codebooks are those of `csm_jax.mimi.params`, stacked: of each part, `embedding_sum` [C, V, E],
`cluster_usage` [C, V] and `initialized` [C, 1].
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from csm_jax.array_typing import Array, Float, Int, Key, Params, pytree
from csm_jax.linear import project
from csm_jax.mimi import quantizer

PARTS = ("semantic", "acoustic")
"""Of the quantizer, in the order of their codes."""


@pytree
class Quantised:
    """What becomes of features in the quantizer.

    Attributes:
        features: For the decoder.
        semantic: The first part's share of them.
        commitment: Mean square between the vectors and their codes'.
        vectors: By part, what each codebook had to quantise, [B, n, C, E].
        codes: By part, [B, n, C].
    """

    features: Float[Array, "B n D"]
    semantic: Float[Array, "B n D"]
    commitment: Float[Array, ""]
    vectors: dict[str, Array]
    codes: dict[str, Array]


def quantise(params: Params, codebooks: Params, x: Float[Array, "B n D"]) -> Quantised:
    """Returns what the quantizer makes of features; its gradient in `x` and `params`
    is that of the projections alone.

    Args:
        params: By part, `input_proj` and `output_proj`.
        codebooks: Of both parts.
        x: Features.
    """
    codebooks = jax.lax.stop_gradient(codebooks)
    tables = {
        part: books["embedding_sum"]
        / jnp.maximum(books["cluster_usage"], quantizer.MIN_USAGE)[..., None]
        for part, books in codebooks.items()
    }
    prepared = {part: {**params[part], "table": table} for part, table in tables.items()}
    codes = jax.lax.stop_gradient(quantizer.encode(prepared, x))
    features, commitment, first = [], [], 0
    vectors, chosen = {}, {}
    for part in PARTS:
        table = tables[part]
        count = table.shape[0]
        chosen[part] = codes[..., first : first + count]
        first += count
        z = project(x, params[part]["input_proj"])
        rows = table[jnp.arange(count), chosen[part]]
        left = z[..., None, :] - (jnp.cumsum(rows, axis=-2) - rows)
        vectors[part] = jax.lax.stop_gradient(left)
        started = codebooks[part]["initialized"][0, 0] > 0
        through = z + jnp.where(started, rows.sum(axis=-2) - jax.lax.stop_gradient(z), 0)
        features.append(project(through, params[part]["output_proj"]))
        commitment.append(jnp.where(started, jnp.square(left - rows), 0).mean(axis=(0, 1, 3)))
    return Quantised(
        features=features[0] + features[1],
        semantic=features[0],
        commitment=jnp.concatenate(commitment).mean(),
        vectors=vectors,
        codes=chosen,
    )


def update_codebooks(
    books: Params,
    vectors: Float[Array, "R C E"],
    codes: Int[Array, "R C"],
    key: Key[Array, ""],
    *,
    decay: float,
    least_usage: float,
) -> Params:
    """Returns one part's codebooks after a batch.

    Args:
        books: Of the part.
        vectors: What each codebook had to quantise.
        codes: What it chose.
        key: For where the codes go that are hardly chosen.
        decay: Of the running sums.
        least_usage: Share of the mean usage below which a code is put elsewhere.
    """
    size = books["cluster_usage"].shape[1]
    chose = jax.nn.one_hot(codes, size, dtype=vectors.dtype)
    sums = jnp.einsum("RCV,RCE->CVE", chose, vectors, precision=jax.lax.Precision.HIGHEST)
    usage = decay * books["cluster_usage"] + (1 - decay) * chose.sum(axis=0)
    total = decay * books["embedding_sum"] + (1 - decay) * sums
    mean = usage.mean(axis=1, keepdims=True)
    unused = usage < least_usage * mean
    picks = jax.random.randint(key, usage.shape, 0, vectors.shape[0])
    fresh = vectors[picks, jnp.arange(usage.shape[0])[:, None]] * mean[..., None]
    return {
        "embedding_sum": jnp.where(unused[..., None], fresh, total),
        "cluster_usage": jnp.where(unused, mean, usage),
        "initialized": books["initialized"],
    }


def start_codebooks(
    params: Params,
    codebooks: Params,
    features: Float[Array, "R D"],
    key: Key[Array, ""],
    *,
    frames: int,
    iterations: int,
) -> Params:
    """Returns codebooks among the encoder's vectors: k-means, one after the other.

    Args:
        params: By part, `input_proj`.
        codebooks: What is not started yet.
        features: What `whole.encode_features` gave, at least as many as there are codes.
        key: For where k-means begins.
        frames: Frames in the batch of a step, which sets how fast the running sums move.
        iterations: Of k-means.

    Raises:
        ValueError: There are fewer features than codes.
    """
    started = {}
    for part in PARTS:
        books = codebooks[part]
        count, size = books["cluster_usage"].shape
        if len(features) < size:
            raise ValueError(
                f"{len(features):,} features are too few for codebooks of {size:,} codes: give more"
            )
        left = project(features, params[part]["input_proj"])
        sums, usages = [], []
        for _ in range(count):
            key, own = jax.random.split(key)
            vectors, members = kmeans(left, own, size=size, iterations=iterations)
            codes = _nearest(vectors, left)
            left = left - vectors[codes]
            usage = members * (frames / len(features))
            sums.append(vectors * usage[:, None])
            usages.append(usage)
        started[part] = {
            "embedding_sum": jnp.stack(sums),
            "cluster_usage": jnp.stack(usages),
            "initialized": jnp.ones_like(books["initialized"]),
        }
    return started


@functools.partial(jax.jit, static_argnames=("size", "iterations"))
def kmeans(
    x: Float[Array, "R E"], key: Key[Array, ""], *, size: int, iterations: int
) -> tuple[Float[Array, "V E"], Float[Array, "V"]]:
    """Returns the means of `size` clusters, and how many vectors each has (1 where it has none).

    Args:
        x: At least `size` vectors.
        key: For the vectors that it begins with, and those that clusters left empty begin again with.
        size: Clusters.
        iterations: Times that the means are computed.
    """
    keys = jax.random.split(key, iterations + 1)
    start = x[jax.random.choice(keys[0], len(x), (size,), replace=False)]

    def step(means: Array, key: Array) -> tuple[Array, Array]:
        chose = jax.nn.one_hot(_nearest(means, x), size, dtype=x.dtype)
        counts = chose.sum(axis=0)
        sums = jnp.einsum("RV,RE->VE", chose, x, precision=jax.lax.Precision.HIGHEST)
        fresh = x[jax.random.randint(key, (size,), 0, len(x))]
        empty = (counts == 0)[:, None]
        return jnp.where(empty, fresh, sums / jnp.maximum(counts, 1)[:, None]), counts

    means, counts = jax.lax.scan(step, start, keys[1:])
    return means, jnp.maximum(counts[-1], 1)


def _nearest(means: Float[Array, "V E"], x: Float[Array, "R E"]) -> Int[Array, "R"]:
    return jnp.argmax(project(x, means) - 0.5 * jnp.sum(jnp.square(means), axis=-1), axis=-1)


def perplexity(usage: Float[Array, "C V"]) -> Float[Array, "C"]:
    """Returns of each codebook how many codes it uses, as if all alike."""
    shares = usage / jnp.maximum(usage.sum(axis=1, keepdims=True), quantizer.MIN_USAGE)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=1))
