"""Dialogue files: JSON Lines with one turn per line."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path


def read_dialogue(path: Path) -> list[tuple[int, str]]:
    """Returns the turns of a JSON Lines file as (speaker, text); blank lines are skipped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Lines are not `{"speaker": int, "text": str}`; all of them are listed.
    """
    try:
        # Some editors put a byte order mark first.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    turns: list[tuple[int, str]] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            turns.append(_turn(line))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    if not turns:
        raise ValueError(f"{path} holds no turns")
    return turns


def _turn(line: str) -> tuple[int, str]:
    try:
        turn = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON (nested too deeply)") from error
    except ValueError as error:  # Python's own limit, whose remedies are for programmers
        raise ValueError("a number in it has too many digits") from error
    if not isinstance(turn, dict) or set(turn) != {"speaker", "text"}:
        found = f"the keys {sorted(turn)}" if isinstance(turn, dict) else type(turn).__name__
        raise ValueError(f'must be {{"speaker": …, "text": …}}, got {found}')
    speaker, text = turn["speaker"], turn["text"]
    if isinstance(speaker, bool) or not isinstance(speaker, int) or speaker < 0:
        raise ValueError(
            f"speaker must be a whole number of 0 or more, got {reprlib.repr(speaker)}"
        )
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text must be a string that is not empty, got {reprlib.repr(text)}")
    return speaker, text
