"""Files that are whole or not there, and locks that end with their process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PART = ".part"
"""Ending of a file that is being written; one that is found was left behind."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A complete file on disk that has not got its name yet.

    Attributes:
        target: The name it will get.
        temporary: The name it has.
        size: Bytes.
        sha256: Of its content, in hexadecimal.
    """

    target: Path
    temporary: Path
    size: int
    sha256: str

    def discard(self) -> None:
        """Removes it, if it still has its temporary name and can be removed."""
        _forget(self.temporary)


def stage(target: Path, pieces: Iterable[bytes]) -> Staged:
    """Returns a file with these bytes beside `target`, written and synced but not yet named so.

    Raises:
        OSError: The disk is full or not writable; the message names `target`, and nothing is left.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}{PART}")
    digest, size = hashlib.sha256(), 0
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for piece in pieces:
                digest.update(piece)
                size += len(piece)
                _write_all(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        _forget(temporary)
        raise _cannot_write(target, error) from error
    except BaseException:  # Ctrl-C must not leave it behind either
        _forget(temporary)
        raise
    return Staged(target=target, temporary=temporary, size=size, sha256=digest.hexdigest())


def publish(staged: Sequence[Staged]) -> None:
    """Gives files of one directory their names, and makes that last.

    Raises:
        OSError: A file could not be renamed, or the directory not synced.
    """
    for file in staged:
        try:
            os.replace(file.temporary, file.target)
        except OSError as error:
            raise _cannot_write(file.target, error) from error
    for directory in {file.target.parent for file in staged}:
        sync_directory(directory)


def place(target: Path, data: bytes) -> None:
    """Writes a file that is whole or not there, even when the machine stops in between.

    Raises:
        OSError: It could not be written; the message names it.
    """
    staged = stage(target, [data])
    try:
        publish([staged])
    finally:
        _forget(staged.temporary)


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory last.

    Raises:
        OSError: The device reports an error.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _cannot_write(directory, error) from error


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_all(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def _forget(temporary: Path) -> None:
    # The first error is the one to report; what cannot be removed now is removed by the next run.
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> OSError:
    return type(error)(error.errno, f"cannot write {path}: {error.strerror or error}")


class Locks:
    """Locks on numbered things of one directory, held until closed or until the process ends.

    They are byte ranges of one file: the kind of lock that network file systems pass on to their
    server. Where there are no locks at all, `supported` is false and everything is granted.
    """

    def __init__(self, path: Path):
        self._path, self.supported = path, True
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, numbers: Sequence[int]) -> None:
        """Takes the locks of these numbers.

        Raises:
            BlockingIOError: Another process has one of them.
        """
        import fcntl  # not on Windows, where nothing but this needs it

        for start, count in _ranges(numbers):
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, start)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    self.supported = False
                    return
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise BlockingIOError(
                    error.errno,
                    f"another process is at work on shards of {self._path.parent}: wait until it "
                    "has ended, or stop it first",
                ) from error

    def __enter__(self) -> Locks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)  # gives every lock back


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found
