"""The engine keeps its slots full: on a simulated device, with a realistic mix of lengths."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import slot_use
from csm_jax.config import FRAME_MS, csm_1b
from csm_jax.engine import Engine
from csm_jax.slots import SlotSizes
from tests.support.engine import drain
from tests.support.simulated import Costs, SimulatedSlots, job

SLOTS = 64
COSTS = Costs()
ROWS = slot_use.workload(1_600, seed=0)


def test_the_mix_is_the_one_described() -> None:
    rows = slot_use.workload(4_000, seed=0)
    ended = np.array([row.frames for row in rows if row.frames < slot_use.CAPACITY])
    seconds = ended * FRAME_MS / 1000
    assert 5 < seconds.mean() < 6
    assert np.median(seconds) == pytest.approx(slot_use.MEDIAN_S, rel=0.03)
    assert len(rows) - len(ended) == 8
    assert sum(row.frames >= slot_use.CAPACITY for row in ROWS) == 3


# What a chunk beyond a row's end costs: with look-ahead the slot of every row makes one more in vain.
@pytest.mark.parametrize(
    ("chunk_frames", "look_ahead", "least"), [(8, False, 0.93), (2, True, 0.93), (8, True, 0.84)]
)
def test_slots_are_full(chunk_frames: int, look_ahead: bool, least: float) -> None:
    ours = slot_use.continuous(
        ROWS, slots=SLOTS, chunk_frames=chunk_frames, look_ahead=look_ahead, costs=COSTS
    )
    assert ours.slot_use >= least
    static = slot_use.static(ROWS, slots=SLOTS, costs=COSTS)
    assert ours.audio_s_per_s >= 2.5 * static.audio_s_per_s


def test_an_engine_that_refills_only_when_empty_is_seen() -> None:
    waiting = slot_use.continuous(
        ROWS, slots=SLOTS, chunk_frames=8, look_ahead=False, costs=COSTS, together=True
    )
    assert waiting.slot_use < 0.4
    # It is what the static batches are computed to be, but for the frames of the last chunks.
    static = slot_use.static(ROWS, slots=SLOTS, costs=COSTS)
    assert waiting.whole_slot_use == pytest.approx(static.slot_use, rel=0.03)


def test_the_cap_of_the_text_ends_runaways_and_no_others() -> None:
    capped = slot_use.workload(2_000, seed=0, text_cap=True)
    endless = [row.frames > slot_use.CAPACITY for row in capped]
    made = [row.made for row, runs in zip(capped, endless, strict=True) if runs]
    assert np.mean(made) < (slot_use.CAPACITY - slot_use.PROMPT) / 5
    assert not any(r.cap < r.frames for r, runs in zip(capped, endless, strict=True) if not runs)


def engine(*, slots: int, chunk_frames: int, look_ahead: bool) -> tuple[SimulatedSlots, Engine]:
    sizes = SlotSizes(slots=slots, capacity=256, chunk_frames=chunk_frames, prefill_rows=2)
    device = SimulatedSlots(csm_1b(), sizes, Costs(chunk_host_s=0.01, start_host_s=0.0))
    return device, Engine(device, look_ahead=look_ahead, stop_repetition=False)


@pytest.mark.parametrize(
    ("length", "cap", "reason", "frames"),
    [(5, 90, "eos", 5), (8, 90, "eos", 8), (50, 8, "length", 8), (8, 8, "length", 8)],
)
def test_simulated_rows_end_where_real_ones_do(
    length: int, cap: int, reason: str, frames: int
) -> None:
    device, made = engine(slots=2, chunk_frames=4, look_ahead=False)
    ticket = made.submit(job(length, config=device.config, max_frames=cap))
    seen = drain(made)
    assert (seen.last[ticket].finish_reason, len(seen.of(ticket))) == (reason, frames)
    # The frame that ends a row is made, too: after 8 frames, in a third chunk.
    assert made.stats.chunks == (3 if reason == "eos" and frames == 8 else 2)


def test_look_ahead_hides_the_work_of_the_host() -> None:
    seconds = {}
    for look_ahead in (False, True):
        device, made = engine(slots=1, chunk_frames=4, look_ahead=look_ahead)
        made.submit(job(90, config=device.config, max_frames=80))
        drain(made)
        seconds[look_ahead] = device.now
    frames = 80 * Costs().frame_s + Costs().prefill_s
    assert seconds[False] == pytest.approx(frames + 20 * 0.01)
    assert seconds[True] == pytest.approx(frames + 0.01)
