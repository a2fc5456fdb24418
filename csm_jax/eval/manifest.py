"""Reads what is to be evaluated: a manifest as `csm-jax batch` takes it, every line of which must be good.

Keys besides `csm_jax.corpus.manifest`'s, for recordings that are there: `audio_filepath`, and what their
model told of them (`finish_reason`, `flags`), as the `rows.jsonl` of an evaluation has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from csm_jax.corpus.manifest import Row, parser_of, read_lines
from csm_jax.eval.metrics import words_of

RECORDING = "audio_filepath"
"""The key of a row's recording."""

_LISTED = 5


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a manifest.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, or lines are bad or share an id; the first of them are listed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}")
    parse, rows, wrong = parser_of(path), [], []
    seen: dict[str, int] = {}
    for number, line in read_lines(path, lambda data: None):
        try:
            if isinstance(line, ValueError):
                raise line
            row = parse(line, number)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
            continue
        if (first := seen.setdefault(row["id"], number)) != number:
            wrong.append(f"line {number}: the id {row['id']!r} was given before, on line {first}")
            continue
        rows.append(row)
    if wrong:
        raise ValueError(f"{path}: {_listed(wrong, 'bad lines')}")
    if not rows:
        raise ValueError(f"{path} is empty: a manifest has a line for each sentence")
    return rows


def texts_of(rows: Sequence[Row], *, language: str) -> list[list[str]]:
    """Returns the words of each row's text.

    Raises:
        ValueError: Some have none, and no error rate; they are listed.
    """
    words = [words_of(row["text"], language=language) for row in rows]
    if empty := [row["id"] for row, found in zip(rows, words, strict=True) if not found]:
        raise ValueError(f"{_listed(empty, 'texts without a word')}: leave them out")
    return words


def recordings_of(rows: Sequence[Row], base: Path) -> list[Path | None]:
    """Returns the recording of each row; None where it is written as `null`: nothing was said.

    Args:
        rows: Of a manifest.
        base: What their paths are relative to.

    Raises:
        ValueError: Rows name none.
        FileNotFoundError: They are not there; they are listed.
    """
    found: list[Path | None] = []
    without, missing = [], []
    for row in rows:
        name = row.get("extra", {}).get(RECORDING, "")
        path = base / name if isinstance(name, str) and name else None
        if path is None and name is not None:
            without.append(row["id"])
        elif path is not None and not path.is_file():
            missing.append(str(path))
        found.append(path)
    if without:
        raise ValueError(
            f"{_listed(without, f'rows without {RECORDING}')}: say with --model what is to speak them, "
            "or name a recording of each"
        )
    if missing:
        raise FileNotFoundError(_listed(missing, "recordings are not there"))
    return found


def fact_of(row: Row, name: str) -> Any:
    """Returns what a row says beyond what requests need, None if it does not."""
    return row.get("extra", {}).get(name)


def read_sentences(path: Path, *, language: str) -> list[list[str]]:
    """Returns the words of the sentences in a file: one a line, or a manifest if it ends in `.jsonl`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no words, or is no UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no sentences at {path}")
    if path.suffix.lower() == ".jsonl":
        lines: Iterable[str] = (row["text"] for row in read_rows(path))
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    found = [words for line in lines if (words := words_of(line, language=language))]
    if not found:
        raise ValueError(f"{path} holds no words")
    return found


def _listed(items: Sequence[str], what: str) -> str:
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{len(items)} {what}: {'; '.join(items[:_LISTED])}{more}"
