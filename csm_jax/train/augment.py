"""Audio history spoiled on purpose, so that a model trained from random weights listens to the text.

Mimi's frames follow from the frames before them so well that a small model learns to go on from its own
past and to ignore what it is told to say. Both kinds of damage are to inputs of the backbone alone: what
is predicted, and the codes that the decoder goes on from, stay as they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Bool, Int, Key
from csm_jax.config import CSMConfig
from csm_jax.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What happens to the audio that the backbone reads.

    Attributes:
        history_noise: Share of the codes that are replaced by random ones, in noisy conversations.
        noisy_share: Share of the conversations that are noisy.
        codebook_dropout: Share of the frames of which only the first k codes are read, k drawn from
            1..C-1.
    """

    history_noise: float
    noisy_share: float
    codebook_dropout: float

    def __post_init__(self) -> None:
        for name in ("history_noise", "noisy_share", "codebook_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


def augment(
    key: Key[Array, ""], batch: Batch, *, config: CSMConfig, augmentation: AugmentConfig
) -> tuple[Int[Array, "B T C1"], Bool[Array, "B T C1"]]:
    """Returns the frames and mask that the backbone is to read of one micro-batch.

    Args:
        key: Of this step and micro-batch.
        batch: Without an accumulation axis.
        config: Sizes.
        augmentation: How much is spoiled.
    """
    frames, mask = jnp.asarray(batch.frames), jnp.asarray(batch.mask)
    keys = jax.random.split(key, 5)
    rows, steps, _ = frames.shape
    shape = (rows, steps, config.num_codebooks)
    noisy = jax.random.uniform(keys[0], (rows, steps)) < augmentation.noisy_share
    replaced = jax.random.uniform(keys[1], shape) < augmentation.history_noise
    others = jax.random.randint(keys[2], shape, 0, config.codebook_size, frames.dtype)
    dropped = jax.random.uniform(keys[3], (rows, steps)) < augmentation.codebook_dropout
    kept = jax.random.randint(keys[4], (rows, steps), 1, config.num_codebooks)

    def spoil(
        frames: Array, mask: Array, segments: Array, noisy: Array, replaced: Array, others: Array,
        dropped: Array, kept: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        # A conversation's own draw is that at the place of its number.
        mine = jnp.take_along_axis(noisy, segments, axis=1)
        codes, ids = frames[:, :, :-1], frames[:, :, -1:]
        codes = jnp.where(replaced & mine[:, :, None], others, codes)
        read = ~dropped[:, :, None] | (jnp.arange(codes.shape[2]) < kept[:, :, None])
        heard = mask[:, :, :-1] & read
        return (
            jnp.concatenate([codes, ids], axis=2),
            jnp.concatenate([heard, mask[:, :, -1:]], axis=2),
        )

    return sharding.by_rows(
        spoil, frames, mask, jnp.asarray(batch.segments), noisy, replaced, others, dropped, kept
    )
