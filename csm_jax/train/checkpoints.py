"""A run's directory: what it is, its checkpoints, and how it goes on.

    run.json            what the run is; a directory is continued only by the same run
    checkpoints/<step>  orbax: the training state, and the place in the data
    log.jsonl           one line per logged step (`csm_jax.train.log`)

A checkpoint appears whole or not at all: orbax writes beside it and renames, so that whatever stops a
save (a full disk, a kill) leaves the one before as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from csm_jax.train.step import TrainState

RUN_NAME, CHECKPOINTS_NAME = "run.json", "checkpoints"


class RunError(ValueError):
    """A directory holds another run, or a checkpoint that cannot be read."""


def open_run(directory: Path, description: Mapping[str, Any]) -> None:
    """Makes a run's directory, or checks that it is this run's; every process calls it.

    Args:
        directory: Of the run.
        description: All that decides the weights it ends with, as JSON.

    Raises:
        RunError: It holds checkpoints of another run; the message has all that differs.
        OSError: It cannot be written.
    """
    path = directory / RUN_NAME
    description = json.loads(json.dumps(description))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (directory / CHECKPOINTS_NAME).exists():
            raise RunError(
                f"{directory} has {CHECKPOINTS_NAME} but no {RUN_NAME}: choose another --output_dir"
            ) from None
        _write(path, description)
        return
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; choose another --output_dir") from error
    if before == description:
        return
    if not any((directory / CHECKPOINTS_NAME).glob("[0-9]*")):  # nothing that could be mixed up
        _write(path, description)
        return
    names = sorted(before.keys() | description.keys())
    lines = [
        f"  {name}: {before.get(name)!r} there, {description.get(name)!r} now"
        for name in names
        if before.get(name) != description.get(name)
    ]
    raise RunError(
        f"{directory} holds another run, which cannot be continued as this one:\n"
        + "\n".join(lines)
        + "\nchoose another --output_dir, or give the same settings again"
    )


def _write(path: Path, description: Mapping[str, Any]) -> None:
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class Checkpoints:
    """The checkpoints of a run; saved in the background."""

    def __init__(self, directory: Path, *, keep: int | None) -> None:
        """Opens or makes them.

        Args:
            directory: Of the run.
            keep: How many of the latest to keep; None for all.

        Raises:
            OSError: The directory cannot be made.
        """
        self._directory = directory / CHECKPOINTS_NAME
        self._directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        # orbax takes absolute paths only.
        self._manager = ocp.CheckpointManager(self._directory.resolve(), options=options)

    def steps(self) -> list[int]:
        """Returns the steps that there are whole checkpoints of, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Begins to save; returns when the arrays are copied.

        Args:
            state: After a step.
            data: The place in the data, as JSON.

        Raises:
            OSError: The save before this one failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with self._writing(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_plain(state)), data=ocp.args.JsonSave(dict(data))
                ),
            )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state and the place in the data at a step.

        Args:
            step: One of `steps`.
            like: A state of the same shapes, where the arrays are to lie.

        Raises:
            RunError: There is no such checkpoint, it cannot be read or is of another shape.
        """
        steps = self.steps()
        if step not in steps:
            raise RunError(f"{self._directory} has no checkpoint of step {step:,}; it has {steps}")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        try:
            found: Any = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:
            others = [other for other in steps if other != step]
            raise RunError(
                f"{self._directory / str(step)} cannot be read ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}); "
                + (f"--resume_from_checkpoint {others[-1]} takes an earlier one" if others else "")
            ) from error
        leaves = [found.state["leaves"][name] for name in _names(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), found.data

    def drop_after(self, step: int) -> list[int]:
        """Removes the checkpoints of steps after this one, and returns which they were."""
        later = [other for other in self.steps() if other > step]
        for other in later:
            self._manager.delete(other)
        return later

    def wait(self) -> None:
        """Returns when what was begun is saved.

        Raises:
            OSError: It was not.
        """
        with self._writing(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Lets go of the directory; `wait` first."""
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, OSError):
            raise
        except Exception as error:  # orbax and tensorstore have many kinds
            steps = self.steps()
            kept = (
                f"the last whole one is that of step {steps[-1]:,}"
                if steps
                else "there is none yet"
            )
            which = "the checkpoint" if step is None else f"the checkpoint of step {step:,}"
            reason = str(error).strip().splitlines()
            raise OSError(
                f"{self._directory}: {which} was not written ({reason[0] if reason else error!r}); {kept}"
            ) from error


def _names(state: TrainState) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]


def _plain(state: TrainState) -> dict[str, Any]:
    # Leaves by their paths: optax's tuples are nobody's file format.
    return {"leaves": dict(zip(_names(state), jax.tree.leaves(state), strict=True))}
