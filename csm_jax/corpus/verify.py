"""Reads a corpus again, all of it, and tells what is not as it was planned and committed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csm_jax.config import SAMPLE_RATE
from csm_jax.corpus.files import PART, sha256_of
from csm_jax.corpus.manifest import key_of
from csm_jax.corpus.plan import ROWS, Plan, ShardPlan
from csm_jax.corpus.shard import (
    AUDIO,
    COMMIT,
    ERRORS,
    TAR,
    TEXT,
    files_by_shard,
    read_commit,
)


@dataclass(kw_only=True)
class Findings:
    """What `verify` found.

    Attributes:
        missing: Shards that are planned and not committed.
        unfinished: Files without a commit, of a run that goes on or was stopped; they do not count,
            and the next run removes them.
        extra: Files that belong to no shard of the plan.
        corrupt: What is damaged, one sentence each.
        duplicate: Rows that are there more than once.
        rows: Rows that are spoken and whole.
        failed: Rows that failed, as their commits tell.
        seconds: Audio in the rows that are spoken.
    """

    missing: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    rows: int = 0
    failed: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every planned row is there once, whole, or is known to have failed."""
        return not (self.missing or self.extra or self.corrupt or self.duplicate)

    def add(self, other: Findings) -> None:
        """Takes in what was found elsewhere."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def verify(plan: Plan, *, on_shard: Callable[[], None] = lambda: None) -> Findings:
    """Returns what is missing, extra, corrupt or there twice, after reading every byte.

    Args:
        plan: What should be there.
        on_shard: Called after every shard; may raise to stop.
    """
    found = Findings()
    if sha256_of(plan.directory / ROWS) != plan.rows_sha256:
        found.corrupt.append(f"{ROWS} is not the one that was planned")
        return found
    planned = {shard.name: shard for shard in plan.shards}
    there = files_by_shard(plan.shard_dir)
    for name, files in sorted(there.items()):
        expected = {name + ending for ending in (TAR, ERRORS, COMMIT)}
        for file in sorted(files):
            if file.endswith(PART) or (name in planned and name + COMMIT not in files):
                found.unfinished.append(file)
            elif name not in planned or file not in expected:
                found.extra.append(file)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        try:
            for each in threads.map(lambda shard: _verify_shard(plan, shard), plan.shards):
                found.add(each)
                on_shard()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return found


def _verify_shard(plan: Plan, shard: ShardPlan) -> Findings:
    found = Findings()
    path = plan.shard_dir / shard.name
    try:
        committed = read_commit(path, plan.fingerprint)
        if committed is None:
            found.missing.append(shard.name)
            return found
        rows = committed["rows"]
        found.rows, found.failed = len(rows), committed["failed"]
        found.seconds = sum(row["seconds"] for row in rows)
        counts = Counter(row["id"] for row in rows)
        found.duplicate += [f"{shard.name}: {row}" for row, n in counts.items() if n > 1]
        for what in _damage(plan, shard, committed):
            found.corrupt.append(f"{shard.name}: {what}")
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
        found.corrupt.append(f"{shard.name}: {error}")
    return found


def _damage(plan: Plan, shard: ShardPlan, committed: Mapping[str, Any]) -> Iterator[str]:
    path = plan.shard_dir / shard.name
    for name, file in committed["files"].items():
        if not (path.parent / name).is_file():
            yield f"{name} is missing"
            return
        if sha256_of(path.parent / name) != file["sha256"]:
            yield f"{name} does not have the SHA-256 of its commit"
    failed = [row["id"] for row in _failed(path, committed)]
    if len(failed) != committed["failed"]:
        yield f"the commit tells of {committed['failed']} failed rows, its file of {len(failed)}"
    if committed["count"] != len(committed["rows"]):
        yield f"the commit counts {committed['count']} rows and lists {len(committed['rows'])}"
    planned = [row["id"] for row in plan.read_rows(shard)]
    done = [row["id"] for row in committed["rows"]]
    if left := set(planned) - set(done) - set(failed):
        yield f"rows are missing: {', '.join(sorted(left)[:5])}"
    if more := (set(done) | set(failed)) - set(planned):
        yield f"rows are not of the plan: {', '.join(sorted(more)[:5])}"
    if both := set(done) & set(failed):
        yield f"rows are spoken and failed: {', '.join(sorted(both)[:5])}"
    yield from _damaged_members(path.with_name(path.name + TAR), committed["rows"])


def _failed(path: Path, committed: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = path.name + ERRORS
    if name not in committed["files"]:
        return []
    return [json.loads(line) for line in path.with_name(name).read_bytes().splitlines()]


def _damaged_members(path: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    expected = [
        (key_of(row["id"]) + ending, ending, sha256, row)
        for row in rows
        for ending, sha256 in row["sha256"].items()
    ]
    members = read_tar(path)
    for name, ending, sha256, row in expected:
        member = next(members, None)
        if member is None:
            yield f"{path.name} ends before {name}"
            return
        if member[0] != name:
            yield f"{path.name} holds {member[0]} where {name} belongs"
            return
        if hashlib.sha256(member[1]).hexdigest() != sha256:
            yield f"{name} does not have the SHA-256 of its commit"
        elif ending == AUDIO and (wrong := _wrong_audio(member[1], row)):
            yield f"{name} {wrong}"
        elif ending == TEXT and json.loads(member[1])["id"] != row["id"]:
            yield f"{name} is of another row"
    if (member := next(members, None)) is not None:
        yield f"{path.name} holds {member[0]}, which is not in its commit"


def _wrong_audio(data: bytes, row: Mapping[str, Any]) -> str | None:
    import soundfile

    try:
        audio, rate = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
    except soundfile.LibsndfileError as error:
        return f"cannot be decoded: {error.error_string}"
    if (rate, audio.shape) != (SAMPLE_RATE, (row["samples"], 1)):
        return f"has {audio.shape} samples at {rate} Hz, not {row['samples']} at {SAMPLE_RATE}"
    if abs(row["samples"] / SAMPLE_RATE - row["seconds"]) > 1e-9:
        return f"lasts {row['samples'] / SAMPLE_RATE} s, not {row['seconds']} as its commit says"
    return None


def read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, bytes) of a tar's files in order.

    Raises:
        tarfile.TarError: It is damaged.
    """
    with tarfile.open(path, "r|", bufsize=1 << 20) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                raise tarfile.ReadError(f"{path.name}: {member.name} is no file")
            yield member.name, file.read()
