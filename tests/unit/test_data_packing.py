"""Records, packing and the layout of rows."""

from __future__ import annotations

import time

import numpy as np
import pytest

from csm_jax.data.examples import (
    Example,
    TooLongError,
    Turn,
    decode_record,
    encode_record,
    kept_from,
)
from csm_jax.data.packing import assemble, pack
from tests.support.data import example


def test_a_record_gives_back_its_example() -> None:
    before = example((3, 2, True), (4, 5, False), weight=0.5)
    before = Example(turns=before.turns, facts={"id": "ä", "texts": ["a", "b"]})
    after = decode_record(encode_record(before))
    assert after.facts == before.facts
    assert len(after.turns) == 2
    for one, other in zip(before.turns, after.turns, strict=True):
        np.testing.assert_array_equal(one.text, other.text)
        np.testing.assert_array_equal(one.codes, other.codes)
        assert (one.trained, one.weight) == (other.trained, other.weight)
        assert other.codes.dtype == np.uint16
    assert decode_record(encode_record(before), facts=False).facts == {}


@pytest.mark.parametrize("cut", [0, 5, 20, 60, -1])
def test_a_record_that_is_not_whole_is_refused(cut: int) -> None:
    record = encode_record(example((3, 2, True), (4, 5, False)))
    with pytest.raises(ValueError, match=r"not whole|cut short"):
        decode_record(record[:cut])
    with pytest.raises(ValueError, match="not of this program"):
        decode_record(b"x" + record[1:])


def test_turns_of_different_codebooks_are_no_record() -> None:
    turns = (*example((3, 2, True)).turns, *example((3, 2, True), codebooks=8).turns)
    with pytest.raises(ValueError, match=r"\[8, 32\]"):
        encode_record(Example(turns=turns, facts={}))


# --- what is dropped ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "trained", "capacity", "first"),
    [
        ([5, 5, 5], [False, False, True], 15, 0),
        ([5, 5, 5], [False, False, True], 14, 1),
        ([5, 5, 5], [False, False, True], 9, 2),
        ([5, 5, 5], [False, True, True], 10, 1),
        ([5], [True], 5, 0),
    ],
)
def test_oldest_context_goes_first_and_whole(
    positions: list[int], trained: list[bool], capacity: int, first: int
) -> None:
    assert kept_from(positions, trained, capacity) == first


@pytest.mark.parametrize(
    ("positions", "trained", "capacity", "complaint"),
    [
        ([5, 20], [False, True], 12, "trained message 1 alone takes 20 positions, but 12 fit"),
        ([5, 5, 5], [True, False, True], 14, r"first trained message \(number 0\) on it takes 15"),
        ([5, 5, 5], [False, True, True], 9, r"number 1\) on it takes 10"),
        ([50, 5], [False, False], 4, "no message is trained"),
    ],
)
def test_trained_turns_are_never_dropped(
    positions: list[int], trained: list[bool], capacity: int, complaint: str
) -> None:
    with pytest.raises(TooLongError, match=complaint):
        kept_from(positions, trained, capacity)


# --- packing -----------------------------------------------------------------------------------


def test_best_fit_in_the_given_order() -> None:
    rows = pack(np.array([6, 5, 4, 5, 10, 1]), 10)
    # 4 goes to 6, which it fills; 5 to 5; 10 alone; 1 opens a row of its own.
    assert [row.tolist() for row in rows] == [[0, 2], [1, 3], [4], [5]]
    # Both rows have room for 2; it goes into the fuller one.
    rows = pack(np.array([3, 8, 2]), 10)
    assert [row.tolist() for row in rows] == [[0], [1, 2]]


def test_packing_is_a_permutation_and_no_row_overflows() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 5_000)
    rows = pack(lengths, 512)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(5_000))
    assert max(lengths[row].sum() for row in rows) <= 512


def test_packing_fills_rows_and_is_fast() -> None:
    # Conversations of 12 s on average, as in TTS corpora: most far below a row, some near it.
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(150), 0.7, 100_000), 20, 2048).astype(np.int64)
    started = time.process_time()
    rows = pack(lengths, 2048)
    took = time.process_time() - started
    assert lengths.sum() / (len(rows) * 2048) >= 0.97
    assert took < 2.0  # 1 million in a few seconds


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11]])
def test_lengths_that_cannot_be_packed(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"in 1\.\.10"):
        pack(np.array(lengths), 10)


def test_nothing_packs_into_no_rows() -> None:
    assert pack(np.zeros(0, np.int64), 10) == []


# --- the layout --------------------------------------------------------------------------------


def test_a_row_as_the_model_reads_it() -> None:
    one = example((2, 2, False), (1, 1, True), weight=0.25)
    other = example((2, 1, True), first=9)
    batch = assemble([one, other], 16, 0, 32)
    segments, positions = np.asarray(batch.segments)[0], np.asarray(batch.positions)[0]
    frames, mask = np.asarray(batch.frames)[0], np.asarray(batch.mask)[0]
    trained, weight = np.asarray(batch.trained)[0], np.asarray(batch.weight)[0]
    # text text audio audio end | text audio end || text text audio end || padding
    assert segments.tolist() == [1] * 8 + [2] * 4 + [0] * 4
    assert positions.tolist() == [*range(8), *range(4), 0, 0, 0, 0]
    assert frames[:, -1].tolist() == [1, 2, 0, 0, 0, 3, 0, 0, 9, 10, 0, 0, 0, 0, 0, 0]
    text = np.isin(np.arange(16), [0, 1, 5, 8, 9])
    audio = np.isin(np.arange(16), [2, 3, 4, 6, 7, 10, 11])
    np.testing.assert_array_equal(mask[:, -1], text)
    np.testing.assert_array_equal(mask[:, :-1], np.repeat(audio[:, None], 32, axis=1))
    np.testing.assert_array_equal(frames[2:4, :-1], one.turns[0].codes)
    np.testing.assert_array_equal(frames[10:11, :-1], other.turns[0].codes)
    assert trained.tolist() == [i in (6, 7, 10, 11) for i in range(16)]
    assert weight.tolist() == [0.25 if i in (6, 7) else float(i in (10, 11)) for i in range(16)]
    assert frames.dtype == np.int32
    assert weight.dtype == np.float32


def test_every_trained_turn_ends_in_an_end_frame() -> None:
    """A model that is never shown where speech ends cannot stop."""
    rng = np.random.default_rng(2)
    examples = [
        example(*((int(rng.integers(1, 5)), int(rng.integers(1, 9)), True) for _ in range(3)))
        for _ in range(5)
    ]
    batch = assemble(examples, 256, 4, 32)
    trained, frames = np.asarray(batch.trained)[0], np.asarray(batch.frames)[0]
    last = np.flatnonzero(trained & ~np.append(trained[1:], False))
    assert len(last) == 15
    assert not frames[last].any()  # zero codes
    assert np.asarray(batch.mask)[0][last][:, :-1].all()  # that count
    # And every frame of audio is before it, none cut.
    assert trained.sum() == sum(len(turn.codes) + 1 for one in examples for turn in one.turns)


def test_a_prefix_leaves_room_before_each_conversation() -> None:
    batch = assemble([example((2, 1, True)), example((1, 1, True))], 16, 3, 32)
    assert np.asarray(batch.segments)[0].tolist() == [1] * 7 + [2] * 6 + [0] * 3
    assert np.asarray(batch.positions)[0].tolist() == [*range(7), *range(6), 0, 0, 0]
    mask = np.asarray(batch.mask)[0].any(axis=1)
    assert mask.tolist() == [i in (3, 4, 5, 6, 10, 11, 12) for i in range(16)]
    assert np.asarray(batch.trained)[0].tolist() == [i in (5, 6, 11, 12) for i in range(16)]


def test_what_does_not_fit_is_refused_not_cut() -> None:
    with pytest.raises(ValueError, match="do not fit into a row of 8"):
        assemble([example((2, 1, True)), example((2, 3, True))], 8, 0, 32)


@pytest.mark.parametrize(("text", "frames", "codebooks"), [(0, 2, 32), (2, 0, 32), (2, 2, 8)])
def test_turns_without_text_audio_or_all_codebooks_are_refused(
    text: int, frames: int, codebooks: int
) -> None:
    turn = Turn(
        text=np.ones(text, np.int32),
        codes=np.ones((frames, codebooks), np.uint16),
        trained=True,
        weight=1.0,
    )
    with pytest.raises(ValueError, match="both are needed, with 32 codebooks"):
        assemble([Example(turns=(turn,), facts={})], 16, 0, 32)
