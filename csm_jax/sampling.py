"""How a code is drawn from its scores: the only owner of randomness.

Selection is `argmax(log p + gumbel)` with the noise passed in. Sesame's `argmax(p / q)` with
`q ~ Exp(1)` is the same draw with gumbel = -log q, so the reference's noise can be replayed here.

Every request has a key of its own, and the noise of a code is a function of (key, frame, codebook)
alone: a row's codes depend neither on its slot, nor on its neighbours, nor on how many frames are made per
call. Sampling parameters are arrays with one value per row: a new temperature never recompiles.

Filters apply in transformers' order: temperature, top-k, top-p, min-p. Codes Mimi cannot decode
(2,048 and up) are removed before all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.array_typing import Array, Float, Int, Key, UInt, pytree

Either = Array | np.ndarray
"""Settings are the host's until they reach a batch: an array on a device each would take longer than all."""


@pytree
class SamplingParams:
    """Sampling settings of a batch, one value per row.

    Attributes:
        temperature: Divides the scores; 0 picks the best code and ignores the rest.
        top_k: Codes kept, best first, ties with the last one included; 0 keeps all.
        top_p: Smallest probability mass kept, best codes first; 1 keeps all.
        min_p: Codes less likely than this fraction of the best one are dropped; 0 keeps all.
    """

    temperature: Float[Either, "B"]
    top_k: Int[Either, "B"]
    top_p: Float[Either, "B"]
    min_p: Float[Either, "B"]


def sampling_params(
    *,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    prefix: str = "",
) -> SamplingParams:
    """Returns checked per-row settings on the host, each argument with one value per row.

    Args:
        temperature: See `SamplingParams`, as for the next three.
        top_k: Codes kept.
        top_p: Mass kept.
        min_p: Least likelihood.
        prefix: What errors put before these names, such as `decoder_`.

    Raises:
        ValueError: A value is out of range or not finite, or the lengths differ.
    """
    rows = len(temperature)
    if not len(top_k) == len(top_p) == len(min_p) == rows:
        raise ValueError(
            f"sampling settings of {rows} temperatures, {len(top_k)} top_k, {len(top_p)} top_p and "
            f"{len(min_p)} min_p: one of each per row is needed"
        )
    for value in temperature:
        if not (value == 0 or _LEAST_TEMPERATURE <= value <= _MOST_TEMPERATURE):
            raise ValueError(
                f"{prefix}temperature must be 0 (greedy) or a finite number from "
                f"{_LEAST_TEMPERATURE:g} to {_MOST_TEMPERATURE:,}, got {value}"
            )
    for value in top_k:
        if isinstance(value, bool) or not 0 <= value <= _MOST_RANKS or int(value) != value:
            raise ValueError(
                f"{prefix}top_k must be 0 (all codes) or a whole number up to {_MOST_RANKS:,}, "
                f"got {value}"
            )
    for value in top_p:
        if not 0 < value <= 1:
            raise ValueError(f"{prefix}top_p must be in (0, 1], got {value}")
    for value in min_p:
        if not 0 <= value <= 1:
            raise ValueError(f"{prefix}min_p must be in [0, 1], got {value}")
    return SamplingParams(
        temperature=np.asarray(temperature, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p=np.asarray(top_p, np.float32),
        min_p=np.asarray(min_p, np.float32),
    )


# Below, scores divided by it leave float32's range; above, they differ by less than its precision.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-3, 1_000_000
_MOST_RANKS = 2**31 - 1  # int32


def request_keys(seeds: Sequence[int]) -> UInt[np.ndarray, "B 2"]:
    """Returns the raw key of each request, a function of its seed alone, on the host.

    The threefry generator is named, so that a seed means the same noise on every device.

    Raises:
        ValueError: A seed is not an integer in [0, 2**64).
    """
    rows = np.zeros((len(seeds), 2), np.uint32)
    for row, seed in zip(rows, seeds, strict=True):
        if isinstance(seed, bool) or not 0 <= seed < 2**64 or int(seed) != seed:
            raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
        row[:] = int(seed) >> 32, int(seed) & 0xFFFFFFFF
    return rows


def frame_keys(keys: UInt[Either, "B 2"], frame: Int[Array, "B"]) -> Key[Array, "B"]:
    """Returns the key of each row's frame, counted from the first generated one."""
    return jax.vmap(
        lambda key, n: jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), n)
    )(keys, frame)


def gumbel(
    keys: Key[Array, "B"], codebook: int | Int[Array, ""], *, num_codes: int
) -> Float[Array, "B V"]:
    """Returns the noise for one codebook of each row's frame."""
    return jax.vmap(
        lambda key: jax.random.gumbel(jax.random.fold_in(key, codebook), (num_codes,), jnp.float32)
    )(keys)


def ranks_needed(top_k: Sequence[int], top_p: Sequence[float], *, codebook_size: int) -> int:
    """Returns how many of the best scores must be sorted for these rows: the static `ranks`.

    Sorting is the dearest part of a draw, so few sizes are compiled: 0 where no row filters by rank,
    64 where every filter is a top-k of at most 64, else all codes.
    """
    needed = [k or codebook_size for k, p in zip(top_k, top_p, strict=True) if k or p < 1]
    if not needed:
        return 0
    return _FEW_RANKS if max(needed) <= _FEW_RANKS < codebook_size else codebook_size


_FEW_RANKS = 64


def rank_sizes(*, codebook_size: int) -> tuple[int, ...]:
    """Returns the static `ranks` that a batch needs whose rows may change, smallest first.

    Rows that filter nothing get the same codes from any of them.
    """
    return (_FEW_RANKS, codebook_size) if codebook_size > _FEW_RANKS else (codebook_size,)


def filter_logits(
    logits: Float[Array, "B V"], params: SamplingParams, *, codebook_size: int, ranks: int
) -> Float[Array, "B V"]:
    """Returns the scores over temperature, -inf where a code may not be drawn.

    Args:
        logits: Scores of all V codes.
        params: One setting per row; at temperature 0 the scores are not divided.
        codebook_size: Codes at or beyond it are removed first.
        ranks: Scores to sort, at least `ranks_needed` of the rows.
    """
    codes = jnp.arange(logits.shape[-1])
    logits = jnp.where(codes < codebook_size, logits.astype(jnp.float32), -jnp.inf)
    greedy = params.temperature == 0
    scores = logits / jnp.where(greedy, 1.0, params.temperature)[:, None]
    best = scores.max(axis=-1, keepdims=True)
    lowest = best + jnp.log(params.min_p)[:, None]
    if ranks:
        lowest = jnp.maximum(lowest, _lowest_ranked(scores, params, min(ranks, codebook_size)))
    return jnp.where(scores >= lowest, scores, -jnp.inf)


def _lowest_ranked(scores: Array, params: SamplingParams, ranks: int) -> Array:
    """Returns per row the lowest score that top-k and top-p keep."""
    # Best first, read by their places: where nobody reads the places, XLA no longer sees that this is a top-k,
    # and a CPU sorts all scores, 15 times as long and a tenth of a frame of 64 rows (jax 0.10.2).
    _, places = jax.lax.top_k(scores, ranks)
    ranked = jnp.take_along_axis(scores, places, axis=-1)
    top_k, top_p = params.top_k[:, None], params.top_p[:, None]
    kth = jnp.take_along_axis(ranked, jnp.clip(top_k, 1, ranks) - 1, axis=-1)
    kth = jnp.where(top_k == 0, -jnp.inf, kth)
    # top-p over what top-k left, ties with the k-th included, as in transformers: a code stays while
    # the mass before it is below top_p. Ties beyond the last rank share its value, so it stands for
    # them. A whole mass may round to less than 1: top_p of 1 keeps all by itself.
    mass = jnp.exp(ranked - ranked[:, :1])
    total = jnp.sum(
        jnp.where(scores >= kth, jnp.exp(scores - ranked[:, :1]), 0.0), -1, keepdims=True
    )
    before = (jnp.cumsum(mass, axis=-1) - mass) / total
    stays = (before < top_p) & (ranked >= kth)
    pth = jnp.min(jnp.where(stays, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(top_p == 1, kth, jnp.maximum(kth, pth))


def choose(
    logits: Float[Array, "B V"],
    noise: Float[Array, "B V"],
    params: SamplingParams,
    *,
    codebook_size: int,
    ranks: int,
) -> Int[Array, "B"]:
    """Returns one code per row, below `codebook_size`: the best after the noise is added.

    At temperature 0 the noise is left out, and the lowest of equally good codes wins.
    """
    scores = filter_logits(logits, params, codebook_size=codebook_size, ranks=ranks)
    noise = jnp.where((params.temperature == 0)[:, None], 0.0, noise)
    return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)
