"""`csm-jax train`: a run with a progress bar, and what stops it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from csm_jax.train.arguments import settings_of

EXIT_OK, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 130, 143


def main(args: argparse.Namespace, *, interrupted: Callable[[], bool]) -> int:
    """Runs and returns the exit status.

    Args:
        args: Of `csm_jax.train.arguments`.
        interrupted: Whether Ctrl-C was pressed; the run then saves and stops.

    Raises:
        ValueError, OSError, RuntimeError: As `csm_jax.train.run.train`.
    """
    settings = settings_of(args)
    from csm_jax import pipeline
    from csm_jax.train.run import Hooks, Stopped, train

    terminated = told = False

    def terminate(signum: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True

    def stopping() -> bool:
        nonlocal told
        asked = terminated or interrupted()
        if asked and not told:
            told = True
            bar.note("stopping, after saving what has been made")
        return asked

    before = signal.signal(signal.SIGTERM, terminate)
    pipeline.enable_compilation_cache()
    with _Bar() as bar:
        try:
            final = train(settings, Hooks(note=bar.note, progress=bar.update, stopping=stopping))
            if terminated or interrupted():
                bar.note(
                    "asked to stop when all that was left was to write the weights: they are there"
                )
        except Stopped as stop:
            bar.note(str(stop))
            return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, before)
    print(final)
    return EXIT_OK


class _Bar:
    """A progress bar on a terminal; elsewhere a line now and then."""

    _EVERY = 50

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *stop: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, text: str) -> None:
        """Shows a line."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)

    def update(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """Shows that a step is done."""
        figures = (
            f"loss {metrics['loss']:.4f} (c0 {metrics['c0']:.4f}, decoder {metrics['decoder']:.4f}), "
            f"gradient {metrics['grad_norm']:.2f}, rate {metrics['learning_rate']:.2e}"
        )
        if metrics["skipped"]:
            figures += "; not finite: skipped"
        if not sys.stderr.isatty():
            if metrics["skipped"] or step % self._EVERY == 0 or step in (1, steps):
                print(f"step {step:,} of {steps:,}: {figures}", file=sys.stderr)
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step - 1, unit="step", dynamic_ncols=True)
        self._bar.set_postfix_str(figures)
        self._bar.update(step - self._bar.n)
