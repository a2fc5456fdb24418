"""An evaluation as one HTML file; recordings beside it can be played in it."""

from __future__ import annotations

import functools
import html
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from csm_jax.eval.metrics import Step, align
from csm_jax.eval.run import Measured
from csm_jax.eval.summary import relative
from csm_jax.html_report import ALARM, INK, SOFT, Markup, draw, escaped, page, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_LISTED = 30
_STYLE = """
del{color:#b5452c}ins{color:#2a5d84;text-decoration:none;font-style:italic}
dd small{display:block;font-size:.8rem;color:#666}
audio{height:1.8rem;width:14rem}td{vertical-align:top}
"""


def render(document: Mapping[str, Any], rows: Sequence[Measured], base: Path) -> str:
    """Returns the report's HTML.

    Args:
        document: The evaluation's JSON.
        rows: What it was made of.
        base: Where the report will be; recordings below it are linked.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
    """
    summary = document["summary"]
    heading = f"Evaluation of {document['model'] or 'recordings'}"
    sections = []
    speakers = document["speakers"]
    if len(speakers) > 1:
        sections.append(
            table(
                "Speakers",
                ("speaker", "rows", "word error rate", "character error rate", "words a minute"),
                [
                    (
                        name,
                        one["rows"],
                        _rate(one["wer"]),
                        _rate(one["cer"]),
                        _mean(one["words_per_minute"], ".0f"),
                    )
                    for name, one in speakers.items()
                ],
            )
        )
    if summary["wer"] is not None:
        sections.append(_errors(summary["wer"]))
        sections.append(_confusions(rows))
        sections.append(_worst(rows, base))
    flagged = [row for row in rows if row.looped or row.silent or row.stopped is False]
    sections.append(
        table(
            "Rows that did not end, repeat themselves or fall silent, the first of them",
            ("id", "ended", "flags", "text", "recording"),
            [
                (
                    row.id,
                    row.spoken.finish_reason or "",
                    ", ".join(
                        [*(["repetition"] * bool(row.looped)), *(["silence"] * bool(row.silent))]
                    ),
                    row.text,
                    _player(row, base),
                )
                for row in flagged[:_LISTED]
            ],
        )
    )
    sections.append(
        table(
            "Rows that failed, the first of them",
            ("id", "error"),
            [(row.id, row.error) for row in rows if row.error is not None][:_LISTED],
        )
    )
    return page(
        heading,
        heading,
        {name: _small(value) for name, value in numbers(summary).items()},
        draw(_plots(rows), extra="eval"),
        sections,
        notes=_told(document),
        style=_STYLE,
    )


def numbers(summary: Mapping[str, Any]) -> dict[str, str]:
    """Returns the figures for people, by name; those that were not measured are left out."""
    found = {
        "word error rate": _rate(summary["wer"]),
        "character error rate": _rate(summary["cer"]),
        "sentences all right": _rate(summary["sentences_right"]),
        "ended by themselves": _rate(summary["stop_rate"]),
        "repeat themselves (codes)": _rate(summary["repetition_rate"]),
        "repeat words (heard)": _rate(summary["stutter_rate"]),
        "fall silent": _rate(summary["silence_rate"]),
        "watermark read": _rate(summary["watermark_rate"]),
        "seconds": _mean(summary["seconds"], ".2f"),
        "words a minute": _mean(summary["words_per_minute"], ".0f"),
        "real-time factor": _factor(summary["real_time_factor"]),
        "codes equal to the other model's": _share_of_codes(summary["agreement"]),
        "rows": f"{summary['rows']:,}",
        "failed": f"{summary['failed']:,}" if summary["failed"] else "",
        "nothing said": f"{summary['empty']:,}" if summary["empty"] else "",
        "drawn again": f"{summary['redraws']:,}" if summary["redraws"] else "",
    }
    return {name: value for name, value in found.items() if value}


def _small(value: str) -> Markup:
    # The interval below its figure.
    figure, bracket, interval = escaped(value).partition(" (")
    return Markup(f"{figure}<small>{bracket}{interval}</small>" if bracket else figure)


def _told(document: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Manifest {document['manifest']['path']}; csm_jax {document['csm_jax']}, {document['created']}. "
        "In brackets: 95 % confidence, over sentences."
    ]
    if document["recogniser"] is not None:
        lines.append(f"Heard by {document['recogniser']}.")
    if document["settings"]["shuffle_text"]:
        lines.append(
            "Negative control: each recording is compared with another sentence's text, so the word error "
            "rate should be about 100 %, or more. (Letters are alike in any two sentences.)"
        )
    return lines


def _rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return ""
    return f"{rate['value']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


def _mean(values: Mapping[str, float] | None, form: str) -> str:
    return "" if values is None else f"{values['mean']:{form}} ± {values['std']:{form}}"


def _factor(factor: Mapping[str, Any] | None) -> str:
    return "" if factor is None or factor["value"] is None else f"{factor['value']:.3f}"


def _share_of_codes(agreement: Mapping[str, Any] | None) -> str:
    if agreement is None or agreement["equal_codes"] is None:
        return ""
    return f"{agreement['equal_codes']:.1%}"


# --- tables ------------------------------------------------------------------------------------


def _errors(wer: Mapping[str, Any]) -> str:
    return table(
        "Words",
        ("said", "heard right", "heard as another", "not heard", "heard besides"),
        [[f"{wer[name]:,}" for name in ("of", "hits", "substitutions", "deletions", "insertions")]],
    )


def _confusions(rows: Sequence[Measured]) -> str:
    counted: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for step in align(row.said, row.heard) if row.heard is not None else ():
            if step.kind == "replace":
                counted.update(zip(step.said, step.heard, strict=True))
            elif step.kind == "delete":
                counted.update((word, "") for word in step.said)
            elif step.kind == "insert":
                counted.update(("", word) for word in step.heard)
    return table(
        "Most frequent errors",
        ("said", "heard", "times"),
        [
            (said or "(nothing)", heard or "(nothing)", n)
            for (said, heard), n in counted.most_common(20)
        ],
    )


def _worst(rows: Sequence[Measured], base: Path) -> str:
    wrong = [(row, row.words) for row in rows if row.words is not None and row.words.count]
    wrong.sort(key=lambda pair: (-pair[1].count / pair[1].length, -pair[1].count, pair[0].id))
    return table(
        "Worst sentences",
        ("id", "errors", "said, and what was heard instead", "recording"),
        [
            (
                row.id,
                f"{words.count} of {words.length}",
                _marked(align(row.said, row.heard or ())),
                _player(row, base),
            )
            for row, words in wrong[:_LISTED]
        ],
    )


def _marked(steps: Iterable[Step]) -> Markup:
    parts = []
    for step in steps:
        said, heard = (escaped(" ".join(words)) for words in (step.said, step.heard))
        if step.kind == "equal":
            parts.append(said)
            continue
        parts += [f"<del>{said}</del>"] * bool(said) + [f"<ins>{heard}</ins>"] * bool(heard)
    return Markup(" ".join(parts))


def _player(row: Measured, base: Path) -> str:
    if row.spoken.audio is None:
        return ""
    path = relative(row.spoken.audio, base)
    if Path(path).is_absolute():
        return path
    return Markup(f'<audio controls preload="none" src="{html.escape(quote(path))}"></audio>')


# --- plots -------------------------------------------------------------------------------------


def _plots(rows: Sequence[Measured]) -> dict[str, Callable[[Axes], None]]:
    counted = [row.words for row in rows if row.words is not None]
    facts = [(row, row.facts) for row in rows if row.facts is not None]
    found: dict[str, Callable[[Axes], None]] = {}
    if counted:
        rates = [min(1.0, each.count / each.length) for each in counted]
        found["word error rate of sentences"] = functools.partial(_rates, rates=rates)
        lengths: dict[int, list[int]] = {}
        for each in counted:
            lengths.setdefault(each.length, []).append(each.count)
        found["word error rate by length"] = functools.partial(_by_length, lengths=lengths)
    if facts:
        seconds = [each.seconds for _, each in facts]
        found["duration of rows"] = functools.partial(_histogram, values=seconds, xlabel="seconds")
        paces = [60 * len(row.own) / each.spoken_s for row, each in facts if each.spoken_s > 0]
        if paces:
            found["speaking rate"] = functools.partial(
                _histogram, values=paces, xlabel="words a minute, without silence before and after"
            )
    books = [row.agreement for row in rows if row.agreement is not None and row.agreement.frames]
    if books:
        frames = sum(each.frames for each in books)
        shares = [
            sum(column) / frames for column in zip(*(each.equal for each in books), strict=True)
        ]
        found["codes equal to the other model's"] = functools.partial(_books, shares=shares)
    return found


def _rates(axes: Axes, rates: Sequence[float]) -> None:
    axes.hist(rates, bins=[i / 20 for i in range(21)], color=INK)
    axes.set(xlabel="share of a sentence's words (1: all, or more)", ylabel="sentences")
    _in_whole_numbers(axes.yaxis)


def _by_length(axes: Axes, lengths: Mapping[int, Sequence[int]]) -> None:
    words = sorted(lengths)
    axes.bar(words, [sum(lengths[n]) / (n * len(lengths[n])) for n in words], color=ALARM)
    axes.set(xlabel="words of a sentence", ylabel="word error rate", ylim=(0, None))
    counts = axes.twinx()
    counts.plot(words, [len(lengths[n]) for n in words], ".-", color=SOFT)
    counts.set_ylabel("sentences", color=SOFT)
    counts.set_ylim(0, None)
    counts.spines[["top"]].set_visible(False)
    _in_whole_numbers(axes.xaxis, counts.yaxis)


def _histogram(axes: Axes, values: Sequence[float], xlabel: str) -> None:
    axes.hist(values, bins=min(60, 5 + len(values) // 4), color=INK)
    axes.set(xlabel=xlabel, ylabel="rows")
    _in_whole_numbers(axes.yaxis)


def _in_whole_numbers(*scales: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    for scale in scales:
        scale.set_major_locator(MaxNLocator(integer=True))


def _books(axes: Axes, shares: Sequence[float]) -> None:
    axes.bar(range(len(shares)), shares, color=INK)
    axes.set(xlabel="codebook", ylabel="share of frames", ylim=(0, 1))
