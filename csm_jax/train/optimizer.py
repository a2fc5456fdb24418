"""AdamW, or Muon on the matrices, with warm-up, built from optax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from csm_jax.array_typing import Array, PyTree
from csm_jax.train.settings import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the weights move. Names as in the Hugging Face Trainer.

    Attributes:
        optim: A name of `OPTIMIZERS`. `muon` is for all weights trained from random ones on one device:
            it moves the projections inside blocks, AdamW the rest.
        learning_rate: At its highest.
        lr_scheduler_type: A name of `SCHEDULES`; cosine and linear end at 0.
        warmup_steps: Steps from 0 to the highest.
        max_steps: Steps in all.
        weight_decay: Not applied to norms and embedding tables.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second.
        adam_epsilon: Added to the root of the second.
        max_grad_norm: The gradient is scaled down to this norm; infinite to leave it as it is.
    """

    optim: str
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    max_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float

    def __post_init__(self) -> None:
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {self.optim!r}")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(
                f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, got "
                f"{self.lr_scheduler_type!r}"
            )
        if self.max_steps < 1 or not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be between 0 and max_steps={self.max_steps}, "
                "which must be at least 1"
            )
        for name in ("learning_rate", "adam_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")


def make_schedule(config: OptimizerConfig) -> Callable[[Any], Array]:
    """Returns the learning rate as a function of the step, from 0; never quite 0 at the first."""
    peak, warm, steps = config.learning_rate, config.warmup_steps, config.max_steps

    def rate(step: Any) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rise = (step + 1) / (warm + 1)
        done = jnp.clip((step - warm) / max(steps - warm, 1), 0.0, 1.0)
        rest = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": 1 - done,
            "constant": jnp.ones(()),
        }[config.lr_scheduler_type]
        return peak * jnp.where(step < warm, rise, rest)

    return rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns clipping by the global norm, then AdamW or Muon.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both
    (`_MUON_RMS`).
    """
    adamw = optax.adamw(
        make_schedule(config),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    if config.optim == "adamw":
        return optax.chain(clip, adamw)
    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=_as_matrices),
        optax.stateless(_as_far_as_adamw),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(make_schedule(config)),
    )
    return optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, _labels))


def updates_made(moments: PyTree) -> int:
    """Returns how many steps have moved weights: those that were skipped have not counted."""
    return max(int(count) for _, count in optax.tree.get_all_with_path(moments, "count"))


# AdamW's updates have about this root mean square before the learning rate
# (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(entry, "key", entry)) for entry in path]


def _decayed(params: PyTree) -> PyTree:
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not any("norm" in name or "embeddings" in name for name in _names(path))

    return jax.tree_util.tree_map_with_path(decays, params)


def _labels(params: PyTree) -> PyTree:
    def label(path: tuple[Any, ...], leaf: Any) -> str:
        # Tables, heads and what joins the transformers stay with AdamW, as Muon's author has it.
        return "muon" if leaf.ndim == 2 and "layers" in _names(path) else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _as_far_as_adamw(updates: PyTree, _: PyTree) -> PyTree:
    # An orthogonal matrix's entries have the root mean square 1 / sqrt(its longer side).
    return jax.tree.map(lambda x: _MUON_RMS * max(x.shape) ** 0.5 * x, updates)


def _as_matrices(params: PyTree) -> PyTree:
    # Weights are [out, in]. What another optimiser moves is masked out and stays so.
    numbers = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    return jax.tree.map(lambda _: numbers, params)
