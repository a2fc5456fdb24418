"""Spoiled audio history: what is changed, what never is, and how much."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.data.batch import Batch
from csm_jax.model import init_params
from csm_jax.train.augment import AugmentConfig, augment
from csm_jax.train.loss import LossConfig, count, loss_sums, total
from tests.support import training
from tests.support.checkpoints import small

CONFIG = dataclasses.replace(
    small(), num_codebooks=4, decoder=dataclasses.replace(small().decoder, max_seq_len=4)
)


def batch(rows: int = 40) -> Batch:
    """Returns rows of three conversations each."""
    rng = np.random.default_rng(0)
    talk = [[training.random_turn(CONFIG, text=4, audio=15, rng=rng)] for _ in range(3)]
    return training.join([training.row(CONFIG, talk, length=64)] * rows)


def spoiled(**given: float) -> tuple[Batch, np.ndarray, np.ndarray]:
    whole = {"history_noise": 0.0, "noisy_share": 1.0, "codebook_dropout": 0.0}
    before = batch()
    frames, mask = jax.jit(augment, static_argnames=("config", "augmentation"))(
        jax.random.key(0), before, config=CONFIG, augmentation=AugmentConfig(**whole | given)
    )
    return before, np.asarray(frames), np.asarray(mask)


def test_shares_of_nothing_change_nothing():
    before, frames, mask = spoiled()
    np.testing.assert_array_equal(frames, before.frames)
    np.testing.assert_array_equal(mask, before.mask)


def test_codes_are_replaced_in_whole_conversations_and_never_text():
    before, frames, mask = spoiled(history_noise=0.5, noisy_share=0.25)
    np.testing.assert_array_equal(mask, before.mask)
    np.testing.assert_array_equal(frames[..., -1], before.frames[..., -1])
    assert frames[..., :-1].min() >= 0
    assert frames[..., :-1].max() < CONFIG.codebook_size
    changed = (frames != before.frames)[..., :-1]
    shares = np.array(
        [
            changed[i][before.mask[i, :, 0] & (before.segments[i] == talk)].mean()
            for i in range(40)
            for talk in (1, 2, 3)
        ]
    )
    noisy = shares > 0
    # 120 conversations: 30 expected, 5 either way; in each 64 codes and more, half of them replaced.
    assert 15 <= noisy.sum() <= 45
    assert abs(shares[noisy].mean() - 0.5 * (1 - 1 / CONFIG.codebook_size)) < 0.05
    # Conversations of a row do not share their draw.
    assert any(len(set(noisy[i : i + 3])) > 1 for i in range(0, 120, 3))


def test_of_some_frames_only_the_first_codes_are_read():
    before, frames, mask = spoiled(codebook_dropout=0.5)
    np.testing.assert_array_equal(frames, before.frames)
    np.testing.assert_array_equal(mask[..., -1], before.mask[..., -1])
    heard = mask[..., :-1][before.mask[..., 0]]
    assert heard[:, 0].all()
    assert (heard[:, :-1] >= heard[:, 1:]).all()  # a prefix
    counts = np.bincount(heard.sum(axis=-1), minlength=5)[1:] / len(heard)
    np.testing.assert_allclose(counts, [1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=0.04)
    assert not mask[~before.mask.any(axis=-1)].any()


def test_what_is_predicted_and_scored_stays_as_it_was():
    rows = batch(2)
    # A model whose backbone does not look at audio: all it has left are targets and the decoder's codes.
    params = init_params(CONFIG, jax.random.key(1), dtype=jnp.float32)
    params["decoder"]["audio_embeddings"] = params["backbone"]["audio_embeddings"]
    params["backbone"]["audio_embeddings"] = jnp.zeros_like(params["backbone"]["audio_embeddings"])
    config = dataclasses.replace(CONFIG, tie_codebooks_embeddings=False)
    spoil = AugmentConfig(history_noise=0.9, noisy_share=1.0, codebook_dropout=0.9)

    def value(params: dict, spoil: AugmentConfig | None) -> float:
        loss = LossConfig(
            amortization_ratio=1, decoder_loss_weight=1.0, remat="none", augmentation=spoil
        )
        sums = jax.jit(loss_sums, static_argnames=("config", "loss"))(
            params, rows, jax.random.key(0), config=config, loss=loss
        )
        return float(total(sums, count(rows), decoder_loss_weight=1.0))

    assert value(params, spoil) == value(params, None)
    params["backbone"]["audio_embeddings"] = params["decoder"]["audio_embeddings"]
    assert value(params, spoil) != value(params, None)


def test_shares_beyond_one_are_refused():
    with pytest.raises(ValueError, match=r"codebook_dropout must be between 0 and 1, got 1\.5"):
        AugmentConfig(history_noise=0.0, noisy_share=0.0, codebook_dropout=1.5)
