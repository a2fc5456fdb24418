"""The end of a benchmark: its command and seconds, a card for people, and the whole result as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def report(
    name: str,
    measure: Callable[[], dict[str, Any]],
    card: Callable[[dict[str, Any]], str],
    *,
    argv: list[str] | None,
    path: Path | None,
) -> dict[str, Any]:
    """Returns what was measured, its command and its seconds, after printing a card and one JSON line.

    Args:
        name: Of the benchmark's file, without its ending.
        measure: Returns the figures.
        card: Returns the result for people.
        argv: The command's words; None for the process's own.
        path: Also takes the JSON; None for no file.
    """
    begun = time.perf_counter()
    result = measure()
    words = sys.argv[1:] if argv is None else argv
    result["command"] = " ".join(["python", f"benchmarks/{name}.py", *words])
    result["took_s"] = time.perf_counter() - begun
    print(card(result))
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result
