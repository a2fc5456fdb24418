"""One HTML file that tells how a corpus went, made from its commits alone."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.corpus.shard import COMMIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _SOFT, _ALARM = "#2a5d84", "#9fb8c9", "#b5452c"
_LISTED = 100
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:1rem}
dt{color:#666;font-size:.85rem}dd{margin:0;font-size:1.3rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(28rem,1fr));gap:1rem}
img{width:100%}table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left}
"""


@dataclass(kw_only=True)
class Facts:
    """What the report needs of all commits: numbers, not rows.

    Attributes:
        seconds: Of each spoken row.
        reasons: Finish reasons, with their counts.
        flags: Flags, with the rows that carry them.
        flagged: Rows that are flagged.
        flagged_rows: (id, shard, flags) of the first of them.
        errors: Why rows failed, with counts.
        failed: Rows that failed.
        redraws: How often rows were drawn again.
        shards: Each shard's run, with the seconds of audio in it as `audio_s`.
    """

    seconds: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    flagged: int = 0
    flagged_rows: list[tuple[str, str, str]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    redraws: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)


def read_facts(directory: Path) -> Facts:
    """Returns the facts of a corpus's commits.

    Raises:
        ValueError: There are none, or one is damaged.
    """
    facts = Facts()
    for path in sorted((directory / "shards").glob(f"shard-*{COMMIT}")):
        try:
            _take(facts, json.loads(path.read_bytes()), path.name.removesuffix(COMMIT))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    if not facts.shards:
        raise ValueError(f"{directory} has no committed shard to report on")
    return facts


def _take(facts: Facts, commit: Mapping[str, Any], name: str) -> None:
    facts.failed += commit["failed"]
    facts.errors.update(commit["errors"])
    facts.reasons.update(commit["finish_reasons"])
    for row in commit["rows"]:
        facts.seconds.append(row["seconds"])
        facts.redraws += row["redraws"]
        facts.flags.update(row["flags"])
        if row["flags"]:
            facts.flagged += 1
            if len(facts.flagged_rows) < _LISTED:
                facts.flagged_rows.append((row["id"], name, ", ".join(row["flags"])))
    facts.shards.append({"audio_s": commit["seconds"], **commit["run"]})


def write_report(directory: Path, target: Path) -> None:
    """Writes the report of a corpus as one HTML file without links to others.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
        ValueError: Nothing is committed, or a commit is damaged.
        OSError: The file cannot be written.
    """
    from csm_jax.corpus.files import place

    place(target, render(read_facts(directory), directory.resolve().name).encode())


def render(facts: Facts, title: str) -> str:
    """Returns the report's HTML."""
    hours = sum(facts.seconds) / 3600
    busy = sum(shard["busy_s"] for shard in facts.shards)
    processes = {(shard["host"], shard["process"]) for shard in facts.shards}
    last = time.strftime(
        "%Y-%m-%d %H:%M UTC", time.gmtime(max(s["finished"] for s in facts.shards))
    )
    numbers = {
        "audio": f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.1f} min",
        "rows spoken": f"{len(facts.seconds):,}",
        "rows failed": f"{facts.failed:,}",
        "rows flagged": f"{facts.flagged:,}",
        "drawn again": f"{facts.redraws:,}",
        "shards": f"{len(facts.shards):,}",
        "processes": f"{len(processes):,}",
        "audio-seconds per second, per process": f"{hours * 3600 / max(busy, 1e-9):,.1f}",
        "last commit": last,
    }
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers.items()
    )
    plots = "".join(
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for alt, png in draw(facts).items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>Corpus {html.escape(title)}</h1><dl>{cells}</dl>"
        f'<h2>How it went</h2><div class="plots">{plots}</div>'
        + _table("Why rows failed", ("error", "rows"), facts.errors.most_common(20))
        + _table("Flagged rows, the first of them", ("id", "shard", "flags"), facts.flagged_rows)
        + "</html>\n"
    )


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    if not lines:
        return f"<h2>{title}</h2><p>None.</p>"
    first = "".join(f"<th>{name}</th>" for name in head)
    return f"<h2>{title}</h2><table><tr>{first}</tr>{''.join(lines)}</table>"


# --- plots -------------------------------------------------------------------------------------


def draw(facts: Facts) -> dict[str, bytes]:
    """Returns the plots as PNG files, by what they show.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the report's plots need matplotlib: pip install 'csm_jax[corpus]', or pip install matplotlib"
        ) from error
    found = {}
    plots: dict[str, Callable[[Axes, Facts], None]] = {
        "duration of rows": _durations,
        "real-time factor of shards": _factors,
        "finish reasons, flags and failures": _ends,
        "audio committed over time": _throughput,
    }
    for alt, plot in plots.items():
        figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        plot(axes, facts)
        axes.set_title(alt, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        found[alt] = image.getvalue()
    return found


def _durations(axes: Axes, facts: Facts) -> None:
    axes.hist(facts.seconds, bins=min(60, 5 + len(facts.seconds) // 4), color=_INK)
    axes.set(xlabel="seconds", ylabel="rows")


def _factors(axes: Axes, facts: Facts) -> None:
    factors = [shard["busy_s"] / shard["audio_s"] for shard in facts.shards if shard["audio_s"]]
    axes.hist(factors, bins=min(40, 5 + len(factors) // 4), color=_INK)
    axes.set(xlabel="computing seconds per second of audio, of one process", ylabel="shards")


def _ends(axes: Axes, facts: Facts) -> None:
    bars = [(reason, count, _INK) for reason, count in facts.reasons.most_common()]
    bars += [(f"flag: {flag}", count, _SOFT) for flag, count in facts.flags.most_common()]
    bars.append(("failed", facts.failed, _ALARM))
    names, counts, colors = zip(*reversed(bars), strict=True)
    drawn = axes.barh(names, counts, color=colors)
    axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.set(xlabel="rows")


def _throughput(axes: Axes, facts: Facts) -> None:
    shards = sorted(facts.shards, key=lambda shard: shard["finished"])
    start = min(shard["started"] for shard in shards)
    times, total = [0.0], [0.0]
    for shard in shards:
        times.append(shard["finished"] - start)
        total.append(total[-1] + shard["audio_s"])
    unit, name = next(
        (u, n)
        for u, n in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if times[-1] >= 2 * u or u == 1
    )
    axes.plot(
        [t / unit for t in times], [s / 3600 for s in total], color=_INK, drawstyle="steps-post"
    )
    axes.set(xlabel=f"{name} since the first row", ylabel="hours of audio", ylim=(0, None))
    rates = axes.twinx()
    rates.plot(
        [(shard["finished"] - start) / unit for shard in shards],
        [shard["audio_s"] / max(shard["busy_s"], 1e-9) for shard in shards],
        ".",
        color=_ALARM,
        alpha=0.5,
        markersize=4,
    )
    rates.set_ylabel("audio-s/s of each shard's process", color=_ALARM)
    rates.set_ylim(0, None)
    rates.spines[["top"]].set_visible(False)
