"""What a row says does not depend on anything that happens beside it, whatever happens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from csm_jax.engine import Engine, Job, Update
from csm_jax.slots import Programs, Slots
from tests.support.engine import Collected, drain, job, micro_config, sizes
from tests.support.model import params_of

CONFIG = micro_config()
CHUNKS = (1, 2, 5)


def jobs() -> list[Job]:
    """Returns jobs that differ in everything a request can ask for."""
    rng = random.Random(0)
    return [
        job(
            CONFIG,
            seed,
            frames=rng.randint(1, 30),
            text=rng.randint(1, 8),
            audio=rng.choice([0, 0, 3, 40, 118]),  # the last grow into the next larger window
            voice=rng.choice([None, None, 0, 1, 2, 3]),
            temperature=rng.choice([0.0, 0.9, 1.5]),
            topk=rng.choice([0, 2, 50]),
            top_p=rng.choice([1.0, 0.8]),
        )
        for seed in range(48)
    ]


JOBS = jobs()


@pytest.fixture(scope="module")
def devices() -> dict[int, Slots]:
    """Slots of one batch size and several chunk sizes."""
    made = {}
    programs: Programs = {}
    for chunk in CHUNKS:
        made[chunk] = Slots(
            CONFIG,
            params_of(CONFIG),
            sizes(slots=5, capacity=256, chunk_frames=chunk, segments=2, segment_capacity=64),
            # All but the frames are the same.
            programs={key: program for key, program in programs.items() if key[0] != "advance"},
        )
        made[chunk].warm_up()
        programs = made[chunk]._programs
    return made


@pytest.fixture(scope="module")
def alone(devices: dict[int, Slots]) -> list[tuple[np.ndarray, Update]]:
    """What each job becomes with nobody beside it."""
    results = []
    for each in JOBS:
        devices[1].reset()
        engine = Engine(devices[1], look_ahead=False, stop_repetition=False)
        ticket = engine.submit(each)
        seen = drain(engine)
        results.append((seen.of(ticket), seen.last[ticket]))
    return results


def schedule(rng: random.Random) -> Iterator[tuple[int, str, int]]:
    """Yields (step, what, which of JOBS or how many submits ago), by step."""
    step = 0
    for which in rng.sample(range(len(JOBS)), rng.randint(2, 12)):
        step += rng.choice([0, 0, 0, 1, 1, 4])
        yield step, "submit", which
        if rng.random() < 0.25:
            yield step + rng.randint(0, 4), "cancel", which


def test_the_jobs_end_in_every_way(alone: list[tuple[np.ndarray, Update]]) -> None:
    reasons = {update.finish_reason for _, update in alone}
    assert reasons == {"eos", "length"}
    lengths = [len(each.prompt[0]) for each in JOBS]
    ends = [before + len(codes) for before, (codes, _) in zip(lengths, alone, strict=True)]
    assert any(before < 128 < end for before, end in zip(lengths, ends, strict=True))
    assert sum(len(codes) > 10 for codes, _ in alone) > 5


@pytest.mark.parametrize("schedules", [200, pytest.param(1_000, marks=pytest.mark.slow)])
def test_random_schedules_change_no_bit(
    devices: dict[int, Slots], alone: list[tuple[np.ndarray, Update]], schedules: int
) -> None:
    compiled = {chunk: device.compilations for chunk, device in devices.items()}
    cancelled_early = 0
    for seed in range(schedules):
        rng = random.Random(seed)
        device = devices[rng.choice(CHUNKS)]
        # Not reset: what the schedule before left in slots and segments must not be heard.
        engine = Engine(device, look_ahead=rng.random() < 0.5, stop_repetition=False)
        events = sorted(schedule(rng), key=lambda event: event[0])
        tickets: dict[int, int] = {}
        seen = Collected()
        step = 0
        while events or engine.busy:
            while events and events[0][0] <= step:
                _, what, which = events.pop(0)
                if what == "submit":
                    tickets[which] = engine.submit(JOBS[which])
                else:
                    engine.cancel(tickets[which])
            seen.take(engine.step())
            step += 1
        for which, ticket in tickets.items():
            codes, end = alone[which]
            last, got = seen.last[ticket], seen.of(ticket)
            assert last.finish_reason in ("cancelled", end.finish_reason), (seed, which)
            if last.finish_reason == "cancelled":
                cancelled_early += len(got) < len(codes)
                codes = codes[: len(got)]
            np.testing.assert_array_equal(got, codes, err_msg=f"schedule {seed}, job {which}")
    assert cancelled_early > schedules // 10
    assert {chunk: device.compilations for chunk, device in devices.items()} == compiled
