"""Figures of an evaluation with their 95 % confidence intervals, and its JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.eval.metrics import Errors, bootstrap, wilson
from csm_jax.eval.run import Measured, Speed

FORMAT = 1
"""Version of the JSON."""

_DIGITS = 6


def summarise(rows: Sequence[Measured], *, seed: int, speed: Speed | None = None) -> dict[str, Any]:
    """Returns the figures of all rows; None stands for what was not measured.

    Rows that failed are counted and are in no other figure. A row in which nothing was said is: all its
    words are missing.

    Args:
        rows: All of them.
        seed: Of the bootstrap.
        speed: Of the synthesis.
    """
    good = [row for row in rows if row.error is None]
    figures: dict[str, Any] = {
        "rows": len(rows),
        "failed": len(rows) - len(good),
        "empty": sum(row.spoken.audio is None for row in good),
        "redraws": sum(row.spoken.redraws for row in good),
        "wer": _error_rate([row.words for row in good], seed),
        "cer": _error_rate([row.characters for row in good], seed),
        "sentences_right": _share(
            None if row.words is None else row.words.count == 0 for row in good
        ),
        "stop_rate": _share(row.stopped for row in good),
        "repetition_rate": _share(row.looped for row in good),
        "stutter_rate": _share(None if row.repeated is None else row.repeated > 0 for row in good),
        "silence_rate": _share(row.silent for row in good),
        "watermark_rate": _share(row.watermarked for row in good),
        "agreement": _agreement(good),
        "real_time_factor": None,
    }
    heard = [(row, row.facts) for row in good if row.facts is not None]
    measures: dict[str, Callable[[Measured, Any], float]] = {
        "seconds": lambda row, facts: facts.seconds,
        "spoken_s": lambda row, facts: facts.spoken_s,
        "longest_silence_s": lambda row, facts: facts.longest_silence_s,
        "trailing_silence_s": lambda row, facts: facts.trailing_silence_s,
    }
    for name, measured in measures.items():
        figures[name] = spread([measured(row, facts) for row, facts in heard])
    rated = [(row, facts) for row, facts in heard if facts.spoken_s > 0]
    figures["words_per_minute"] = spread(
        [60 * len(row.own) / facts.spoken_s for row, facts in rated]
    )
    figures["characters_per_second"] = spread(
        [len(" ".join(row.own)) / facts.spoken_s for row, facts in rated]
    )
    if speed is not None:
        figures["real_time_factor"] = {
            "value": _round(speed.wall_s / speed.audio_s) if speed.audio_s else None,
            "wall_s": _round(speed.wall_s),
            "audio_s": _round(speed.audio_s),
        }
    return figures


def by_speaker(rows: Sequence[Measured], *, seed: int) -> dict[str, dict[str, Any]]:
    """Returns some of the figures for each speaker."""
    names = ("rows", "failed", "wer", "cer", "stop_rate", "words_per_minute")
    found = {}
    for speaker in sorted({row.speaker for row in rows}):
        whole = summarise([row for row in rows if row.speaker == speaker], seed=seed)
        found[str(speaker)] = {name: whole[name] for name in names}
    return found


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Returns mean, standard deviation and percentiles of values; None of none."""
    if not values:
        return None
    points = np.percentile(values, (0, 5, 50, 95, 100))
    names = ("min", "p5", "median", "p95", "max")
    return {
        "mean": _round(np.mean(values)),
        "std": _round(np.std(values)),
        **{name: _round(value) for name, value in zip(names, points, strict=True)},
    }


def as_json(row: Measured, base: Path) -> dict[str, Any]:
    """Returns a row for the JSON; paths below `base` are written relative to it."""
    facts = {} if row.facts is None else dataclasses.asdict(row.facts)
    return {
        "id": row.id,
        "speaker": row.speaker,
        "text": row.text,
        "said": " ".join(row.said),
        "heard": None if row.heard is None else " ".join(row.heard),
        "audio": None if row.spoken.audio is None else relative(row.spoken.audio, base),
        "words": None if row.words is None else dataclasses.asdict(row.words),
        "characters": None if row.characters is None else dataclasses.asdict(row.characters),
        **{name: _round(value) for name, value in facts.items()},
        "finish_reason": row.spoken.finish_reason,
        "flags": None if row.spoken.flags is None else list(row.spoken.flags),
        "redraws": row.spoken.redraws,
        "silent": row.silent,
        "repeated_words": row.repeated,
        "watermarked": row.watermarked,
        "agreement": None if row.agreement is None else dataclasses.asdict(row.agreement),
        "error": row.error,
    }


def relative(path: Path, base: Path) -> str:
    """Returns a path as it is written in a file of the directory `base`."""
    path, base = path.resolve(), base.resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _error_rate(counted: Iterable[Errors | None], seed: int) -> dict[str, Any] | None:
    found = [errors for errors in counted if errors is not None]
    if not found:
        return None
    totals = {
        name: sum(getattr(errors, name) for errors in found)
        for name in ("hits", "substitutions", "deletions", "insertions")
    }
    counts, lengths = [each.count for each in found], [each.length for each in found]
    low, high = bootstrap(counts, lengths, seed=seed)
    return {
        "value": _round(sum(counts) / sum(lengths)),
        "low": _round(low),
        "high": _round(high),
        "of": sum(lengths),
        **totals,
    }


def _share(known: Iterable[bool | None]) -> dict[str, Any] | None:
    values = [value for value in known if value is not None]
    if not values:
        return None
    low, high = wilson(sum(values), len(values))
    return {
        "value": _round(sum(values) / len(values)),
        "low": _round(low),
        "high": _round(high),
        "count": sum(values),
        "of": len(values),
    }


def _agreement(rows: Sequence[Measured]) -> dict[str, Any] | None:
    known = [row.agreement for row in rows if row.agreement is not None]
    if not known:
        return None
    frames = sum(each.frames for each in known)
    differing = [
        float(each.first_difference) for each in known if each.first_difference is not None
    ]
    books = np.sum([each.equal for each in known], axis=0)
    return {
        "identical": _share(each.first_difference is None for each in known),
        "frames": frames,
        "equal_codes": _round(books.mean() / frames) if frames else None,
        "by_codebook": [_round(count / frames) for count in books] if frames else None,
        "first_difference": spread(differing),
    }


def _round(value: Any) -> float:
    return round(float(value), _DIGITS)
