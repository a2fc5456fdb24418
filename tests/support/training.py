"""Conversations packed into rows, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.data.batch import Batch
from csm_jax.train.optimizer import OptimizerConfig


def optimizer(learning_rate: float, max_steps: int, **changes: Any) -> OptimizerConfig:
    """Returns the defaults of a run with a constant rate and without warm-up, with changes."""
    given: dict[str, Any] = {
        "optim": "adamw",
        "learning_rate": learning_rate,
        "max_steps": max_steps,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
    }
    return OptimizerConfig(**given | changes)


@dataclass
class Turn:
    """A turn: its text ids, its codes [n, C], and whether it is trained."""

    text: np.ndarray
    codes: np.ndarray
    trained: bool = True


def random_turn(
    config: CSMConfig, *, text: int, audio: int, rng: np.random.Generator, trained: bool = True
) -> Turn:
    """Returns a turn of random ids; no code is 0, so that its end frame is the only one."""
    return Turn(
        text=rng.integers(0, config.text_vocab_size, text),
        codes=rng.integers(1, config.codebook_size, (audio, config.num_codebooks)),
        trained=trained,
    )


def row(
    config: CSMConfig, conversations: Sequence[Sequence[Turn]], *, length: int, prefix: int = 0
) -> Batch:
    """Returns one row, [1, length], written out by hand: text, codes, end frame, turn after turn."""
    columns = config.num_codebooks + 1
    frames, mask = np.zeros((length, columns), np.int32), np.zeros((length, columns), bool)
    segments, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    trained = np.zeros(length, bool)
    at = 0
    for number, turns in enumerate(conversations, start=1):
        begin = at
        at += prefix
        for turn in turns:
            end = at + len(turn.text)
            frames[at:end, -1], mask[at:end, -1] = turn.text, True
            at, end = end, end + len(turn.codes) + 1
            frames[at : end - 1, :-1], mask[at:end, :-1] = turn.codes, True
            trained[at:end] = turn.trained
            at = end
        segments[begin:at], positions[begin:at] = number, np.arange(at - begin)
    whole = Batch(
        frames=frames,
        mask=mask,
        segments=segments,
        positions=positions,
        trained=trained,
        weight=trained.astype(np.float32),
    )
    return stack([whole])


def stack(rows: Sequence[Batch]) -> Batch:
    """Returns batches without a row axis as rows of one."""
    return Batch(
        **{
            name: np.stack([getattr(row, name) for row in rows])
            for name in ("frames", "mask", "segments", "positions", "trained", "weight")
        }
    )


def join(rows: Sequence[Batch]) -> Batch:
    """Returns the rows of several batches as one batch."""
    return Batch(
        **{
            name: np.concatenate([getattr(row, name) for row in rows])
            for name in ("frames", "mask", "segments", "positions", "trained", "weight")
        }
    )
