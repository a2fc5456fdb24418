"""Tokenised conversations on disk: a directory of ArrayRecord shards that is whole or says it is not.

    tokens.json                 what is tokenised, by what, into which form: written first
    shard-00000.array_record    records of `csm_jax.data.examples`
    shard-00000.json            the commit: written last, it makes the shard count; with its turns' lengths
    rejected.jsonl              conversations that were left out, where that was asked for
    manifest.json               all shards, their sizes and hashes; written when the last is committed

Nothing in them tells one run from another, so the same source gives the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.array_typing import Bool, Int
from csm_jax.corpus.files import sha256_of
from csm_jax.data.examples import Example, decode_record

PLAN, MANIFEST, REJECTED = "tokens.json", "manifest.json", "rejected.jsonl"
"""Names of a directory's files beside its shards."""
FORMAT, VERSION = "csm_jax tokens", 1
"""What a manifest and a plan begin with."""
RECORDS, COMMIT = ".array_record", ".json"
"""Endings of a shard's files."""

_TURNS = ("turns", "text", "frames", "trained")


def shard_name(number: int) -> str:
    """Returns a shard's file name without its ending."""
    return f"shard-{number:05d}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """The turns' lengths of many conversations.

    Attributes:
        first: Of each conversation, its first turn; and the number of all turns last.
        text: Text ids of each turn.
        frames: Frames of its audio.
        trained: Whether it is trained.
    """

    first: Int[np.ndarray, " n1"]
    text: Int[np.ndarray, " turns"]
    frames: Int[np.ndarray, " turns"]
    trained: Bool[np.ndarray, " turns"]


class Shards:
    """The conversations of a directory of tokens, by number."""

    def __init__(self, directory: Path):
        """Opens finished tokens, after checking that all shards are there in their sizes.

        Raises:
            FileNotFoundError: There is no such directory, or no manifest, or a shard is missing.
            ValueError: A file is damaged, or of another version.
        """
        self.directory, self.manifest = directory, read_manifest(directory)
        self.index = _read_index(directory, self.manifest)
        self._source: Any = None

    def __len__(self) -> int:
        return len(self.index.first) - 1

    def read(self, numbers: Sequence[int], *, facts: bool = False) -> list[Example]:
        """Returns conversations; may be called from several threads.

        Args:
            numbers: Which, in any order.
            facts: As `decode_record`.

        Raises:
            ValueError: A record is damaged.
        """
        source = self._source
        if source is None:
            source = self._source = self._open()
        # One by one: for many at once it starts threads, which takes longer than the reading.
        return [decode_record(source[number], facts=facts) for number in numbers]

    def _open(self) -> Any:
        array_record_module()
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        # With their ranges, so that no shard is opened before it is read.
        return ArrayRecordDataSource(
            [
                f"{self.directory / shard['name']}[0:{shard['records']}]"
                for shard in self.manifest["shards"]
            ]
        )


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest of a directory of finished tokens.

    Raises:
        FileNotFoundError: There is no such directory, or no manifest in it.
        NotADirectoryError: It is a file.
        ValueError: The manifest is damaged, or of another version.
    """
    if not directory.exists():
        raise FileNotFoundError(f"no directory {directory}")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, not a directory of tokens")
    path = directory / MANIFEST
    if not path.is_file():
        unfinished = (directory / PLAN).is_file()
        raise FileNotFoundError(
            f"{directory} has no {MANIFEST}: "
            + (
                "it is not finished; run the same `csm-jax data tokenize` again"
                if unfinished
                else "it holds no tokens of `csm-jax data tokenize`"
            )
        )
    manifest = read_json(path)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"{path} is {manifest.get('format')!r} version {manifest.get('version')!r}; this program "
            f"reads {FORMAT!r} version {VERSION}"
        )
    return manifest


def verify(directory: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yields each shard's name and what is wrong with it, None if nothing is; reads every byte."""
    for shard in manifest["shards"]:
        path = directory / shard["name"]
        if not path.is_file():
            yield shard["name"], "is missing"
        elif path.stat().st_size != shard["size"]:
            yield shard["name"], f"has {path.stat().st_size:,} bytes, not {shard['size']:,}"
        elif sha256_of(path) != shard["sha256"]:
            yield shard["name"], "is damaged: another SHA-256"
        else:
            yield shard["name"], None


def array_record_module() -> Any:
    """Returns array_record's module.

    Raises:
        ImportError: It is not installed; the message has the command.
    """
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise ImportError(
            "shards need array_record: pip install 'csm_jax[train]', or pip install array_record"
        ) from error


def _read_index(directory: Path, manifest: Mapping[str, Any]) -> Index:
    parts: dict[str, list[list[int]]] = {name: [] for name in _TURNS}
    for shard in manifest["shards"]:
        records = directory / shard["name"]
        if not records.is_file():
            raise FileNotFoundError(f"{records} is missing; {MANIFEST} lists it")
        if (size := records.stat().st_size) != shard["size"]:
            raise ValueError(
                f"{records} has {size:,} bytes, but {MANIFEST} says {shard['size']:,}: it is damaged"
            )
        path = records.with_suffix(COMMIT)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {MANIFEST} lists it")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["index_sha256"]:
            raise ValueError(
                f"{path} is not the file that {MANIFEST} was written with: it is damaged"
            )
        for name, values in json.loads(data)["turns"].items():
            parts[name].append(values)
    turns, text, frames, trained = (
        np.concatenate(
            [np.array(part, np.int64) for part in parts[name]] or [np.zeros(0, np.int64)]
        )
        for name in _TURNS
    )
    return Index(
        first=np.concatenate([[0], np.cumsum(turns)]).astype(np.int64),
        text=text,
        frames=frames,
        trained=trained.astype(bool),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file of this directory.

    Raises:
        ValueError: It is damaged.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return found
