"""The device side of the engine: sizes, what is compiled, and that nothing else is."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from csm_jax.engine import Engine
from csm_jax.slots import Slots, SlotSizes, VoicePrompt, check_voice
from tests.support.engine import drain, job, micro_config, sizes, vectors
from tests.support.model import params_of, prompt

CONFIG = micro_config()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"chunk_frames": -1}, "chunk_frames must be at least 1"),
        ({"segments": 2}, "segments=2 and segment_capacity=0 must both be positive, or both 0"),
        ({"segment_capacity": 2}, "must both be positive"),
    ],
)
def test_sizes_are_checked(change: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sizes(**change)


def test_slots_beyond_the_models_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"capacity=4,096 .* max_seq_len=2,048"):
        Slots(CONFIG, params_of(CONFIG), sizes(capacity=4096))


def test_a_prefill_group_is_bounded_by_its_scores() -> None:
    many = sizes(slots=64, prefill_rows=16)
    assert [many.prefill_group(n) for n in (32, 512, 1024, 2048)] == [16, 16, 4, 1]
    assert sizes(slots=2, prefill_rows=16).prefill_group(32) == 2


def compile_events() -> list[str]:
    seen: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: seen.append(event) if "backend_compile" in event else None
    )
    return seen


def test_after_the_warm_up_nothing_compiles() -> None:
    """Not counted by `Slots` alone: JAX itself reports what it compiles."""
    device = Slots(
        CONFIG,
        params_of(CONFIG),
        sizes(slots=3, capacity=512, segments=2, segment_capacity=48),
    )
    device.warm_up()
    engine = Engine(device, look_ahead=True, stop_repetition=True)
    engine.submit(job(CONFIG, 0))
    drain(engine)  # the host's own small arrays
    before, events = device.compilations, compile_events()
    jobs = [
        job(CONFIG, i, frames=1 + 7 * i, text=text, topk=i % 3, top_p=0.5 + i % 2 / 2, voice=voice)
        for i, (text, voice) in enumerate(
            [(1, None), (33, 0), (64, 1), (65, None), (250, 2), (129, None), (31, 0), (400, None)]
        )
    ]
    tickets = [engine.submit(each) for each in jobs]
    engine.cancel(tickets[3])
    seen = drain(engine)
    assert {seen.last[t].finish_reason for t in tickets} <= {"eos", "length", "cancelled"}
    assert device.compilations == before
    assert events == []
    # The listener does hear what is compiled.
    jax.jit(lambda x: x * 3 + 1)(np.ones(7, np.float32))
    assert events


def test_slots_share_what_another_has_compiled() -> None:
    programs = {}
    first = Slots(CONFIG, params_of(CONFIG), sizes(), programs=programs)
    first.warm_up()
    second = Slots(CONFIG, params_of(CONFIG), sizes(), programs=programs)
    engine = Engine(second, look_ahead=False, stop_repetition=False)
    engine.submit(job(CONFIG, 0))
    drain(engine)
    assert second.compilations == 0


def test_a_voice_longer_than_a_segment_is_refused() -> None:
    device = Slots(CONFIG, params_of(CONFIG), sizes(segments=1, segment_capacity=16))
    frames, mask = prompt(CONFIG, 17, 0)
    with pytest.raises(ValueError, match="17 positions, but shared segments hold 16"):
        device.share(VoicePrompt(frames=frames, mask=mask), 0)
    both = VoicePrompt(frames=frames[:9], mask=mask[:9], vectors=vectors(CONFIG, 8, seed=0))
    with pytest.raises(ValueError, match="17 positions, but shared segments hold 16"):
        device.share(both, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"frames": prompt(CONFIG, 0, 0)[0], "mask": prompt(CONFIG, 0, 0)[1]}, "voice is empty"),
        ({"mask": np.zeros((4, 3), bool)}, "must both be"),
        ({"vectors": np.zeros((2, 31), np.float32)}, r"\(2, 31\) must be .* embed_dim=32"),
        ({"vectors": np.zeros((0, 32), np.float32)}, r"\(0, 32\) must be"),
        ({"vectors": np.zeros(32, np.float32)}, r"\(32,\) must be"),
    ],
)
def test_bad_voices_are_refused(change: dict[str, np.ndarray], said: str) -> None:
    frames, mask = prompt(CONFIG, 4, 0)
    with pytest.raises(ValueError, match=said):
        check_voice(VoicePrompt(**{"frames": frames, "mask": mask} | change), config=CONFIG)


def test_the_engine_checks_voices() -> None:
    device = Slots(CONFIG, params_of(CONFIG), sizes(segments=1, segment_capacity=16))
    engine = Engine(device, look_ahead=False, stop_repetition=False)
    wrong = VoicePrompt(
        frames=prompt(CONFIG, 0, 0)[0],
        mask=prompt(CONFIG, 0, 0)[1],
        vectors=np.zeros((2, 31), np.float32),
    )
    with pytest.raises(ValueError, match="embed_dim=32"):
        engine.submit(dataclasses.replace(job(CONFIG, 0), voice_key="wrong", voice=wrong))


def test_the_windows_end_at_the_capacity() -> None:
    made = Slots(CONFIG, params_of(CONFIG), sizes(capacity=700))
    assert made.windows == [128, 256, 512, 700]
    assert made.prefills == [32, 64, 128, 256, 512, 1024]
    assert isinstance(made.sizes, SlotSizes)


def test_what_the_engine_knows_of_segments_goes_with_them() -> None:
    device = Slots(CONFIG, params_of(CONFIG), sizes(segments=1, segment_capacity=32))
    engine = Engine(device, look_ahead=False, stop_repetition=False)
    first = engine.submit(job(CONFIG, 3, voice=0))
    want = drain(engine).of(first)
    engine.reset()
    device.warm_up()
    again = engine.submit(job(CONFIG, 3, voice=0))
    np.testing.assert_array_equal(drain(engine).of(again), want)
    engine.submit(job(CONFIG, 3))
    with pytest.raises(RuntimeError, match="on their way"):
        engine.reset()


def test_settings_out_of_range_are_refused_before_a_slot_is_taken() -> None:
    engine = Engine(
        Slots(CONFIG, params_of(CONFIG), sizes()), look_ahead=False, stop_repetition=False
    )
    with pytest.raises(ValueError, match="temperature"):
        engine.submit(job(CONFIG, 0, temperature=-1.0))
    assert not engine.busy


def test_a_device_is_lost_while_a_part_of_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Slots(CONFIG, params_of(CONFIG), sizes(segments=1, segment_capacity=32))
    assert not device.lost
    monkeypatch.setattr(device, "_new_shared", lambda: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        device.reset()
    assert device.lost
