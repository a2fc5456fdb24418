"""AdamW with warm-up, built from optax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from csm_jax.array_typing import Array, PyTree

SCHEDULES = ("cosine", "linear", "constant")
"""What follows the warm-up (`lr_scheduler_type` of the Hugging Face Trainer)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the weights move. Names as in the Hugging Face Trainer.

    Attributes:
        learning_rate: At its highest.
        lr_scheduler_type: A name of `SCHEDULES`; cosine and linear end at 0.
        warmup_steps: Steps from 0 to the highest.
        max_steps: Steps in all.
        weight_decay: Not applied to norms and embedding tables.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second.
        adam_epsilon: Added to the root of the second.
        max_grad_norm: The gradient is scaled down to this norm.
    """

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
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")


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
    """Returns clipping by the global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            make_schedule(config),
            b1=config.adam_beta1,
            b2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: PyTree) -> PyTree:
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        return not any("norm" in name or "embeddings" in name for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)
