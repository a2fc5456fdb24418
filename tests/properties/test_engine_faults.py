"""Faults stay where they happen: rows that are not finite, and devices that fail."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.engine import Engine
from csm_jax.kvcache import KVCache
from csm_jax.slots import Slots
from tests.support.engine import Collected, drain, job, micro_config, sizes
from tests.support.model import params_of

CONFIG = micro_config()
JOBS = [
    job(CONFIG, seed, frames=4 + seed % 7, text=1 + seed % 8, voice=(None, 0, 1)[seed % 3])
    for seed in range(40)
]

SIZES = sizes(slots=32, chunk_frames=1, prefill_rows=4, segments=2, segment_capacity=64)


@pytest.fixture(scope="module")
def device() -> Slots:
    return Slots(CONFIG, params_of(CONFIG), SIZES)


@pytest.fixture(scope="module")
def clean(device: Slots) -> list[np.ndarray]:
    engine = Engine(device, look_ahead=False, stop_repetition=False)
    tickets = [engine.submit(each) for each in JOBS]
    seen = drain(engine)
    return [seen.of(ticket) for ticket in tickets]


def poison(device: Slots, slot: int, rng: random.Random) -> None:
    """Puts a NaN into what one row has."""
    state = device._state
    assert state is not None
    where = rng.choice(["hidden", "k", "v"])
    if where == "hidden":
        state = dataclasses.replace(state, hidden=state.hidden.at[slot, 3].set(jnp.nan))
    else:
        arrays = {"k": list(state.cache.k), "v": list(state.cache.v)}
        last = int(state.cache.length[slot]) - 1
        arrays[where][0] = arrays[where][0].at[slot, 0, rng.randint(0, last), 5].set(jnp.nan)
        cache = KVCache(k=tuple(arrays["k"]), v=tuple(arrays["v"]), length=state.cache.length)
        state = dataclasses.replace(state, cache=cache)
    device._state = state


@pytest.mark.parametrize("poisoned", [200, pytest.param(1_000, marks=pytest.mark.slow)])
def test_poisoned_rows_fail_alone_and_leave_clean_slots(
    device: Slots, clean: list[np.ndarray], poisoned: int
) -> None:
    rng = random.Random(0)
    engine = Engine(device, look_ahead=True, stop_repetition=False)
    device.reset()
    owner: dict[int, int] = {}
    hit: set[int] = set()
    seen = Collected()
    while len(hit) < poisoned or engine.busy:
        while len(hit) < poisoned and engine.queued < 8:
            which = rng.randrange(len(JOBS))
            owner[engine.submit(JOBS[which])] = which
        seen.take(engine.step())
        running = [row for row in engine._rows.values() if row.ticket not in hit]
        if running and len(hit) < poisoned and rng.random() < 0.5:
            victim = rng.choice(running)
            poison(device, victim.slot, rng)
            hit.add(victim.ticket)
    failed = {t for t, update in seen.last.items() if update.finish_reason == "error"}
    assert failed <= hit
    # The others were at their last frame anyway.
    assert len(failed) > 0.7 * poisoned
    for ticket, which in owner.items():
        codes = seen.of(ticket)
        whole = clean[which]
        if ticket in failed:
            assert "not finite" in (seen.last[ticket].error or "")
            whole = whole[: len(codes)]
        np.testing.assert_array_equal(codes, whole, err_msg=f"ticket {ticket}, job {which}")


# --- devices that fail ------------------------------------------------------------------------


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nmore")


def losing(device: Slots) -> Callable[..., Any]:
    """Returns a call that fails and takes the state with it."""

    def call(*_: Any, **__: Any) -> Any:
        for leaf in jax.tree.leaves(device._state):
            leaf.delete()
        out_of_memory()

    return call


class Unreadable:
    """A chunk whose computation failed after it was ordered."""

    def wait(self) -> Any:
        out_of_memory()


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("loses_state", [False, True])
@pytest.mark.parametrize("verb", ["prefill", "insert", "advance", "share", "wait"])
def test_a_device_without_memory_fails_whom_it_hits_and_the_engine_goes_on(
    device: Slots,
    clean: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    loses_state: bool,
    look_ahead: bool,
) -> None:
    device.reset()
    engine = Engine(device, look_ahead=look_ahead, stop_repetition=False)
    early = [engine.submit(JOBS[which]) for which in range(0, 12, 3)]  # without a voice
    seen = Collected()
    for _ in range(3):
        seen.take(engine.step())
    late = [engine.submit(JOBS[which]) for which in range(1, 10, 3)]  # with a voice
    fail = losing(device) if loses_state else out_of_memory
    with monkeypatch.context() as patched:
        if verb == "wait":
            patched.setattr(device, "advance", lambda *_: Unreadable())
        else:
            patched.setattr(device, verb, fail)
        for _ in range(3 if verb == "wait" else 1):
            seen.take(engine.step())
    while engine.busy:
        seen.take(engine.step())
    everyone = dict(zip([*early, *late], [*range(0, 12, 3), *range(1, 10, 3)], strict=True))
    hit = {t for t in everyone if seen.last[t].finish_reason == "error"}
    want = {"prefill": late, "insert": late, "share": late, "advance": everyone, "wait": everyone}
    assert hit == set(want[verb])
    for ticket in hit:
        assert "out of memory" in (seen.last[ticket].error or "")
        assert "\n" not in (seen.last[ticket].error or "")
    for ticket, which in everyone.items():
        codes = seen.of(ticket)
        np.testing.assert_array_equal(codes, clean[which][: len(codes)])
        assert (len(codes) == len(clean[which])) == (ticket not in hit)
    # The four that ran already; each of the three voices is tried, and lost, by itself.
    restarts = {"prefill": 4, "insert": 4, "share": 12} if loses_state else {}
    assert engine.stats.restarted == restarts.get(verb, 0)
    again = [engine.submit(JOBS[which]) for which in range(12)]
    after = drain(engine)
    for which, ticket in enumerate(again):
        np.testing.assert_array_equal(after.of(ticket), clean[which])


def test_a_device_that_cannot_be_made_again_fails_all_and_is_tried_again(
    device: Slots, clean: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    device.reset()
    engine = Engine(device, look_ahead=False, stop_repetition=False)
    tickets = [engine.submit(each) for each in JOBS]
    with monkeypatch.context() as patched:
        patched.setattr(device, "advance", losing(device))
        patched.setattr(device, "reset", out_of_memory)
        seen = drain(engine)
    assert {seen.last[t].finish_reason for t in tickets} == {"error"}
    again = engine.submit(JOBS[0])
    np.testing.assert_array_equal(drain(engine).of(again), clean[0])


def test_a_voice_that_is_not_finite_fails_its_users_only(
    device: Slots, clean: list[np.ndarray]
) -> None:
    params = params_of(CONFIG)
    # One text id is damaged, and only voice 0 has it.
    bad = CONFIG.text_vocab_size - 1
    table = params["backbone"]["text_embeddings"].at[bad].set(jnp.nan)
    damaged = params | {"backbone": params["backbone"] | {"text_embeddings": table}}
    kept = [i for i, each in enumerate(JOBS) if bad not in each.prompt[0][:, -1]]
    jobs = []
    for i in kept:
        voice = JOBS[i].voice
        if JOBS[i].voice_key == "voice 0" and voice is not None:
            frames = voice.frames.copy()
            frames[0, -1] = bad
            jobs.append(
                dataclasses.replace(JOBS[i], voice=dataclasses.replace(voice, frames=frames))
            )
        else:
            assert voice is None or bad not in voice.frames[:, -1]
            jobs.append(JOBS[i])
    slots = Slots(CONFIG, damaged, SIZES, programs=device._programs)
    engine = Engine(slots, look_ahead=False, stop_repetition=False)
    tickets = [engine.submit(each) for each in jobs]
    seen = drain(engine)
    assert sum(each.voice_key == "voice 0" for each in jobs) > 5
    for which, each, ticket in zip(kept, jobs, tickets, strict=True):
        if each.voice_key == "voice 0":
            assert "voice were not finite" in (seen.last[ticket].error or "")
        else:
            np.testing.assert_array_equal(seen.of(ticket), clean[which])
