"""What a run tells: a line of JSON per logged step, a progress bar, TensorBoard when asked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from csm_jax.train.checkpoints import RunError

LOG_NAME = "log.jsonl"


class Log:
    """The record of a run in its directory. One process of a run has it."""

    def __init__(self, directory: Path, *, step: int, tensorboard: bool) -> None:
        """Opens the record for what comes after a step.

        Lines of later steps, made by a run that was stopped after its last checkpoint, are taken out: they
        are about to be made again.

        Args:
            directory: Of the run.
            step: Steps made.
            tensorboard: Whether to write TensorBoard's files too, in `tensorboard/`.

        Raises:
            RunError: A line there is none of a record.
            OSError: It cannot be written.
            ModuleNotFoundError: TensorBoard's writer is not installed.
        """
        path = directory / LOG_NAME
        kept = [line for line in _lines(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(temporary, path)
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _board(directory / "tensorboard", step) if tensorboard else None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
            kind: `train`, `eval`, ...
            step: Steps made.
            values: Numbers, or lists of them; those that are not finite become null.

        Raises:
            OSError: The disk is full.
        """
        line = {"kind": kind, "step": step, **{name: _plain(x) for name, x in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def has_line(directory: Path, kind: str, step: int) -> bool:
    """Returns whether a run's record has a line of this kind of a step.

    Raises:
        RunError: A line there is none of a record.
    """
    lines = _lines(directory / LOG_NAME)
    return any(line["step"] == step and line.get("kind") == kind for line in lines)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = []
    for number, written in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(written)
        except ValueError:  # cut off by a kill
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise RunError(
                f"{path}: line {number} is none of a run's log, it has no step: remove the line"
            )
        lines.append(line)
    return lines


def _board(directory: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--tensorboard needs tensorboardX: pip install 'csm_jax[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory), purge_step=step + 1)
