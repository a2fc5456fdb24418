"""Placing finished files: staged in a hidden directory, synced, then renamed into place.

Whatever goes wrong before the renames leaves nothing behind and touches nothing that was there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from csm_jax.weights.errors import WeightsError
from csm_jax.weights.opening import CONFIG_NAME
from csm_jax.weights.tables import CHECKPOINT_NAMES, CODEC_NAME


@contextlib.contextmanager
def staged(
    destination: Path, names: Sequence[str], *, overwrite: bool, nbytes: int
) -> Iterator[Path]:
    """Yields a new directory on the destination's disk; its content is moved there at the end.

    A new destination appears whole by one rename. In an existing directory each file is replaced by
    one rename, and files of other names stay.

    Args:
        destination: The directory to be.
        names: Everything that will be written, so that clashes are found before any work.
        overwrite: Whether files of these names may be replaced.
        nbytes: Size of the output, held against the free space.

    Raises:
        FileExistsError: A file of these names, or another checkpoint, is already there.
        OSError: The destination cannot be written, or its disk is too full.
    """
    _check_destination(destination, names, overwrite=overwrite)
    parent = destination if destination.exists() else destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OSError(f"{parent}: {nbytes:,} bytes are needed, {free:,} are free")
    staging = parent / f".{destination.name}.partial-{secrets.token_hex(4)}"
    staging.mkdir()  # not mkdtemp, whose private mode would stay with the finished directory
    try:
        yield staging
        with _uninterrupted():
            _commit(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_destination(destination: Path, names: Sequence[str], *, overwrite: bool) -> None:
    if destination.suffix in (".safetensors", ".pt", ".json") and not destination.is_dir():
        raise WeightsError(destination, "the destination is a directory, not a file name")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileExistsError(f"{destination} is a file; the destination must be a directory")
    there = [name for name in names if (destination / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{destination} already holds {', '.join(there)}: choose another destination, or "
            "replace them with --overwrite (in Python: overwrite=True)"
        )
    others = [
        name
        for name in (*CHECKPOINT_NAMES, CODEC_NAME)
        if name not in names and (destination / name).exists()
    ]
    if others:
        raise FileExistsError(
            f"{destination} already holds another checkpoint ({', '.join(others)}), which "
            "would not be replaced: remove it or choose another destination"
        )


def _commit(staging: Path, destination: Path) -> None:
    if not destination.exists():
        _sync_directory(staging)
        staging.rename(destination)
        _sync_directory(destination.absolute().parent)
        return
    # One by one, the config last: a process killed between two of them leaves a mixture. A new
    # directory, above, has no such moment.
    for item in sorted(staging.iterdir(), key=lambda item: item.name == CONFIG_NAME):
        target = destination / item.name
        if target.is_dir():
            target.rename(staging / f"{item.name}.replaced")
        item.rename(target)
    _sync_directory(destination)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back for the few renames, so that they happen together."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's: nothing to hold back
        return
    # Not by blocking: the kernel then gives the signal to another thread, and Python handles it.
    late: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: late.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in late:
            signal.raise_signal(number)
