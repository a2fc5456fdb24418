"""Which frames of a row the decoder is trained on: a new draw of one in `ratio` at every step.

Every packed row draws from its own trained frames, uniformly and without replacement, so that on a mesh
no hidden state leaves its device and the draw does not depend on how many devices there are. End frames
(all codes 0) are drawn apart from the others: there is one per utterance, and without them the decoder
would hardly ever learn to stop. They are all kept while they take no more than half of the places.

A kept frame weighs (frames of its kind in the row) / (kept of its kind): the weighted sum over the kept
frames is then an unbiased estimate of the sum over all of them, as Sesame's 1/16 is meant to be
(https://www.sesame.com/research/crossing_the_uncanny_valley_of_voice).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Bool, Float, Int, Key


def places(steps: int, ratio: int) -> int:
    """Returns how many frames of a row of `steps` are kept."""
    return -(-steps // ratio)


def draw_frames(
    key: Key[Array, ""], trained: Bool[Array, "B T"], end: Bool[Array, "B T"], *, ratio: int
) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
    """Returns the places of the kept frames of each row, and what each of them weighs.

    Args:
        key: Of this step and micro-batch.
        trained: Which frames there are to draw from.
        end: Which of them are end frames.
        ratio: One in how many is kept; R is `places(T, ratio)`.

    Returns:
        `(index, weight)`. A row with fewer trained frames than places has weight 0 in the others.

    Raises:
        ValueError: A row is too short to keep a frame of either kind.
    """
    count = places(trained.shape[1], ratio)
    if count < 2:
        raise ValueError(
            f"rows of {trained.shape[1]:,} positions are too short for amortization_ratio={ratio}: "
            "two frames of a row at least must be kept"
        )
    noise = jax.random.uniform(key, trained.shape)
    return sharding.by_rows(lambda t, e, u: _draw(t, e, u, count), trained, end, noise)


def _draw(trained: Array, end: Array, noise: Array, count: int) -> tuple[Array, Array]:
    kinds = jnp.stack([trained & end, trained & ~end])  # [2, B, T]
    have = kinds.sum(axis=-1)
    ends = jnp.minimum(have[0], jnp.maximum(count // 2, count - have[1]))
    keep = jnp.stack([ends, jnp.minimum(have[1], count - ends)])

    order = jnp.argsort(noise, axis=-1)
    ranks = jnp.cumsum(jnp.take_along_axis(kinds, order[None], axis=-1), axis=-1)
    # In the order of the noise: the first `keep` of each kind.
    chosen = jnp.take_along_axis(kinds, order[None], axis=-1) & (ranks <= keep[:, :, None])
    # Chosen ones first, for the rest anything.
    picked = jnp.argsort(~chosen.any(axis=0), axis=-1, stable=True)[:, :count]
    index = jnp.take_along_axis(order, picked, axis=-1)
    each = have / jnp.maximum(keep, 1)  # [2, B]
    weight = jnp.where(chosen, each[:, :, None], 0.0).sum(axis=0)
    return index, jnp.take_along_axis(weight, picked, axis=-1)
