"""Other forms of training data, as lines of our schema.

sesame-finetune   a table with path, text and, where given, start, end, speaker: .json, .jsonl, .csv,
                  .sql (SQLite, table `data`) or .parquet (knottwill/sesame-finetune)
csm-mlx           a JSON list of {text, audio_path, speaker_id}, or of lists of them (senstella/csm-mlx)
transformers      a JSON list, or JSON Lines, of chats: [{"role": "0", "content": [...]}, ...]
ljspeech          a folder with metadata.csv (id|text|normalised text) and wavs/
webdataset        tars of recordings with .json or .txt beside them, as Emilia's
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm_jax.data.conversations import MAX_LINE_BYTES
from csm_jax.data.sources import tar_lines

Line = dict[str, Any]

SESAME_FINETUNE_SPEAKER = 999
"""The speaker of sesame-finetune's rows that name none (knottwill/sesame-finetune `pretokenize.py`)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to import.

    Attributes:
        target: The directory of the file to write, which its paths are relative to.
        speaker: Where none is named; None is the form's own default.
        lang: Where none is named.
        speakers: Numbers of speakers who have names, to which new ones are added; None tells none apart.
    """

    target: Path
    speaker: int | None = None
    lang: str | None = None
    speakers: dict[str, int] | None = None


def lines_of(form: str, sources: Sequence[Path], options: Options) -> Iterator[Line]:
    """Yields the lines of sources in another form.

    Args:
        form: One of `FORMS`.
        sources: Files, or a folder for "ljspeech".
        options: How.

    Raises:
        OSError, ValueError: Something is not there, or not of this form; the message says where.
    """
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"no file {source}")
        if source.is_dir() != (form == "ljspeech"):
            wanted = "a folder" if form == "ljspeech" else "a file"
            raise ValueError(f"{source} is not {wanted}, which {form} is")
        for number, line in enumerate(FORMS[form](source, options), start=1):
            if options.lang is not None:
                line.setdefault("lang", options.lang)
            if not line["messages"]:
                raise ValueError(f"{source}: entry {number} has no messages")
            yield line


# --- the forms ---------------------------------------------------------------------------------


def _sesame_finetune(source: Path, options: Options) -> Iterator[Line]:
    default = SESAME_FINETUNE_SPEAKER if options.speaker is None else options.speaker
    for number, row in enumerate(_rows(source), start=1):
        where = f"{source}: row {number}"
        times = {
            key: value
            for key in ("start", "end")
            if (value := _seconds(row.get(key), key, where)) is not None
        }
        audio = {"url": _path(_need(row, "path", where), source, options), **times}
        speaker = _whole(row.get("speaker"), default, where)
        yield {"messages": [_message(speaker, _need(row, "text", where), audio)]}


def _csm_mlx(source: Path, options: Options) -> Iterator[Line]:
    default = 0 if options.speaker is None else options.speaker
    given = _json(source)
    if not isinstance(given, list):
        raise ValueError(f"{source} must hold a JSON list, got {type(given).__name__}")
    for number, entry in enumerate(given, start=1):
        where = f"{source}: entry {number}"
        samples = entry if isinstance(entry, list) else [entry]
        messages = []
        for sample in samples:
            if not isinstance(sample, dict):
                raise ValueError(f"{where} must be an object or a list of them")
            audio = {"url": _path(_need(sample, "audio_path", where), source, options)}
            speaker = _whole(sample.get("speaker_id"), default, where)
            messages.append(_message(speaker, _need(sample, "text", where), audio))
        yield {"messages": messages}


_SPEAKER = re.compile(r"(?:speaker_)?(\d{1,9})", re.ASCII)


def _transformers(source: Path, options: Options) -> Iterator[Line]:
    for number, entry in enumerate(_json_entries(source), start=1):
        where = f"{source}: entry {number}"
        chat = entry
        if isinstance(entry, dict):
            chat = next(
                (entry[k] for k in ("messages", "conversation", "conversations") if k in entry),
                None,
            )
        if not isinstance(chat, list):
            raise ValueError(f"{where} must be a chat: a list of messages")
        yield {"messages": [_chat_message(message, where, source, options) for message in chat]}


def _chat_message(given: Any, where: str, source: Path, options: Options) -> Line:
    found = _SPEAKER.fullmatch(str(given.get("role"))) if isinstance(given, dict) else None
    if found is None:
        raise ValueError(f'{where}: a message must have a role such as "0", got {str(given)[:60]}')
    content = given.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{where}: content must be a text or a list of objects")
    told = []
    for item in items:
        if item.get("type") == "text":
            told.append({"type": "text", "text": _need(item, "text", where)})
        elif item.get("type") == "audio":
            path = next(
                (item[key] for key in ("path", "url", "audio") if isinstance(item.get(key), str)),
                None,
            )
            if path is None:
                raise ValueError(f"{where}: an audio must name a file under path, url or audio")
            told.append({"type": "audio", "url": _path(path, source, options)})
        else:
            raise ValueError(f"{where}: an item must be text or audio, got {str(item)[:60]}")
    return {"role": f"speaker_{found[1]}", "content": told}


def _ljspeech(source: Path, options: Options) -> Iterator[Line]:
    table = source / "metadata.csv"
    if not table.is_file():
        raise FileNotFoundError(f"no {table}")
    speaker = 0 if options.speaker is None else options.speaker
    with table.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(file, start=1):
            if not row.strip():
                continue
            fields = row.rstrip("\r\n").split("|")
            if len(fields) < 2:
                raise ValueError(
                    f"{table}: line {number} must be id|text or id|text|normalised text"
                )
            name = fields[0] if Path(fields[0]).suffix else f"{fields[0]}.wav"
            audio = {"url": _path(str(Path("wavs") / name), table, options)}
            # The last column has numbers and abbreviations written out.
            text = (fields[2] if len(fields) > 2 and fields[2].strip() else fields[1]).strip()
            yield {"id": fields[0], "messages": [_message(speaker, text, audio)]}


def _webdataset(source: Path, options: Options) -> Iterator[Line]:
    speaker = 0 if options.speaker is None else options.speaker
    for key, given in tar_lines(
        source, speaker=speaker, lang=options.lang, speakers=options.speakers
    ):
        if isinstance(given, ValueError):
            raise ValueError(f"{source}: {key}: {given}")
        audio = given["messages"][0]["content"][1]
        place = "url" if "url" in audio else "codes"
        audio[place] = _path(audio[place], source, options)
        yield given


FORMS: Mapping[str, Callable[[Path, Options], Iterator[Line]]] = {
    "sesame-finetune": _sesame_finetune,
    "csm-mlx": _csm_mlx,
    "transformers": _transformers,
    "ljspeech": _ljspeech,
    "webdataset": _webdataset,
}
"""Every form by the name the command line has for it (`arguments.FORMS` lists them)."""


# --- parts -------------------------------------------------------------------------------------


def _message(speaker: int, text: str, audio: Mapping[str, Any]) -> Line:
    content = [{"type": "text", "text": text}, {"type": "audio", **audio}]
    return {"role": f"speaker_{speaker}", "content": content}


def _path(path: str, source: Path, options: Options) -> str:
    """Returns a path of a file beside `source` as it is written: relative if it lies below the target."""
    full = Path(os.path.abspath(source.parent / path))
    target = Path(os.path.abspath(options.target))
    return (full.relative_to(target) if full.is_relative_to(target) else full).as_posix()


def _rows(source: Path) -> Iterator[Mapping[str, Any]]:
    ending = source.suffix.lower()
    if ending == ".csv":
        yield from _csv(source)
    elif ending == ".parquet":
        from csm_jax.data.parquet import read_table

        yield from read_table(source)
    elif ending in (".sql", ".db", ".sqlite"):
        yield from _sql(source)
    elif ending in (".json", ".jsonl"):
        for number, entry in enumerate(_json_entries(source), start=1):
            if not isinstance(entry, dict):
                raise ValueError(f"{source}: row {number} must be an object, got {str(entry)[:60]}")
            yield entry
    else:
        hint = "; a pickle can run anything, so it is not read" if ending == ".pkl" else ""
        raise ValueError(f"{source} must end in .json, .jsonl, .csv, .sql or .parquet{hint}")


def _csv(source: Path) -> Iterator[Mapping[str, Any]]:
    with source.open(encoding="utf-8-sig", newline="") as file:
        rows, number = csv.DictReader(file), 0
        try:
            for row in rows:
                number += 1
                yield row
        except csv.Error as error:
            raise ValueError(f"{source}: row {number + 1} cannot be read: {error}") from error


def _sql(source: Path) -> Iterator[Mapping[str, Any]]:
    import sqlite3

    try:
        with closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            yield from (dict(row) for row in database.execute("SELECT * FROM data"))
    except sqlite3.Error as error:
        raise ValueError(f"{source} is no SQLite file with a table data: {error}") from error


def _json(source: Path) -> Any:
    try:
        return json.loads(source.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error


def _json_entries(source: Path) -> Iterator[Any]:
    if source.suffix.lower() != ".jsonl":
        given = _json(source)
        if isinstance(given, dict) and all(isinstance(part, dict) for part in given.values()):
            # pandas's form: columns of {row: value}
            rows = {row for column in given.values() for row in column}
            order = sorted(
                rows, key=lambda row: (not row.isdigit(), int(row) if row.isdigit() else 0)
            )
            yield from ({name: column.get(row) for name, column in given.items()} for row in order)
            return
        if not isinstance(given, list):
            raise ValueError(f"{source} must hold a JSON list, got {type(given).__name__}")
        yield from given
        return
    with source.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{source}: line {number} is not JSON: {error}") from error


def _need(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} has no {name}; it has {sorted(map(str, row))[:20]}")
    return value


def _seconds(value: Any, name: str, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {name} must be seconds, got {str(value)[:60]}") from error
    return None if math.isnan(number) else number


def _whole(value: Any, default: int, where: str) -> int:
    number = _seconds(value, "speaker", where)
    if number is None:
        return default
    if number < 0 or number != int(number):
        raise ValueError(f"{where}: the speaker must be a whole number, got {str(value)[:60]}")
    return int(number)
