"""One shard: its members, its tar, and the commit that makes it count.

The tar is a function of the rows alone: members in the plan's order, no times, no owners. So a shard
that is made again has the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.audio import check_audio, encode_audio
from csm_jax.config import SAMPLE_RATE
from csm_jax.corpus.files import Staged, place, publish, stage, sync_directory
from csm_jax.corpus.manifest import SETTINGS, Row, key_of

AUDIO, CODES, TEXT = ".flac", ".codes.npy", ".json"
"""Endings of a row's members, in their order."""
TAR, ERRORS, COMMIT = ".tar", ".errors.jsonl", ".json"
"""Endings of a shard's files."""

_BLOCK = 512
_KEPT = ("id", "line", "text", "speaker", "voice", "context", *SETTINGS, "extra")


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A row that was spoken.

    Attributes:
        key: Its members' name without their ending.
        members: Ending to bytes, in the order of the tar.
        record: Its part of the commit.
    """

    key: str
    members: Mapping[str, bytes]
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A row that was not.

    Attributes:
        id: The row's.
        line: In the manifest.
        error: Why.
    """

    id: str
    line: int
    error: str


def encode_row(
    row: Row, result: Any, *, seed: int, heard: Sequence[str], provenance: Mapping[str, Any]
) -> Spoken | Failed:
    """Returns a row's members and record, or why there are none.

    Args:
        row: As planned.
        result: What the synthesizer gave for it.
        seed: What it was spoken with.
        heard: SHA-256 of the files of its context's recordings.
        provenance: What every row of the corpus shares.
    """
    if result.finish_reason in ("error", "cancelled") or result.audio is None:
        return Failed(
            id=row["id"], line=row["line"], error=result.error or f"it was {result.finish_reason}"
        )
    if not len(result.audio):
        return Failed(
            id=row["id"],
            line=row["line"],
            error="the model ended at once, without audio; another seed may speak",
        )
    try:
        flac = encode_audio(check_audio(result.audio, "the audio"), SAMPLE_RATE, "FLAC")
    except ValueError as error:
        return Failed(id=row["id"], line=row["line"], error=str(error))
    samples = len(result.audio)
    facts = {
        "seconds": samples / SAMPLE_RATE,
        "samples": samples,
        "frames": len(result.codes),
        "finish_reason": result.finish_reason,
        "flags": list(result.flags),
        "redraws": result.redraws,
    }
    told = {name: row[name] for name in _KEPT if name in row}
    if heard:
        told["context"] = [
            {**turn, "sha256": sha256} for turn, sha256 in zip(told["context"], heard, strict=True)
        ]
    told |= {"seed": seed, "sample_rate": SAMPLE_RATE, **facts, **provenance}
    members = {
        AUDIO: flac,
        CODES: _npy(result.codes),
        TEXT: json.dumps(told, ensure_ascii=False).encode(),
    }
    sha256 = {ending: hashlib.sha256(data).hexdigest() for ending, data in members.items()}
    return Spoken(
        key=key_of(row["id"]),
        members=members,
        record={"id": row["id"], **facts, "sha256": sha256},
    )


def _npy(codes: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    # Codes are below 2,051: half the bytes.
    small = codes.size == 0 or (codes.min() >= 0 and codes.max() < 1 << 15)
    np.save(encoded, codes.astype("<i2" if small else "<i4"), allow_pickle=False)
    return encoded.getvalue()


def tar_entry(name: str, data: bytes) -> bytes:
    """Returns a tar's entry without time, owner or rights of anybody's."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % _BLOCK)


TAR_END = b"\0" * (2 * _BLOCK)
"""What a tar ends with."""


def _tar(rows: Sequence[Spoken]) -> Iterator[bytes]:
    for row in rows:
        for ending, data in row.members.items():
            yield tar_entry(row.key + ending, data)
    yield TAR_END


def commit(
    path: Path,
    rows: Sequence[Spoken | Failed],
    *,
    fingerprint: str,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what was committed, after writing a shard's files so that they are all there or do not count.

    Args:
        path: The shard's files without their endings.
        rows: In the plan's order.
        fingerprint: The plan's.
        run: Who made it and when; the only part that differs from one run to the next.

    Raises:
        OSError: Something could not be written; the shard is not committed then, and no file under a
            temporary name is left.
    """
    spoken = [row for row in rows if isinstance(row, Spoken)]
    failed = [row for row in rows if isinstance(row, Failed)]
    staged: list[Staged] = []
    try:
        staged.append(stage(path.with_name(path.name + TAR), _tar(spoken)))
        if failed:
            lines = (json.dumps(vars(row), ensure_ascii=False).encode() + b"\n" for row in failed)
            staged.append(stage(path.with_name(path.name + ERRORS), lines))
        records = [row.record for row in spoken]
        found = {
            "fingerprint": fingerprint,
            "count": len(spoken),
            "failed": len(failed),
            "seconds": sum(record["seconds"] for record in records),
            "finish_reasons": dict(Counter(record["finish_reason"] for record in records)),
            "flagged": [record["id"] for record in records if record["flags"]],
            "errors": dict(Counter(row.error for row in failed).most_common(20)),
            "files": {
                file.target.name: {"size": file.size, "sha256": file.sha256} for file in staged
            },
            "rows": records,
            "run": dict(run),
        }
        publish(staged)
        place(path.with_name(path.name + COMMIT), json.dumps(found, ensure_ascii=False).encode())
        return found
    finally:
        for file in staged:
            file.discard()


def read_commit(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Returns what is committed of a shard, None if nothing is.

    Args:
        path: The shard's files without their endings.
        fingerprint: The plan's.

    Raises:
        ValueError: There is a commit, but it is damaged or another corpus's.
    """
    file = path.with_name(path.name + COMMIT)
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict) or found.keys() < {"fingerprint", "files", "rows", "failed"}:
        raise ValueError(f"{file} is damaged: it is no commit")
    if found["fingerprint"] != fingerprint:
        raise ValueError(f"{file} is of another corpus, {found['fingerprint']}")
    return found


def is_whole(path: Path, found: Mapping[str, Any]) -> bool:
    """Returns whether a committed shard's files are there in their sizes; `verify` looks inside."""
    try:
        return all(
            path.with_name(name).stat().st_size == file["size"]
            for name, file in found["files"].items()
        )
    except FileNotFoundError:
        return False


def withdraw(path: Path, names: Collection[str]) -> None:
    """Removes files of a shard, the commit first.

    Args:
        path: The shard's files without their endings.
        names: Those that are there.

    Raises:
        OSError: Something could not be removed; the message names it.
    """
    last = path.name + COMMIT
    for name in sorted(names, key=lambda name: name != last):
        path.with_name(name).unlink(missing_ok=True)
        if name == last:
            sync_directory(path.parent)


def files_by_shard(directory: Path) -> dict[str, list[str]]:
    """Returns {shard: names of its files}, finished or not; other files are under their own names."""
    found: dict[str, list[str]] = {}
    for entry in os.scandir(directory):
        found.setdefault(entry.name.lstrip(".").split(".")[0], []).append(entry.name)
    return found
