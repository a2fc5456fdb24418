"""A run's directory: what it is, its checkpoints, and how it goes on.

    run.json            what the run is; a directory is continued only by the same run
    run.lock            held by the process that is at work
    checkpoints/<step>  orbax: the training state, and the place in the data
    log.jsonl           one line per logged step (`csm_jax.train.log`)

A checkpoint appears whole or not at all: orbax writes beside it and renames, so that whatever stops a
save (a full disk, a kill) leaves the one before as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from csm_jax.array_typing import Params
from csm_jax.corpus.files import Locks
from csm_jax.train.settings import RunSettings
from csm_jax.train.step import TrainState

RUN_NAME, LOCK_NAME, CHECKPOINTS_NAME = "run.json", "run.lock", "checkpoints"

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunSettings)}
_HASHED_ROWS = 64  # of every weight, evenly spaced: training moves all of them


class RunError(ValueError):
    """A directory holds another run, or a checkpoint that cannot be read."""


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keeps every other run out of a directory, which is made, while it lasts; process 0's business.

    Raises:
        RunError: Another process is at work there.
        OSError: It cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with Locks(directory / LOCK_NAME) as locks:
        try:
            locks.take([0])
        except BlockingIOError as error:
            raise RunError(
                f"another process is training in {directory}: wait until it has ended, or choose "
                "another --output_dir"
            ) from error
        yield


def check_run(directory: Path, known: Mapping[str, Any]) -> None:
    """Checks what is known of a run so far against the run that a directory holds, if any.

    Process 0's business, as `open_run`.

    Args:
        directory: Of the run.
        known: Some of what decides the weights it ends with, as JSON.

    Raises:
        RunError: It holds checkpoints of another run; the message has all that differs.
    """
    if jax.process_index() == 0:
        _compare(directory, known, known.keys())


def open_run(directory: Path, description: Mapping[str, Any]) -> None:
    """Says in a run's directory which run it is, or checks that it is this one.

    Process 0 decides; the others go on to `Checkpoints`, where all wait for each other.

    Args:
        directory: Of the run.
        description: All that decides the weights it ends with, as JSON.

    Raises:
        RunError: As `check_run`.
        OSError: It cannot be written.
    """
    if jax.process_index() != 0:
        return
    before = _compare(directory, description, None)
    if before is None:
        path = directory / RUN_NAME
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def hash_weights(params: Params) -> str:
    """Returns what tells the weights that a run begins with from others, in the dtype they are in."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        rows = np.asarray(leaf[:: max(1, leaf.shape[0] // _HASHED_ROWS)])
        digest.update(f"{jax.tree_util.keystr(path)} {rows.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(rows).view(np.uint8).data)
    return digest.hexdigest()


def _compare(
    directory: Path, description: Mapping[str, Any], names: Collection[str] | None
) -> dict[str, Any] | None:
    """Returns what a directory says, None where it holds nothing that could be mixed up."""
    before = _read(directory)
    if before is None or not any((directory / CHECKPOINTS_NAME).glob("[0-9]*")):
        return None
    now = json.loads(json.dumps(description))
    # What has no effect is not in it; what a later version adds had its default before.
    before = {name: default for name, default in _DEFAULTS.items() if name in now} | before
    # Of a whole run also what is there and unknown here.
    compared = set(names or now.keys() | (before.keys() - _DEFAULTS.keys()))
    lines = [
        f"  {name}: {before[name]!r} there, {now.get(name)!r} now"
        for name in sorted(compared)
        if name in before and before[name] != now.get(name)
    ]
    if lines:
        raise RunError(
            f"{directory} holds another run, which cannot be continued as this one:\n"
            + "\n".join(lines)
            + "\nchoose another --output_dir, or give the same settings again"
        )
    return before


def _read(directory: Path) -> dict[str, Any] | None:
    path = directory / RUN_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (directory / CHECKPOINTS_NAME).exists():
            raise RunError(
                f"{directory} has {CHECKPOINTS_NAME} but no {RUN_NAME}: choose another --output_dir"
            ) from None
        return None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; choose another --output_dir") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object; choose another --output_dir")
    return found


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
