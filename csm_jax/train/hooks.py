"""What a run tells whom, and how it says that it has stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class Stopped(Exception):
    """A run was asked to stop and has saved where it was.

    Attributes:
        step: Of the checkpoint; 0 where there is none.
    """

    def __init__(self, step: int) -> None:
        super().__init__(
            f"stopped at step {step:,}; the same command goes on from there, without "
            "--resume_from_checkpoint if that was given"
        )
        self.step = step


class DivergedError(RuntimeError):
    """Steps do not make finite weights any more, or never have."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run tells whom.

    Attributes:
        note: Called with a line for people.
        progress: Called after every step with (steps made, steps in all, metrics of a step before).
        stopping: Asked before the first step, after every step and between batches of an evaluation
            whether to save and stop.
    """

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int, Mapping[str, Any]], None] = lambda step, steps, metrics: None
    stopping: Callable[[], bool] = lambda: False
