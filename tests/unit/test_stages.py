"""DecodeStage: however codes come and utterances go, each one's audio is that of its codes alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from csm_jax.stages import DecodeStage
from tests.support.codec import PlainCodec
from tests.support.synthesizer import Rows


class CountingCodec(PlainCodec):
    """Every frame also shows how many frames its stream has decoded before: a row's state."""

    def __init__(self, *, num_codebooks: int, codebook_size: int) -> None:
        super().__init__(num_codebooks=num_codebooks, codebook_size=codebook_size)
        self.seen = 0

    def open_stream(self) -> CountingCodec:
        return CountingCodec(num_codebooks=self.num_codebooks, codebook_size=self.codebook_size)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        frames = codes.sum(axis=1) + 1000 * (self.seen + np.arange(len(codes)))
        self.seen += len(codes)
        return frames.astype(np.float32)


CODEC = CountingCodec(num_codebooks=2, codebook_size=100)


def expected(codes: np.ndarray) -> np.ndarray:
    return CODEC.open_stream().decode(codes)


def stage_of(rows: int, frames: int) -> tuple[DecodeStage[object], Rows]:
    stage_rows = Rows(CODEC, rows, frames)
    return DecodeStage(stage_rows), stage_rows


def some(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 100, (count, 2), dtype=np.int32)


class Heard:
    """The audio given for each utterance; nothing may come after its last."""

    def __init__(self, stage: DecodeStage[object]) -> None:
        self.stage = stage
        self.audio: dict[object, list[np.ndarray]] = {}
        self.ended: set[object] = set()

    def run(self, *, flush: bool = False) -> None:
        for part in self.stage.run(flush=flush):
            assert part.key not in self.ended
            self.audio.setdefault(part.key, []).append(part.audio)
            if part.last:
                self.ended.add(part.key)

    def of(self, key: object) -> np.ndarray:
        return np.concatenate(self.audio[key])


@pytest.mark.parametrize("seed", range(30))
def test_any_split_order_and_number_of_utterances(seed: int) -> None:
    """Also with utterances given up at any time, whose rows the next ones take."""
    rng = np.random.default_rng(seed)
    stage, rows = stage_of(int(rng.integers(1, 5)), int(rng.integers(1, 7)))
    heard = Heard(stage)
    whole = {key: some(rng, int(rng.choice([0, 1, 3, 8, 20]))) for key in range(15)}
    left = dict(whole)
    dropped: set[int] = set()
    while left:
        for key in rng.permutation(sorted(left)[: int(rng.integers(1, 8))]).tolist():
            size = int(rng.integers(0, 9))
            last = size >= len(left[key]) and bool(rng.integers(2))
            stage.push(key, left[key][:size], last=last)
            left[key] = left[key][size:]
            if last:
                del left[key]
        if rng.random() < 0.2:
            key = int(rng.integers(15))
            if key not in heard.ended:
                stage.drop(key)
                assert key not in stage.unfinished()
                heard.ended.add(key)  # not a word of it from now on
                dropped.add(key)
                left.pop(key, None)
        heard.run(flush=bool(rng.random() < 0.2))
    heard.run(flush=True)
    assert not stage.busy
    assert not stage.unfinished()
    for key in whole.keys() - dropped:
        assert key in heard.ended
        np.testing.assert_array_equal(heard.of(key), expected(whole[key]))
    assert all(len(lengths) <= rows.rows for lengths, _ in rows.calls)
    assert all(max(lengths.values()) <= rows.frames for lengths, _ in rows.calls)
    # Every row is free again: as many utterances as rows share one call.
    before = len(rows.calls)
    for i in range(rows.rows):
        stage.push(("new", i), some(rng, 1), last=True)
    stage.run(flush=True)
    assert len(rows.calls) == before + 1


def test_without_flush_a_call_waits_until_every_row_has_frames() -> None:
    rng = np.random.default_rng(0)
    stage, rows = stage_of(3, 4)
    codes = {key: some(rng, 6) for key in "abc"}
    for key in "ab":
        stage.push(key, codes[key], last=True)
        assert stage.run(flush=False) == []
    assert rows.calls == []
    stage.push("c", codes["c"], last=True)
    assert stage.run(flush=False) == []  # started, not yet fetched
    assert [set(lengths.values()) for lengths, _ in rows.calls] == [{4}, {2}]
    assert [len(fresh) for _, fresh in rows.calls] == [3, 0]
    assert stage.busy
    heard = Heard(stage)
    heard.run()
    assert heard.ended == set("abc")
    for key in "abc":
        np.testing.assert_array_equal(heard.of(key), expected(codes[key]))
    assert not stage.busy


def test_a_flush_decodes_everything_that_has_come_and_waits_for_it() -> None:
    rng = np.random.default_rng(0)
    stage, _ = stage_of(2, 4)
    codes = {key: some(rng, 9) for key in range(5)}
    for key, part in codes.items():
        stage.push(key, part, last=key != 4)
    heard = Heard(stage)
    heard.run(flush=True)
    assert heard.ended == {0, 1, 2, 3}
    assert not stage.busy
    assert stage.unfinished() == [4]  # more of it may come
    stage.push(4, codes[4][:0], last=True)
    heard.run(flush=True)
    np.testing.assert_array_equal(heard.of(4), expected(codes[4]))
    assert heard.ended == {0, 1, 2, 3, 4}


def test_an_utterance_of_no_frames_ends_without_the_codec() -> None:
    stage, rows = stage_of(2, 4)
    stage.push("a", np.zeros((0, 2), np.int32), last=True)
    assert stage.busy
    [part] = stage.run(flush=True)
    assert (part.key, part.last, part.audio.shape) == ("a", True, (0,))
    assert part.audio.dtype == np.float32
    assert rows.calls == []
    stage.push("b", np.zeros((0, 2), np.int32), last=False)
    assert not stage.busy
    assert stage.run(flush=True) == []


def test_a_row_given_up_in_the_middle_starts_anew() -> None:
    rng = np.random.default_rng(0)
    stage, rows = stage_of(1, 2)
    stage.push("a", some(rng, 3), last=False)
    assert [part.key for part in stage.run(flush=True)] == ["a", "a"]
    stage.drop("a")
    stage.drop("a")  # and twice is once
    codes = some(rng, 4)
    stage.push("b", codes, last=True)
    heard = Heard(stage)
    heard.run(flush=True)
    np.testing.assert_array_equal(heard.of("b"), expected(codes))
    assert [fresh for _, fresh in rows.calls] == [{0}, set(), {0}, set()]
    assert not stage.unfinished()


@pytest.mark.parametrize("where", ["begin", "wait"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_after_a_failure_everything_is_given_or_unfinished(where: str, call: int) -> None:
    """Nothing is lost: neither what ended in the failed call nor what was fetched before it."""
    rng = np.random.default_rng(0)
    for flush in (False, True):
        stage, rows = stage_of(2, 4)
        {"begin": rows.fail_begin, "wait": rows.fail_wait}[where].add(call)
        heard = Heard(stage)
        stage.push("long", some(rng, 11), last=False)
        pushed: set[object] = {"long"}

        def feed(
            stage: DecodeStage[object], heard: Heard, pushed: set[object], flush: bool
        ) -> None:
            for key in range(6):
                stage.push(key, some(rng, 3), last=True)
                pushed.add(key)
                heard.run(flush=flush)
            heard.run(flush=True)

        with pytest.raises(jax.errors.JaxRuntimeError, match="planted"):
            feed(stage, heard, pushed, flush)
        assert pushed - heard.ended == set(stage.unfinished())
