"""The plan of a corpus: which rows are spoken, in which shards, by what.

Rows of about one length stand together, longest first, because slots that read windows of one size
waste least; within a length, rows that share a voice stand together. Shards hold between half of the
wanted audio and all of it. The order is a function of the rows alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.corpus.files import Locks, Staged, publish, sha256_of, stage
from csm_jax.corpus.manifest import Row, parser_of, read_lines

FORMAT = 1
"""Version of the directory's layout."""
PLAN, ROWS, REJECTED, SHARDS, LOCK = "plan.json", "rows.jsonl", "rejected.jsonl", "shards", "lock"

_CHARACTERS_PER_SECOND = 15.0  # of English read at an even pace
_LONGEST_S = 90.0
_LENGTHS_PER_DOUBLING = 2  # rows within a factor of 1.4 count as one length
_BUFFER = 1 << 20

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Where the rows of one shard stand in the file of rows.

    Attributes:
        index: Number of the shard.
        rows: How many there are.
        offset: First byte.
        size: Bytes.
        seconds: Estimated audio.
    """

    index: int
    rows: int
    offset: int
    size: int
    seconds: float

    @property
    def name(self) -> str:
        """The shard's name, without an ending."""
        return f"shard-{self.index:05d}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned corpus.

    Attributes:
        directory: Where it is.
        fingerprint: Hash of `identity`.
        identity: All that decides what is spoken and how it sounds.
        launch: What a run needs besides, such as where the model is; not part of the fingerprint.
        base: The manifest's directory; paths in rows are relative to it.
        shards: In order.
        rows: How many rows are planned.
        rejected: How many lines of the manifest are not.
        rows_sha256: Of the file of rows.
    """

    directory: Path
    fingerprint: str
    identity: Mapping[str, Any]
    launch: Mapping[str, Any]
    base: Path
    shards: tuple[ShardPlan, ...]
    rows: int
    rejected: int
    rows_sha256: str

    @property
    def seed(self) -> int:
        """The corpus's seed."""
        return self.identity["seed"]

    @property
    def shard_dir(self) -> Path:
        """Where the shards are."""
        return self.directory / SHARDS

    @property
    def seconds(self) -> float:
        """Estimated audio."""
        return sum(shard.seconds for shard in self.shards)

    def read_rows(self, shard: ShardPlan) -> list[Row]:
        """Returns the rows of one shard.

        Raises:
            ValueError: The file of rows is not the one that was planned.
        """
        with (self.directory / ROWS).open("rb") as file:
            file.seek(shard.offset)
            lines = file.read(shard.size).splitlines()
        if len(lines) != shard.rows:
            raise ValueError(
                f"{self.directory / ROWS} is damaged: {shard.name} should have {shard.rows} rows, "
                f"found {len(lines)}; plan again in another directory"
            )
        return [json.loads(line) for line in lines]


def row_seed(corpus_seed: int, row: Row) -> int:
    """Returns the row's own seed, or else one made from the corpus's and the row's id."""
    if "seed" in row:
        return row["seed"]
    digest = hashlib.blake2b(f"{corpus_seed}\0{row['id']}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def read_plan(directory: Path) -> Plan:
    """Returns the plan in a directory.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another version.
    """
    path = directory / PLAN
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no corpus is planned in {directory}: there is no {PLAN}; "
            "csm-jax batch plan MANIFEST --out DIR makes one"
        ) from None
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']}, and this version reads {FORMAT}")
        if found["fingerprint"] != _fingerprint(found["identity"]):
            raise ValueError("its fingerprint is not that of its identity; it was edited")
        return _from_json(directory, found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def make_plan(
    manifest: Path,
    directory: Path,
    *,
    identity: Mapping[str, Any],
    launch: Mapping[str, Any],
    seed: int,
    shard_minutes: float,
    strict: bool = False,
    on_progress: Callable[[int], None] = lambda lines: None,
) -> Plan:
    """Returns the plan of a manifest, written to `directory`; the one there, if it is the same.

    Bad rows are left out, one line each in `rejected.jsonl`: text that is missing, empty or not UTF-8,
    an id seen before, a line too long, a value of the wrong type, a recording that is not there, a
    voice that is not in `identity`.

    Args:
        manifest: JSON Lines, or `.lst` of seed-tts; see `csm_jax.corpus.manifest`.
        directory: Made if need be.
        identity: What decides how rows sound: JSON with at least `model`, `tokenizer`, `voices` (name
            to key; those that no row uses are left out) and `options`.
        launch: What a run needs besides; JSON.
        seed: The corpus's seed.
        shard_minutes: Most audio of a shard, estimated; shards have between half of it and all.
        strict: Refuse a manifest with bad rows.
        on_progress: Called now and then with the lines read.

    Raises:
        FileNotFoundError: There is no such manifest.
        ValueError: No row is good, or one is bad and `strict`, or the directory holds the plan of something else.
        OSError: The directory cannot be written, or another process is at work in it.
    """
    if not shard_minutes > 0:
        raise ValueError(f"shard_minutes must be more than 0, got {shard_minutes}")
    if not manifest.is_file():
        raise FileNotFoundError(f"no manifest at {manifest}")
    identity = {
        **identity,
        "manifest": sha256_of(manifest),
        "seed": seed,
        "shard_minutes": shard_minutes,
    }
    if (directory / PLAN).exists():
        return _check_again(read_plan(directory), identity)
    (directory / SHARDS).mkdir(parents=True, exist_ok=True)
    with Locks(directory / LOCK) as locks:
        locks.take([0])
        if (directory / PLAN).exists():  # another process was faster
            return _check_again(read_plan(directory), identity)
        _sweep(directory)
        return _write_plan(
            manifest,
            directory,
            identity=identity,
            launch=launch,
            shard_s=shard_minutes * 60,
            strict=strict,
            on_progress=on_progress,
        )


def _check_again(plan: Plan, identity: Mapping[str, Any]) -> Plan:
    # Of the voices that are known, the plan tells of those that its rows use.
    voices = {name: identity["voices"].get(name) for name in plan.identity["voices"]}
    return check_same(plan, {**identity, "voices": voices})


def check_same(plan: Plan, identity: Mapping[str, Any]) -> Plan:
    """Returns `plan` if it is of this identity.

    Args:
        plan: What is in the directory.
        identity: What is asked for; keys that it lacks are not compared.

    Raises:
        ValueError: It is not; the message says in what they differ.
    """
    different = sorted(
        f"{name}.{inner}" if inner else name
        for name, value in json.loads(json.dumps(identity)).items()
        for inner in _differences(plan.identity.get(name), value)
    )
    if different:
        raise ValueError(
            f"{plan.directory} holds another corpus: different are {', '.join(different)}; use another "
            "directory, or what it was planned with"
        )
    return plan


def _differences(planned: Any, asked: Any) -> list[str]:
    if planned == asked:
        return []
    if isinstance(planned, dict) and isinstance(asked, dict):
        names = planned.keys() | asked.keys()
        return [name for name in names if planned.get(name) != asked.get(name)]
    return [""]


def _fingerprint(identity: Mapping[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _sweep(directory: Path) -> None:
    for leftover in directory.glob(".*.part"):
        leftover.unlink(missing_ok=True)


# --- reading the manifest ----------------------------------------------------------------------


class _Rows:
    """The good rows of a manifest: a few numbers of each in memory, the rest in a scratch file."""

    def __init__(self, scratch: Any):
        self._scratch, self._buffer, self._end = scratch, bytearray(), 0
        self.offset, self.size, self.line = array("q"), array("l"), array("q")
        self.seconds, self.voice = array("d"), array("L")
        self.digest = bytearray()
        self.voices: set[str] = set()

    def __len__(self) -> int:
        return len(self.size)

    def add(self, row: Row) -> None:
        """Takes a row."""
        if "voice" in row:
            self.voices.add(row["voice"])
        data = _encode(row).encode() + b"\n"
        self.offset.append(self._end)
        self.size.append(len(data))
        self.line.append(row["line"])
        self.seconds.append(_estimate_s(row))
        voice = row.get("voice") or (row["context"][0]["audio"] if "context" in row else "")
        self.voice.append(zlib.crc32(voice.encode()) if voice else 0)
        self.digest += hashlib.blake2b(row["id"].encode(), digest_size=16).digest()
        self._end += len(data)
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        """Puts what was taken on disk."""
        self._scratch.write(self._buffer)
        self._scratch.flush()
        self._buffer.clear()

    def read(self, index: int) -> bytes:
        """Returns a row's line."""
        return os.pread(self._scratch.fileno(), self.size[index], self.offset[index])

    def duplicates(self) -> dict[int, int]:
        """Returns {row: the first row of the same id}, for every one but the first."""
        halves = np.frombuffer(bytes(self.digest), np.uint64).reshape(-1, 2)
        order = np.lexsort(
            (halves[:, 1], halves[:, 0])
        )  # stable: the first in the file comes first
        same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
        found: dict[int, int] = {}
        for at in np.flatnonzero(same).tolist():
            before, row = int(order[at]), int(order[at + 1])
            found[row] = found.get(before, before)
        return found

    def order(self) -> np.ndarray:
        """Returns the rows in the order of the shards."""
        seconds = np.frombuffer(self.seconds, np.float64)
        length = np.floor(np.log2(seconds) * _LENGTHS_PER_DOUBLING)
        line = np.frombuffer(self.line, np.int64)
        return np.lexsort((line, -seconds, np.asarray(self.voice), -length))


def _estimate_s(row: Row) -> float:
    seconds = row.get("duration") or 0.5 + len(row["text"]) / _CHARACTERS_PER_SECOND
    cap = row.get("max_audio_length_ms")
    return max(0.1, min(seconds, _LONGEST_S if cap is None else cap / 1000))


def _write_plan(
    manifest: Path,
    directory: Path,
    *,
    identity: Mapping[str, Any],
    launch: Mapping[str, Any],
    shard_s: float,
    strict: bool,
    on_progress: Callable[[int], None],
) -> Plan:
    base = manifest.resolve().parent
    staged: list[Staged] = []
    rejected: list[Row] = []
    digest = hashlib.sha256()
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as scratch:
            rows = _Rows(scratch)
            known = frozenset(identity["voices"])
            for number, row in _parsed(manifest, base, known, digest.update):
                if isinstance(row, ValueError):
                    rejected.append({"line": number, "error": str(row)})
                else:
                    rows.add(row)
                if number % 10_000 == 0:
                    on_progress(number)
            rows.flush()
            if digest.hexdigest() != identity["manifest"]:
                raise ValueError(f"{manifest} was changed while it was read; plan again")
            twice = rows.duplicates()
            for row, first in sorted(twice.items()):
                rejected.append(
                    {
                        "line": rows.line[row],
                        "id": json.loads(rows.read(row))["id"],
                        "error": f"this id was given before, on line {rows.line[first]}",
                    }
                )
            order = rows.order()
            if twice:
                order = order[~np.isin(order, np.fromiter(twice, np.int64))]
            rejected.sort(key=lambda row: row["line"])
            if not len(order) or (strict and rejected):
                what = f"{len(rejected)} bad rows" if len(order) else "no good row"
                first = "".join(f"; line {r['line']}: {r['error']}" for r in rejected[:3])
                raise ValueError(f"{manifest} holds {what}{first}")
            shards = _cut(rows, order, shard_s)
            staged.append(stage(directory / ROWS, _pieces(rows, order)))
            staged.append(
                stage(directory / REJECTED, (_encode(row).encode() + b"\n" for row in rejected))
            )
        used = {name: identity["voices"][name] for name in sorted(rows.voices)}
        identity = {**identity, "voices": used}
        found = {
            "format": FORMAT,
            "fingerprint": _fingerprint(identity),
            "identity": identity,
            "launch": launch,
            "base": str(base),
            "rows": {"count": len(order), "sha256": staged[0].sha256},
            "rejected": len(rejected),
            "shards": [[s.rows, s.offset, s.size, round(s.seconds, 3)] for s in shards],
        }
        # The plan last: with it, the directory holds a corpus.
        publish(staged)
        staged.append(stage(directory / PLAN, [json.dumps(found, indent=1).encode()]))
        publish(staged[-1:])
    finally:
        for file in staged:
            file.discard()
    return read_plan(directory)


def _parsed(
    manifest: Path, base: Path, voices: frozenset[str], on_bytes: Callable[[bytes], None]
) -> Iterator[tuple[int, Row | ValueError]]:
    parse = parser_of(manifest)
    is_file = lru_cache(1 << 16)(os.path.isfile)
    for number, line in read_lines(manifest, on_bytes):
        if isinstance(line, ValueError):
            yield number, line
            continue
        if not line.strip():
            continue
        try:
            row = parse(line, number)
            if "voice" in row and row["voice"] not in voices:
                known = f"known are {', '.join(sorted(voices)[:20])}" if voices else "none is known"
                raise ValueError(f"no voice {row['voice']!r}; {known}")
            for turn in row.get("context", ()):
                if not is_file(os.path.join(base, turn["audio"])):
                    raise ValueError(f"no recording at {os.path.join(base, turn['audio'])}")
        except ValueError as error:
            yield number, error
        else:
            yield number, row


def _cut(rows: _Rows, order: np.ndarray, shard_s: float) -> list[ShardPlan]:
    seconds = np.frombuffer(rows.seconds, np.float64)[order]
    sizes = np.asarray(rows.size, np.int64)[order]
    total = float(seconds.sum())
    middle = np.cumsum(seconds) - seconds / 2
    number = np.floor(middle / total * max(1, np.ceil(total / shard_s))).astype(np.int64)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    ends = np.append(starts[1:], len(order))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return [
        ShardPlan(
            index=index,
            rows=int(end - start),
            offset=int(offsets[start]),
            size=int(offsets[end] - offsets[start]),
            seconds=float(seconds[start:end].sum()),
        )
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _pieces(rows: _Rows, order: np.ndarray) -> Iterator[bytes]:
    buffer = bytearray()
    for index in order.tolist():
        buffer += rows.read(index)
        if len(buffer) >= _BUFFER:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer)


def _from_json(directory: Path, found: Mapping[str, Any]) -> Plan:
    return Plan(
        directory=directory,
        fingerprint=found["fingerprint"],
        identity=found["identity"],
        launch=found["launch"],
        base=Path(found["base"]),
        shards=tuple(
            ShardPlan(index=index, rows=rows, offset=offset, size=size, seconds=seconds)
            for index, (rows, offset, size, seconds) in enumerate(found["shards"])
        ),
        rows=found["rows"]["count"],
        rejected=found["rejected"],
        rows_sha256=found["rows"]["sha256"],
    )
