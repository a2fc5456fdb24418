"""Where conversations come from: JSON Lines, tars of recordings, or Parquet; one item at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm_jax.data.conversations import (
    Conversation,
    SchemaError,
    as_conversation,
    parse_line,
    read_lines,
)
from csm_jax.data.sounds import read_member, tar_members

SUFFIXES = (".jsonl", ".tar", ".parquet")
"""Endings of what can be read."""

_AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".au")
_CODES = ".codes.npy"
_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """What a source holds at one place.

    Attributes:
        where: For messages: the line, row or key.
        conversation: None where it is bad.
        problems: Why it is.
    """

    where: str
    conversation: Conversation | None = None
    problems: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of conversations, in order.

    Attributes:
        files: All of one ending, one of `SUFFIXES`.
        speaker: Of recordings in tars that name none.
        lang: Of items that name none.
    """

    files: tuple[Path, ...]
    speaker: int = 0
    lang: str | None = None

    def __iter__(self) -> Iterator[Item]:
        """Yields all items, reading as it goes; audio is not opened."""
        for file in self.files:
            prefix = f"{file.name}: " if len(self.files) > 1 else ""
            yield from _READERS[file.suffix.lower()](file, prefix, self)


def open_source(
    files: Sequence[str | Path], *, speaker: int | None = None, lang: str | None = None
) -> Source:
    """Returns the source of these files.

    Raises:
        FileNotFoundError, IsADirectoryError: One is not there, or is no file.
        ValueError: An ending is unknown, there are several kinds, or a speaker is given for other than
            tars.
    """
    paths = tuple(Path(file) for file in files)
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} is a directory; give the files in it, ending in {' or '.join(SUFFIXES)}"
            )
        if path.suffix.lower() not in _READERS:
            raise ValueError(
                f"{path} must end in {' or '.join(SUFFIXES)}; `csm-jax data import` turns other forms "
                "into .jsonl"
            )
    if len({path.suffix.lower() for path in paths}) != 1:
        raise ValueError("give one file or more, all of one kind")
    if speaker is not None and paths[0].suffix.lower() != ".tar":
        raise ValueError(
            f"--speaker is for recordings in tars; the lines of {paths[0].name} say who speaks (role)"
        )
    return Source(files=paths, speaker=speaker or 0, lang=lang)


def _read_jsonl(file: Path, prefix: str, source: Source) -> Iterator[Item]:
    for number, line in read_lines(file):
        where = f"{prefix}line {number}"
        if isinstance(line, ValueError):
            yield Item(where=where, problems=[str(line)])
        else:
            yield _item(where, lambda line=line: parse_line(line, file.parent), source.lang)


def _read_tar(file: Path, prefix: str, source: Source) -> Iterator[Item]:
    for key, given in tar_lines(file, speaker=source.speaker, lang=source.lang):
        where = f"{prefix}{key}"
        if isinstance(given, ValueError):
            yield Item(where=where, problems=[str(given)])
        else:
            yield _item(where, lambda given=given: as_conversation(given, file.parent), source.lang)


def _read_parquet(file: Path, prefix: str, source: Source) -> Iterator[Item]:
    from csm_jax.data.parquet import read_rows

    for number, given in enumerate(read_rows(file)):
        where = f"{prefix}row {number}"
        if isinstance(given, ValueError):
            yield Item(where=where, problems=[str(given)])
        else:
            yield _item(where, lambda given=given: as_conversation(given, file.parent), source.lang)


_READERS = {".jsonl": _read_jsonl, ".tar": _read_tar, ".parquet": _read_parquet}


def _item(where: str, parse: Callable[[], Conversation], lang: str | None) -> Item:
    try:
        found = parse()
    except SchemaError as error:
        return Item(where=where, problems=error.problems)
    if found.lang is None:
        found = dataclasses.replace(found, lang=lang)
    return Item(where=where, conversation=found)


# --- tars of recordings, in WebDataset's form ---------------------------------------------------


def tar_lines(
    path: Path, *, speaker: int, lang: str | None, speakers: dict[str, int] | None = None
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Yields (key, line of JSON as parsed) of the recordings of a tar, in its order.

    Members that share a name up to its ending belong together: a recording (or `.codes.npy`) and its
    `.json`, of which `text`, `speaker`, `language` or `lang`, and `id` are read, or its `.txt`. A speaker
    that is no number is not told apart from others.

    Args:
        path: The tar, not compressed.
        speaker: Where none is named.
        lang: Where none is named.
        speakers: Numbers of speakers who have names, to which new ones are added; None tells none apart.

    Raises:
        OSError, ValueError: It cannot be read as a tar.
    """
    keys: dict[str, dict[str, str]] = {}
    for name in tar_members(path):
        folder, _, last = name.rpartition("/")
        if last.startswith("."):
            continue
        stem, dot, ending = last.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        keys.setdefault(key, {})[f"{dot}{ending}".lower()] = name
    for key, members in keys.items():
        try:
            yield key, _tar_line(path, key, members, speaker, lang, speakers)
        except (ValueError, OSError) as error:
            yield key, ValueError(str(error))


def _tar_line(
    path: Path,
    key: str,
    members: dict[str, str],
    speaker: int,
    lang: str | None,
    speakers: dict[str, int] | None,
) -> dict[str, Any]:
    told: Any = {}
    if ".json" in members:
        told = json.loads(_text(path, members[".json"]))
        if not isinstance(told, dict):
            raise ValueError(f"{members['.json']} holds no JSON object")
    elif ".txt" in members:
        told = {"text": _text(path, members[".txt"]).strip()}
    else:
        raise ValueError(f"no .json or .txt beside {sorted(members.values())}")
    codes = members.get(_CODES)  # as `csm-jax batch` writes them: exact, and without the watermark
    sounds = [name for ending, name in members.items() if ending in _AUDIO]
    if codes is None and len(sounds) != 1:
        raise ValueError(f"must have one recording, got {sorted(members.values())}")
    if not isinstance(told.get("text"), str):
        raise ValueError(f"has no text; its keys are {sorted(told)[:20]}")
    audio = {"type": "audio"}
    audio["url" if codes is None else "codes"] = f"{path.name}#{codes or sounds[0]}"
    number = told.get("speaker")
    if isinstance(number, str) and number.isascii() and number.isdigit():
        number = int(number)
    elif isinstance(number, str) and number and speakers is not None:
        number = speakers.setdefault(number, len(speakers))
    line: dict[str, Any] = {
        "id": str(told.get("id") or key),
        "messages": [
            {
                "role": f"speaker_{number if type(number) is int and number >= 0 else speaker}",
                "content": [{"type": "text", "text": told["text"].strip()}, audio],
            }
        ],
    }
    language = told.get("language") or told.get("lang") or lang
    if isinstance(language, str):
        line["lang"] = language
    return line


def _text(path: Path, name: str) -> str:
    if tar_members(path)[name][1] > _MAX_TEXT_BYTES:
        raise ValueError(f"{name} is longer than {_MAX_TEXT_BYTES:,} bytes")
    data = read_member(path, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text") from error
