import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax.runaway import (
    LONGEST_PERIOD,
    LONGEST_SILENCE_S,
    Flags,
    RepetitionDetector,
    frame_cap,
    is_silent,
    longest_silence_s,
    trailing_silence_s,
)

RATE = 24_000


# --- the cap -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ordinary_s"),
    [
        # 15 characters a second; 5 syllables a second; 2.5 digits a second.
        ("The quick brown fox jumps over the lazy dog near the old river bank.", 68 / 15),
        ("one two three four five six seven eight nine ten " * 20, 49 * 20 / 15),
        ("今天天气很好我们一起去公园散步吧" * 5, 80 / 5),
        ("1234567890" * 3, 30 / 2.5),
        ("NASA and the FBI and the CIA and the USA", 4.5),
        ("안녕하세요 반갑습니다 오늘 날씨가 좋네요", 18 / 5),
    ],
)
def test_the_cap_is_generous_but_no_gift(text, ordinary_s):
    assert 1.8 * ordinary_s <= frame_cap(text) / 12.5 <= 4 * ordinary_s + 3


@pytest.mark.parametrize("text", ["", "Hi.", "a", "好", "5", "..."])
def test_very_short_texts_have_a_few_seconds(text):
    assert 3 <= frame_cap(text) / 12.5 <= 5


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_more_text_never_gives_less_time(text, more):
    # A full stop after another adds nothing, so not strictly more.
    assert frame_cap(text) <= frame_cap(text + more)
    assert isinstance(frame_cap(text), int)


def test_digits_take_longer_than_letters_and_dots_cost_once():
    assert frame_cap("1" * 20) > 2 * frame_cap("a" * 20)
    assert frame_cap("好" * 100) > 2 * frame_cap("a" * 100)
    assert frame_cap("." * 1000) == frame_cap(".")


# --- loops -------------------------------------------------------------------------------------


def frames(codes) -> np.ndarray:
    """Codes of codebook 0 as [1, n, 2]; the other codebook is noise."""
    codes = np.asarray(codes, np.int32)
    other = np.random.default_rng(1).integers(0, 2048, len(codes), dtype=np.int32)
    return np.stack([codes, other], -1)[None]


def since(codes, sizes=None) -> int:
    detector = RepetitionDetector(3)
    data = frames(codes)
    start = 0
    for size in sizes or [data.shape[1]]:
        piece = data[:, start : start + size]
        verdict = detector.push([1], piece, [piece.shape[1]])
        assert verdict.tolist() == [detector.stuck_since(1) >= 0]
        start += size
    return detector.stuck_since(1)


def speech(n: int, seed: int) -> np.ndarray:
    """Codes as speech has them: few are frequent, many last two or three frames, pauses are one code."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 513)  # the two commonest codes fill a quarter of it
    out: list[int] = []
    while len(out) < n:
        if rng.random() < 0.03 and 7 not in out[-12:]:
            out += [7] * int(rng.integers(4, 16))  # up to 1.2 s of silence, a second or more apart
        else:
            out += [int(rng.choice(512, p=weights / weights.sum()))] * int(rng.integers(1, 4))
    return np.array(out[:n], np.int32)


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 12, 20, 30, LONGEST_PERIOD])
@pytest.mark.parametrize("before", [0, 1, 7, 200])
def test_a_loop_is_found_at_its_third_repeat(period, before):
    rng = np.random.default_rng(period)
    loop = rng.permutation(2048)[:period] + 5000
    codes = np.concatenate([speech(before, 3), np.tile(loop, 400 // period)])
    whole = max(3 * period, 38) + period  # the first time and the repeats, at least 3 s of them
    assert before + 0.8 * whole <= since(codes) <= before + whole


def by_the_definition(codes) -> int:
    """The docstring's sentence, word for word."""
    for t in range(1, len(codes) + 1):
        for p in range(1, LONGEST_PERIOD + 1):
            window = max(3 * p, 38)
            if t >= window + p:
                same = codes[t - window : t] == codes[t - window - p : t - p]
            else:  # frames that have none p earlier match nothing
                same = codes[p:t] == codes[: max(0, t - p)]
            if same.sum() >= 0.9 * window:
                return t
    return -1


@pytest.mark.parametrize("seed", range(12))
def test_verdicts_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    period = int(rng.integers(1, LONGEST_PERIOD + 1))
    loop = np.tile(rng.integers(0, 50, period), 300 // period)
    # So many frames differ that it takes a while until a window has few enough of them.
    loop = np.where(
        rng.random(len(loop)) < [0.0, 0.03, 0.055][seed % 3], rng.integers(0, 50, len(loop)), loop
    )
    codes = np.concatenate([rng.integers(0, 4, 60), loop])
    assert since(codes) == by_the_definition(codes)


def test_a_loop_that_varies_a_little_is_found_and_one_that_varies_much_is_not():
    rng = np.random.default_rng(0)
    loop = np.tile(rng.integers(0, 2048, 20), 20)
    for share, found in [(0.02, True), (0.35, False)]:
        varied = np.where(rng.random(len(loop)) < share, rng.integers(0, 2048, len(loop)), loop)
        assert (since(varied) >= 0) == found


def test_speech_and_noise_are_not_loops():
    detector = RepetitionDetector(64)
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 2048, (32, 1125, 1), dtype=np.int32)
    spoken = np.stack([speech(1125, seed) for seed in range(32)])[..., None]
    codes = np.concatenate([noise, spoken])
    assert not detector.push(np.arange(64), codes, np.full(64, 1125)).any()


def test_natural_repeats_are_not_loops():
    rng = np.random.default_rng(2)
    no = rng.integers(0, 2048, 4)  # "no, no, no, no": each 0.3 s, four times
    phrase = rng.integers(0, 2048, 25)  # a phrase of 2 s said three times
    for natural in (np.tile(no, 4), np.tile(phrase, 3), np.full(30, 9)):
        codes = np.concatenate([speech(60, 1), natural, speech(60, 2)])
        assert since(codes) == -1


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, LONGEST_PERIOD))
def test_any_cut_into_pushes_finds_it_at_the_same_frame(sizes, period):
    rng = np.random.default_rng(period)
    codes = np.concatenate([rng.integers(0, 9, 40), np.tile(rng.integers(0, 2048, period), 200)])
    codes = codes[: sum(sizes)]
    assert since(codes, sizes) == since(codes) == since(codes, [1] * len(codes))


def test_rows_do_not_meet_and_slots_are_used_again():
    stuck, fine = frames(np.full(50, 3)), frames(speech(50, 0))
    detector = RepetitionDetector(4)
    both = np.concatenate([stuck, fine])
    assert detector.push([2, 0], both, [50, 50]).tolist() == [True, False]
    # Once stuck stays stuck, until the slot has a new row.
    assert detector.push([0, 2], np.concatenate([fine, fine]), [50, 50]).tolist() == [False, True]
    detector.reset(2)
    assert detector.stuck_since(2) == -1
    assert not detector.push([2], stuck[:, :30], [30]).any()
    detector.reset([2, 0])
    assert not detector.push([2], stuck[:, :30], [30]).any()
    assert detector.push([2], stuck[:, :30], [30]).all()


def test_frames_beyond_a_rows_count_are_not_looked_at():
    detector = RepetitionDetector(2)
    data = np.concatenate([frames(np.full(50, 3))] * 2)
    assert detector.push([0, 1], data, [50, 10]).tolist() == [True, False]
    assert detector.push([1], data[:1, :10], [0]).tolist() == [False]
    assert detector.stuck_since(1) == -1
    assert detector.push([], np.zeros((0, 8, 32), np.int32), []).shape == (0,)


@pytest.mark.parametrize(
    ("slots", "shape", "counts", "message"),
    [
        ([0], (1, 4), [4], "slots"),
        ([0, 1], (1, 4, 2), [4], "slots"),
        ([0], (1, 4, 2), [4, 4], "counts"),
        ([1, 1], (2, 4, 2), [4, 4], "each slot once"),
        ([0], (1, 4, 2), [5], "a count is 5, but there are 4"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(slots, shape, counts, message):
    with pytest.raises(ValueError, match=message):
        RepetitionDetector(2).push(slots, np.zeros(shape, np.int32), counts)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RepetitionDetector(0)


def test_it_is_cheap_for_many_rows():
    detector = RepetitionDetector(256)
    codes = np.random.default_rng(0).integers(0, 2048, (256, 8, 32), dtype=np.int32)
    rows, counts = np.arange(256), np.full(256, 8)
    took = []
    for _ in range(20):
        start = time.perf_counter()
        detector.push(rows, codes, counts)
        took.append(time.perf_counter() - start)
    print(f"{min(took) / 256 * 1e6:.1f} microseconds per row and push of 8 frames")
    assert min(took) < 0.05


# --- silence -----------------------------------------------------------------------------------


def sound(seconds: float, level: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(int(seconds * 100))
    return (level * rng.standard_normal(round(seconds * RATE))).astype(np.float32)


def quiet(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


@pytest.mark.parametrize("level", [0.3, 0.02])
@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_silence_is_measured_against_the_utterance(level, noise):
    audio = np.concatenate([sound(2, level), quiet(1.5), sound(1, level), quiet(0.7)])
    audio += sound(len(audio) / RATE, noise * level)
    assert longest_silence_s(audio, RATE) == pytest.approx(1.5, abs=0.05)
    assert trailing_silence_s(audio, RATE) == pytest.approx(0.7, abs=0.05)
    assert not is_silent(audio, RATE)


def test_too_long_a_silence_is_flagged_wherever_it_is():
    gap = quiet(LONGEST_SILENCE_S + 0.2)
    for parts in ([sound(1), gap, sound(1)], [gap, sound(1)], [sound(1), gap]):
        assert is_silent(np.concatenate(parts), RATE)
        assert not is_silent(np.concatenate(parts), RATE, longest_s=4.0)


def test_audio_without_any_sound_is_silent():
    assert is_silent(quiet(0.5), RATE)
    assert is_silent(sound(0.5, 0.0003), RATE)
    assert is_silent(np.zeros(0, np.float32), RATE)
    assert longest_silence_s(np.zeros(0, np.float32), RATE) == 0
    assert trailing_silence_s(quiet(0.5), RATE) == 0.5


def test_soft_speech_after_loud_is_not_silence():
    audio = np.concatenate([sound(1, 0.5), sound(4, 0.02)])  # 28 dB softer
    assert not is_silent(audio, RATE)
    assert trailing_silence_s(audio, RATE) == 0


def test_flags_have_one_spelling():
    assert (Flags.REPETITION, Flags.SILENCE) == ("repetition", "silence")
