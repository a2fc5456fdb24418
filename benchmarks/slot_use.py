"""How full the engine keeps its slots: the real engine on a simulated device, against static batches.

    python benchmarks/slot_use.py                 # 64 slots, 3,200 utterances, some seconds
    python benchmarks/slot_use.py --slots 256 --frame-ms 12

Lengths are log-normal, 4.9 s in the middle and 5.7 s on average, about those of read speech, and 0.2 % of the
rows do not end by themselves. Slot use is the share of all slots' frames that were kept. What counts in the
end is audio per second of the device, idle or not: there, the host's work and the prefills count as well,
at the seconds given (`--frame-ms` and the others). Static batches begin together and end with their longest
row; they are given their best case, no chunks and no time of the host.

The first figures are of a queue that never runs dry; with its end, when the last rows run alone, follow.
The host's own work per chunk is measured, not simulated. The last line is the whole result as JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the simulated device lives with the tests

import numpy as np  # noqa: E402

from benchmarks.report import report  # noqa: E402
from csm_jax.config import FRAME_MS, csm_1b  # noqa: E402
from csm_jax.engine import Engine  # noqa: E402
from csm_jax.runaway import frame_cap  # noqa: E402
from csm_jax.slots import SlotSizes  # noqa: E402
from tests.support.simulated import Costs, SimulatedSlots, job  # noqa: E402

MEDIAN_S, SIGMA = 4.9, 0.55
SHORTEST_S, LONGEST_S = 0.8, 30.0
RUNAWAYS = 0.002
CHARACTERS_PER_S, SPEAKER_SIGMA = 15.0, 0.15
"""English read aloud, with spaces, and how much speakers differ from it."""
CAPACITY, PROMPT = 2048, 32


def lognormal_seconds(
    rng: np.random.Generator, count: int, *, median: float = MEDIAN_S, longest: float = LONGEST_S
) -> np.ndarray:
    """Returns seconds of utterances."""
    return np.clip(rng.lognormal(np.log(median), SIGMA, count), SHORTEST_S, longest)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An utterance: frames until it ends by itself, and the frames after which it is ended."""

    frames: int
    cap: int

    @property
    def made(self) -> int:
        """Frames that are made of it."""
        return min(self.frames, self.cap)


def workload(count: int, *, seed: int, text_cap: bool = False) -> list[Row]:
    """Returns utterances in random order.

    Args:
        count: How many.
        seed: Of everything random.
        text_cap: End rows at the cap of their text (`csm_jax.runaway`) instead of at a full slot.
    """
    rng = np.random.default_rng(seed)
    seconds = lognormal_seconds(rng, count)
    rate = CHARACTERS_PER_S * rng.lognormal(0.0, SPEAKER_SIGMA, count)
    endless = np.zeros(count, bool)
    endless[rng.choice(count, round(RUNAWAYS * count), replace=False)] = True
    full = CAPACITY - PROMPT
    rows = []
    for s, characters, runs in zip(seconds, seconds * rate, endless, strict=True):
        cap = min(full, frame_cap("a" * round(characters))) if text_cap else full
        rows.append(Row(frames=10 * full if runs else round(s * 1000 / FRAME_MS), cap=cap))
    return rows


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a way of batching comes to.

    Attributes:
        slot_use: Kept frames over all slots' frames, while the queue was not empty.
        whole_slot_use: The same to the end of the last row.
        audio_s_per_s: Audio per second, while the queue was not empty.
        rows_per_prefill: Prompts that were read at a time, at the price of a full group.
    """

    slot_use: float
    whole_slot_use: float
    audio_s_per_s: float
    rows_per_prefill: float


def continuous(
    rows: Sequence[Row],
    *,
    slots: int,
    chunk_frames: int,
    look_ahead: bool,
    costs: Costs,
    together: bool = False,
) -> Outcome:
    """Returns what the engine makes of the rows.

    Args:
        rows: Utterances.
        slots: Of the batch.
        chunk_frames: Frames per call.
        look_ahead: See `csm_jax.engine`.
        costs: What things take.
        together: Give the engine new rows only when all slots are empty: static batches.
    """
    device, engine = _engine(slots, chunk_frames, costs, look_ahead=look_ahead)
    waiting = [job(r.frames, config=device.config, max_frames=r.cap, prompt=PROMPT) for r in rows]
    waiting.reverse()
    steady = (0, 1, 1.0)
    while waiting or engine.busy:
        if not together or not engine.busy:
            for _ in range(min(len(waiting), slots - engine.queued)):
                engine.submit(waiting.pop())
        engine.step()
        if waiting:
            steady = (engine.stats.frames, engine.stats.slot_frames, device.now)
    frames, slot_frames, seconds = steady
    return Outcome(
        slot_use=frames / slot_frames,
        whole_slot_use=engine.stats.slot_use,
        audio_s_per_s=frames * FRAME_MS / 1000 / seconds,
        rows_per_prefill=len(rows) / device.prefills,
    )


def static(rows: Sequence[Row], *, slots: int, costs: Costs, by_length: bool = False) -> Outcome:
    """Returns what batches come to that start together and end with their longest row.

    Args:
        rows: Utterances.
        slots: Rows of a batch.
        costs: What things take; prompts are read together, at one price.
        by_length: Sort by length first, as if it were known: runaways come last.
    """
    made = [row.made for row in rows]
    if by_length:
        made.sort()
    batches = [made[i : i + slots] for i in range(0, len(made), slots)]
    steps = sum(max(batch) for batch in batches)
    use = sum(made) / (slots * steps)
    seconds = steps * costs.frame_s + len(batches) * costs.prefill_s
    return Outcome(
        slot_use=use,
        whole_slot_use=use,
        audio_s_per_s=sum(made) * FRAME_MS / 1000 / seconds,
        rows_per_prefill=len(made) / len(batches),
    )


def host_us_per_chunk(*, slots: int, chunk_frames: int, rows: int, seed: int) -> dict[str, float]:
    """Returns real microseconds of the engine's own work per chunk: the median, 95th percentile, mean."""
    device, engine = _engine(slots, chunk_frames, Costs(), look_ahead=True)
    for row in workload(rows, seed=seed, text_cap=True):
        engine.submit(job(row.frames, config=device.config, max_frames=row.cap, prompt=PROMPT))
    laps = []
    while engine.queued:
        begun, spent = time.perf_counter(), device.spent
        engine.step()
        laps.append(time.perf_counter() - begun - (device.spent - spent))
    laps = 1e6 * np.array(laps[2:])  # the first fill every slot
    return {
        "median": float(np.median(laps)),
        "p95": float(np.quantile(laps, 0.95)),
        "mean": float(laps.mean()),
        "chunks": len(laps),
    }


def _engine(
    slots: int, chunk_frames: int, costs: Costs, *, look_ahead: bool
) -> tuple[SimulatedSlots, Engine]:
    sizes = SlotSizes(slots=slots, capacity=CAPACITY, chunk_frames=chunk_frames, prefill_rows=8)
    device = SimulatedSlots(csm_1b(), sizes, costs)
    return device, Engine(device, look_ahead=look_ahead, stop_repetition=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns all figures."""
    costs = Costs(
        frame_s=args.frame_ms / 1000,
        prefill_s=args.prefill_ms / 1000,
        chunk_host_s=args.host_ms / 1000,
        start_host_s=args.host_ms / 1000,
    )
    rows = workload(args.requests, seed=args.seed)
    capped = workload(args.requests, seed=args.seed, text_cap=True)
    ways: dict[str, Outcome] = {
        "static": static(rows, slots=args.slots, costs=costs),
        "static, sorted by length": static(rows, slots=args.slots, costs=costs, by_length=True),
    }
    for look_ahead in (True, False):
        for chunk in args.chunks:
            name = f"chunks of {chunk}" + (", look-ahead" if look_ahead else "")
            ways[name] = continuous(
                rows, slots=args.slots, chunk_frames=chunk, look_ahead=look_ahead, costs=costs
            )
    chunk = args.chunks[0]
    ways["static, caps from the text"] = static(capped, slots=args.slots, costs=costs)
    ways[f"chunks of {chunk}, look-ahead, caps from the text"] = continuous(
        capped, slots=args.slots, chunk_frames=chunk, look_ahead=True, costs=costs
    )
    endless = [row.frames > CAPACITY for row in rows]
    return {
        "slots": args.slots,
        "requests": args.requests,
        "seconds_mean": float(
            np.mean([r.frames for r, e in zip(rows, endless, strict=True) if not e])
        )
        * FRAME_MS
        / 1000,
        "ways": {name: vars(outcome) for name, outcome in ways.items()},
        "runaways": {
            "rows": sum(endless),
            "frames_each": CAPACITY - PROMPT,
            "frames_each_with_text_cap": float(
                np.mean([r.made for r, e in zip(capped, endless, strict=True) if e] or [0])
            ),
            "others_cut_by_text_cap": sum(
                r.cap < r.frames for r, e in zip(capped, endless, strict=True) if not e
            ),
        },
        "host_us_per_chunk": host_us_per_chunk(
            slots=args.host_slots,
            chunk_frames=args.host_chunk,
            rows=12 * args.host_slots,
            seed=args.seed,
        ),
        "host_slots": args.host_slots,
        "host_chunk": args.host_chunk,
    }


def card(result: dict[str, Any]) -> str:
    """Returns the result for people."""
    plain = result["ways"]["static"]["audio_s_per_s"]
    lines = [
        f"{result['slots']} slots · {result['requests']:,} utterances of {result['seconds_mean']:.1f} s on "
        f"average · {result['runaways']['rows']} of them without an end",
        f"  {'':46s} slot use  to the end  audio-s/s  of static  rows/prefill",
    ]
    for name, way in result["ways"].items():
        lines.append(
            f"  {name:46s} {way['slot_use']:8.1%} {way['whole_slot_use']:11.1%} "
            f"{way['audio_s_per_s']:10.0f} {way['audio_s_per_s'] / plain:9.2f}× {way['rows_per_prefill']:12.1f}"
        )
    runaways, host = result["runaways"], result["host_us_per_chunk"]
    lines += [
        f"a row without an end takes {runaways['frames_each']:,} frames, with the cap of its text "
        f"{runaways['frames_each_with_text_cap']:.0f}; that cap cuts {runaways['others_cut_by_text_cap']} "
        "of the others",
        f"host work per chunk of {result['host_chunk']} at {result['host_slots']} slots: median {host['median']:,.0f} µs, "
        f"95 % under {host['p95']:,.0f} µs, mean {host['mean']:,.0f} µs, starting rows included",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints a card and one JSON line, and returns the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3_200)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="frames")
    parser.add_argument("--frame-ms", type=float, default=5.0, help="a frame of all slots")
    parser.add_argument("--prefill-ms", type=float, default=2.5, help="a group of prompts")
    parser.add_argument("--host-ms", type=float, default=2.0, help="the host's work per chunk")
    parser.add_argument("--host-slots", type=int, default=256, help="where that work is measured")
    parser.add_argument("--host-chunk", type=int, default=8, help="likewise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    return report("slot_use", lambda: measure(args), card, argv=argv, path=args.json)


if __name__ == "__main__":
    main()
