"""A Mimi that is trained in moments: the sizes and losses that tests share, and so its compiled step."""

from __future__ import annotations

import dataclasses

from csm_jax.mimi.config import MimiConfig, tiny_mimi
from csm_jax.mimi.spectral_loss import Resolution, SpectralLossConfig
from csm_jax.mimi.training import TrainingConfig

ROWS, FRAMES = 4, 20
"""Of a batch."""


def small() -> MimiConfig:
    """Returns sizes that compile soon: two strides, frames of 20 ms."""
    return dataclasses.replace(
        tiny_mimi(),
        frame_rate=50.0,
        ratios=(20, 12),
        num_filters=4,
        embed_dim=16,
        num_layers=1,
        intermediate_dim=32,
        context=6,
        num_codebooks=4,
        codebook_size=32,
        codebook_dim=8,
    )


def spectral() -> SpectralLossConfig:
    return SpectralLossConfig(
        sample_rate=small().sample_rate,
        resolutions=(
            Resolution(window=512, hop=128, num_mels=30),
            Resolution(window=240, hop=60, num_mels=20),
        ),
        convergence_weight=1.0,
        log_weight=0.5,
        mel_weight=1.5,
    )


def config() -> TrainingConfig:
    return TrainingConfig(
        mimi=small(),
        spectral=spectral(),
        commitment_weight=0.25,
        semantic_weight=1.0,
        semantic_mels=6,
        decay=0.9,
        least_usage=0.1,
        matrix_rate=1e-2,
        other_rate=3e-3,
    )
