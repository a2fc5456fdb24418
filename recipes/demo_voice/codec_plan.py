"""What the codec's training is, and the crops of speech it sees."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from csm_jax.config import SAMPLE_RATE
from csm_jax.mimi.config import mimi
from csm_jax.mimi.spectral_loss import Resolution, SpectralLossConfig
from csm_jax.mimi.training import TrainingConfig
from recipes.demo_voice import speech
from recipes.demo_voice.text import Split

_BEGINNINGS = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run; everything in it but `checkpoint_s` decides the weights it ends with.

    Attributes:
        training: Sizes and losses.
        rows: Crops in a batch.
        frames: Frames of a crop.
        unquantised_steps: Steps before the codebooks are started.
        start_frames: Frames they are started from.
        kmeans_iterations: Of each codebook's start.
        warmup_steps: Steps in which the learning rate rises.
        decay_share: Share of the run, its end, in which it falls to 0.
        hours: Most speech to take.
        seed: Of the weights and the crops.
        checkpoint_s: Seconds between checkpoints.
    """

    training: TrainingConfig
    rows: int
    frames: int
    unquantised_steps: int
    start_frames: int
    kmeans_iterations: int
    warmup_steps: int
    decay_share: float
    hours: float
    seed: int
    checkpoint_s: float


def demo_plan() -> Plan:
    """Returns the demo voice's codec: 2.6 million values, 8 codes of 512 for each 80 ms."""
    sizes = dataclasses.replace(
        mimi(),
        num_filters=16,
        embed_dim=128,
        num_layers=2,
        num_heads=4,
        intermediate_dim=256,
        context=24,
        num_codebooks=8,
        codebook_size=512,
        codebook_dim=64,
    )
    spectral = SpectralLossConfig(
        sample_rate=sizes.sample_rate,
        resolutions=(
            Resolution(window=2048, hop=512, num_mels=80),
            Resolution(window=1024, hop=256, num_mels=80),
            Resolution(window=512, hop=128, num_mels=40),
            Resolution(window=240, hop=60, num_mels=20),
        ),
        convergence_weight=1.0,
        log_weight=0.5,
        mel_weight=1.5,
    )
    return Plan(
        training=TrainingConfig(
            mimi=sizes,
            spectral=spectral,
            commitment_weight=0.25,
            semantic_weight=1.0,
            semantic_mels=40,
            decay=0.99,
            least_usage=0.1,
            matrix_rate=1.2e-2,
            other_rate=2e-3,
        ),
        rows=8,
        frames=16,
        unquantised_steps=400,
        start_frames=5_000,
        kmeans_iterations=10,
        warmup_steps=100,
        decay_share=0.25,
        hours=6.0,
        seed=0,
        checkpoint_s=180.0,
    )


class Crops:
    """Random pieces of recordings, the same for the same seed and number."""

    def __init__(self, clips: list[np.ndarray], *, samples: int, seed: int) -> None:
        """Keeps the recordings.

        Args:
            clips: int16 [W] each.
            samples: Of a crop.
            seed: Of all crops.
        """
        self._clips, self._samples, self._seed = clips, samples, seed
        self._ends = np.cumsum([len(clip) for clip in clips])

    def batch(self, number: int, rows: int) -> np.ndarray:
        """Returns the crops of a batch, int16 [rows, samples]; a recording too short ends in silence."""
        rng = np.random.default_rng((self._seed, number))
        crops = np.zeros((rows, self._samples), np.int16)
        for crop in crops:
            place = int(rng.integers(self._ends[-1]))
            clip = self._clips[int(np.searchsorted(self._ends, place, side="right"))]
            # Utterances are coded from their beginning: some of the crops are such.
            last = max(len(clip) - self._samples, 0)
            first = 0 if rng.random() < _BEGINNINGS else int(rng.integers(last + 1))
            piece = clip[first : first + self._samples]
            crop[: len(piece)] = piece
        return crops


def load_clips(
    directory: Path, split: Split, *, most: int | None, hours: float
) -> list[np.ndarray]:
    """Returns a split's recordings in their order, int16 [W] each.

    Args:
        directory: Of the speech.
        split: `train` or `dev`.
        most: Recordings to take; None takes all.
        hours: Speech after which no more are taken.

    Raises:
        FileNotFoundError: There are none.
    """
    clips, samples = [], 0
    for _, _, audio in itertools.islice(speech.clips(directory, split), most):
        clips.append(audio)
        samples += len(audio)
        if samples >= hours * 3600 * SAMPLE_RATE:
            break
    if not clips:
        raise FileNotFoundError(
            f"{directory} has no {split} speech: make it with python -m recipes.demo_voice.speech"
        )
    return clips
