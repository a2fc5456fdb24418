"""Trains the demo voice's codec: `python -m recipes.demo_voice.codec --speech DIR --out DIR --minutes N`.

In the output directory:

    run.json            what the run is; it is gone on with only as that
    state.safetensors   the last checkpoint
    codec.safetensors   the codec of that checkpoint, a Mimi in moshi's layout; none before it has codebooks
    log.jsonl           losses of training, and of the dev split at every checkpoint
    curves.png          the same, drawn

The same command goes on where a run was stopped. Steps since the last checkpoint are made again, with the
same crops: by `--steps`, a run that was killed ends with the same bytes as one that was not. By `--minutes`
(of training in all) the clock decides when the learning rate falls, so no two runs are the same; more
minutes may be given later, best before the last quarter.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from csm_jax import pipeline
from csm_jax.host_memory import keep_freed_memory
from csm_jax.html_report import check_plots
from recipes.demo_voice import codec_run
from recipes.demo_voice.codec_plan import demo_plan
from recipes.demo_voice.codec_run import Budget, Hooks, Stopped

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and returns the exit status: 130 after Ctrl-C and 143 after SIGTERM, with all saved."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("minutes", "steps", "hours"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be more than 0, got {value:g}")
    keep_freed_memory()
    caught: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if caught:  # a second one does not wait for the step to end
            raise KeyboardInterrupt
        caught.append(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    progress = _Progress()
    pipeline.enable_compilation_cache()  # going on compiles nothing again
    try:
        check_plots(extra="eval")
        codec = codec_run.train(
            args.speech,
            args.out,
            plan=dataclasses.replace(demo_plan(), hours=args.hours, seed=args.seed),
            budget=Budget(minutes=args.minutes, steps=args.steps),
            hooks=Hooks(note=progress.note, progress=progress.show, stopping=lambda: bool(caught)),
        )
    except Stopped as stopped:
        progress.note(str(stopped))
        return EXIT_TERMINATED if caught[0] == signal.SIGTERM else EXIT_INTERRUPTED
    except KeyboardInterrupt:
        progress.note("interrupted: the same command goes on from the last checkpoint")
        return EXIT_INTERRUPTED
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        progress.note(f"codec: {error}")
        return EXIT_ERROR
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    progress.note(f"{codec} is finished")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo_voice.codec", description="Trains the demo voice's codec."
    )
    parser.add_argument("--speech", type=Path, required=True, help="what the speech stage made")
    parser.add_argument("--out", type=Path, required=True, help="the run's directory")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of training in all, earlier runs included")
    length.add_argument("--steps", type=int, help="in all, earlier runs included")
    parser.add_argument(
        "--hours", type=float, default=6.0, help="most speech to hold in memory (6 h: 1 GB)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the crops")
    return parser


class _Progress:
    """One line that changes on a terminal; elsewhere a line now and then."""

    _EVERY = 50

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = False

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        print(f"\n{text}" if self._shown else text, file=sys.stderr)
        self._shown = False

    def show(self, step: int, metrics: dict[str, Any]) -> None:
        """Shows that a step is made."""
        left = metrics["left_s"]
        text = (
            f"step {step:,}: loss {metrics['loss']:.3f} (mel {metrics['mel']:.3f}, semantic "
            f"{metrics['semantic']:.3f}), {metrics['speed']:.1f} s of speech a second, "
            f"{left / 60:.0f} min left"
        )
        if self._terminal:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif step % self._EVERY == 0:
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
