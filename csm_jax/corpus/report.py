"""One HTML file that tells how a corpus went, made from its commits alone."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.corpus.shard import COMMIT
from csm_jax.html_report import ALARM, INK, SOFT, page, table
from csm_jax.html_report import draw as draw_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LISTED = 100


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
    return page(
        title,
        f"Corpus {title}",
        numbers,
        draw(facts),
        (
            table("Why rows failed", ("error", "rows"), facts.errors.most_common(20)),
            table("Flagged rows, the first of them", ("id", "shard", "flags"), facts.flagged_rows),
        ),
    )


# --- plots -------------------------------------------------------------------------------------


def draw(facts: Facts) -> dict[str, bytes]:
    """Returns the plots as PNG files, by what they show.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
    """
    plots = {
        "duration of rows": functools.partial(_durations, facts=facts),
        "real-time factor of shards": functools.partial(_factors, facts=facts),
        "finish reasons, flags and failures": functools.partial(_ends, facts=facts),
        "audio committed over time": functools.partial(_throughput, facts=facts),
    }
    return draw_plots(plots, extra="corpus")


def _durations(axes: Axes, facts: Facts) -> None:
    axes.hist(facts.seconds, bins=min(60, 5 + len(facts.seconds) // 4), color=INK)
    axes.set(xlabel="seconds", ylabel="rows")


def _factors(axes: Axes, facts: Facts) -> None:
    factors = [shard["busy_s"] / shard["audio_s"] for shard in facts.shards if shard["audio_s"]]
    axes.hist(factors, bins=min(40, 5 + len(factors) // 4), color=INK)
    axes.set(xlabel="computing seconds per second of audio, of one process", ylabel="shards")


def _ends(axes: Axes, facts: Facts) -> None:
    bars = [(reason, count, INK) for reason, count in facts.reasons.most_common()]
    bars += [(f"flag: {flag}", count, SOFT) for flag, count in facts.flags.most_common()]
    bars.append(("failed", facts.failed, ALARM))
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
        [t / unit for t in times], [s / 3600 for s in total], color=INK, drawstyle="steps-post"
    )
    axes.set(xlabel=f"{name} since the first row", ylabel="hours of audio", ylim=(0, None))
    rates = axes.twinx()
    rates.plot(
        [(shard["finished"] - start) / unit for shard in shards],
        [shard["audio_s"] / max(shard["busy_s"], 1e-9) for shard in shards],
        ".",
        color=ALARM,
        alpha=0.5,
        markersize=4,
    )
    rates.set_ylabel("audio-s/s of each shard's process", color=ALARM)
    rates.set_ylim(0, None)
    rates.spines[["top"]].set_visible(False)
