"""Draws the losses of a run of `csm-jax train`: `python -m recipes.demo_voice.curves RUN` writes `RUN/curves.png`."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.corpus.files import place
from csm_jax.html_report import check_plots
from csm_jax.train.log import LOG_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "curves.png"
_PANELS = {
    "c0": "loss of code 0 (nats)",
    "decoder": "loss of the other codes (nats a code)",
    "accuracy": "share of codes 0 that are right",
    "eos_c0": "loss of the end of speech (nats)",
    "learning_rate": "learning rate",
    "frames_per_s": "frames a second",
}


def draw(run: Path) -> Path:
    """Returns the picture that it writes of a run's log, while the run goes on or afterwards.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: The log has no step yet, or a line that is no JSON.
        ImportError: matplotlib is not installed; the message has the command.
        OSError: It cannot be written.
    """
    check_plots(extra="eval")
    from matplotlib.figure import Figure

    log = run / LOG_NAME
    if not log.is_file():
        raise FileNotFoundError(f"{run} has no {LOG_NAME}: give the directory of a training")
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()
    ]
    if not any("step" in line for line in lines):
        raise ValueError(f"{log} has no step yet")
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        plot(axis, lines, name, title=title)
    return write(figure, run)


def plot(axis: Axes, lines: Sequence[Mapping[str, Any]], name: str, *, title: str) -> None:
    """Draws a figure of a log's lines over their steps, of training and of evaluations."""
    for kind, style in (("train", "-"), ("eval", "o-")):
        points = [
            (line["step"], line[name])
            for line in lines
            if line.get("kind") == kind and line.get(name) is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=kind, markersize=3, linewidth=1)
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=7)


def write(figure: Figure, run: Path) -> Path:
    """Returns the picture that it writes into a run's directory, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    place(run / NAME, picture.getvalue())
    return run / NAME


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if something is missing or cannot be written."""
    parser = argparse.ArgumentParser(
        description="Draws the losses of a training.", prog="recipes.demo_voice.curves"
    )
    parser.add_argument("run", type=Path, help="the --output_dir of csm-jax train")
    args = parser.parse_args(argv)
    try:
        print(draw(args.run))
    except (OSError, ValueError, ImportError) as error:
        print(f"curves: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
