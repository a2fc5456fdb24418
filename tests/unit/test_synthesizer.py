"""Synthesizer: what becomes of a request depends on it alone, and one that fails fails alone."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.config import SAMPLES_PER_FRAME
from csm_jax.engine import Job
from csm_jax.mimi.codec import JaxMimi
from csm_jax.prompt import Segment
from csm_jax.request import Request
from csm_jax.runaway import Flags, frame_cap
from csm_jax.synthesizer import (
    Piece,
    Result,
    SynthesisError,
    Synthesizer,
    redraw_seed,
)
from csm_jax.watermark import JaxWatermarker
from csm_jax.weights.mimi import load_mimi
from tests.support.codec import PlainCodec
from tests.support.model import params_of
from tests.support.synthesizer import (
    CONFIG,
    Marker,
    Rows,
    failure,
    generator,
    make,
    mixed,
    plain_codec,
    request,
    solo,
    tokenizer,
    voice,
)

MIXED = mixed(24)


@pytest.fixture(scope="module")
def alone() -> list[Result]:
    """What becomes of the mixed requests one by one."""
    return solo(MIXED)


def run(synthesizer: Synthesizer, requests: list[Request]) -> list[Result]:
    """Returns the results in the order of the requests."""
    results = list(synthesizer.run(enumerate(requests)))
    assert sorted(result.id for result in results) == list(range(len(requests)))  # pyright: ignore
    assert_idle(synthesizer)
    return sorted(results, key=lambda result: result.id)  # pyright: ignore


def assert_idle(synthesizer: Synthesizer) -> None:
    """Nothing is left of what was asked."""
    assert not synthesizer.busy
    assert synthesizer.queued == 0
    assert free_slots(synthesizer) == synthesizer.settings.slots
    assert not synthesizer._by_engine
    assert not synthesizer._readers
    assert not synthesizer._whole.unfinished()
    assert not synthesizer._streamed.unfinished()


def free_slots(synthesizer: Synthesizer) -> int:
    return len(synthesizer._engine._free)


def assert_same(result: Result, codes: np.ndarray, offset: float = 0.0) -> None:
    """The result has these codes, and the audio that a plain codec makes of them."""
    assert result.error is None
    assert result.audio is not None
    assert result.audio.dtype == np.float32
    np.testing.assert_array_equal(result.codes, codes)
    np.testing.assert_array_equal(result.audio, plain_codec().decode(codes) + np.float32(offset))


# --- the same whatever else runs ----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"look_ahead": False, "codec_rows": 1},
        {"slots": 1, "chunk_frames": 3, "voice_segments": 1, "voice_capacity": 16, "codec_rows": 8},
    ],
)
def test_results_are_those_of_each_request_alone(
    alone: list[Result], changes: dict[str, Any]
) -> None:
    """Whatever the slots, chunks, segments, codec rows and neighbours; also in another order."""
    synthesizer = make(**changes)
    for order in (range(24), np.random.default_rng(5).permutation(24).tolist()):
        results = run(synthesizer, [MIXED[i] for i in order])
        for i, result in zip(order, results, strict=True):
            assert_same(result, alone[i].codes)
            assert result.finish_reason == alone[i].finish_reason
            assert (result.flags, result.redraws) == ((), 0)
    assert 0 < synthesizer.slot_use() <= 1
    assert synthesizer.stats.finished == {"length": 48}


def test_a_stream_is_the_whole_in_pieces(alone: list[Result]) -> None:
    synthesizer = make(watermarker=Marker())
    for wanted, one in zip(MIXED[:6], alone[:6], strict=True):
        pieces = list(synthesizer.stream(wanted))
        assert all(len(piece) for piece in pieces)
        np.testing.assert_array_equal(
            np.concatenate(pieces), plain_codec().decode(one.codes) + np.float32(1)
        )
    assert_idle(synthesizer)
    [result] = run(synthesizer, [MIXED[0]])
    assert_same(result, alone[0].codes, offset=1)


def test_a_stream_that_is_closed_before_it_is_heard_is_given_up() -> None:
    synthesizer = make()
    synthesizer.stream(MIXED[0]).close()  # pyright: ignore
    assert_idle(synthesizer)


def test_iterators_that_take_turns_do_not_take_each_other_s_results(alone: list[Result]) -> None:
    synthesizer = make()
    first, second = synthesizer.stream(MIXED[0]), synthesizer.stream(MIXED[1])
    ticket = synthesizer.submit(MIXED[2], id="submitted")
    many = synthesizer.run(enumerate(MIXED[3:12]))
    others = synthesizer.run(enumerate(MIXED[12:16]))
    heard: dict[int, list[np.ndarray]] = {0: [], 1: []}
    results: dict[str, list[Result]] = {"many": [], "others": []}
    pumped: list[Piece | Result] = []
    sources: dict[Iterator[Any], Callable[[Any], None]] = {
        first: heard[0].append,
        many: results["many"].append,
        second: heard[1].append,
        others: results["others"].append,
    }
    while sources:
        for source, take in list(sources.items()):
            item = next(source, None)
            if item is None:
                del sources[source]
            else:
                take(item)
        pumped += synthesizer.pump()
    while synthesizer.busy:
        pumped += synthesizer.pump()
    for i in range(2):
        np.testing.assert_array_equal(
            np.concatenate(heard[i]), plain_codec().decode(alone[i].codes)
        )
    for name, offset, count in (("many", 3, 9), ("others", 12, 4)):
        assert sorted(result.id for result in results[name]) == list(range(count))  # pyright: ignore
        for result in results[name]:
            assert_same(result, alone[offset + result.id].codes)  # pyright: ignore
    [only] = pumped
    assert isinstance(only, Result)
    assert only.id == "submitted"
    assert_same(only, alone[2].codes)
    synthesizer.cancel(ticket)
    assert_idle(synthesizer)


def test_the_first_to_end_is_the_first_to_come() -> None:
    synthesizer = make(codec_rows=1)
    lengths = [14, 2, 10, 6]
    ids = [r.id for r in synthesizer.run((n, request(n, frames=n)) for n in lengths)]
    assert ids == [2, 6, 10, 14]


def test_few_requests_are_taken_ahead() -> None:
    synthesizer = make()
    settings = synthesizer.settings
    taken = 0

    def source() -> Iterator[tuple[int, Request]]:
        nonlocal taken
        while True:
            taken += 1
            yield taken, request(taken, frames=taken % 7 + 1)

    results = synthesizer.run(source())
    assert taken == 0
    ahead = settings.slots + settings.slots // 2 + 1
    for done in range(40):
        next(results)
        # Those that have ended wait for the codec's call to be full.
        assert taken - done <= ahead + settings.codec_rows + settings.slots
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert_idle(synthesizer)


def test_what_ended_is_decoded_when_the_codec_s_rows_are_full_or_at_a_flush() -> None:
    for flush in (False, True):
        synthesizer = make(codec_rows=3)
        synthesizer.submit(request(1, frames=2), id="short")
        synthesizer.submit(request(2, frames=30), id="long")
        order: list[tuple[object, int]] = []
        while synthesizer.busy:
            order += [(output.id, synthesizer.longest) for output in synthesizer.pump(flush=flush)]
        assert [id for id, _ in order] == ["short", "long"]
        assert (order[0][1] < 10) == flush


# --- voices -------------------------------------------------------------------------------------


def test_a_voice_is_heard_alike_in_a_segment_and_in_the_prompt() -> None:
    """Shared or not, alone or beside more voices than there are segments."""
    speaks = [request(7, frames=9, voice=voice(n, frames=20)) for n in range(5)]
    want = solo(speaks)
    assert len({result.codes.tobytes() for result in want}) == 5
    shared = make()
    assert len(jobs_of(shared, speaks[0]).prompt[0]) < 10
    for results in (run(shared, speaks), [run(shared, [each])[0] for each in speaks]):
        for one, result in zip(want, results, strict=True):
            assert_same(result, one.codes)


def test_a_voice_longer_than_a_segment_is_part_of_the_prompt() -> None:
    long = [request(3, frames=6, voice=voice(1, frames=60)), request(4, frames=4)]
    synthesizer = make()
    job = jobs_of(synthesizer, long[0])
    assert job.voice is None
    assert len(job.prompt[0]) > 60
    for one, result in zip(solo(long), run(synthesizer, long), strict=True):
        assert_same(result, one.codes)


def test_threads_may_make_jobs_of_the_same_voices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a generator does for its caller, beside a synthesizer in a thread of its own."""
    monkeypatch.setattr("csm_jax.jobs._VOICE_PROMPTS", 1)
    jobs = make()._jobs
    voices = [voice(n, frames=2) for n in range(8)]

    def use(thread: int) -> None:
        for n in np.random.default_rng(thread).integers(0, len(voices), 60):
            jobs._voice_prompt(voices[n])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
    finally:
        sys.setswitchinterval(interval)


def jobs_of(synthesizer: Synthesizer, asked: Request) -> Job:
    return synthesizer._jobs.job(
        asked, segment_capacity=synthesizer.settings.sizes.segment_capacity
    )


# --- what is bad, or fails ----------------------------------------------------------------------


def context(audio: Any) -> list[Segment]:
    return [Segment(speaker=0, text="Before.", audio=audio)]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"text": "  "}, "text"),
    ({"text": "a\0b"}, "text"),
    ({"speaker": -1}, "speaker"),
    ({"max_audio_length_ms": 80 * 127}, "positions"),
    ({"max_audio_length_ms": 80 * 5000}, "max_seq_len"),
    ({"max_audio_length_ms": 10.0}, "less than one frame"),
    ({"max_audio_length_ms": float("inf")}, "max_audio_length_ms"),
    ({"text": "word " * 100}, "positions"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": float("nan")}, "top_p"),
    ({"min_p": float("nan")}, "min_p"),
    ({"decoder_temperature": float("nan")}, "temperature"),
    ({"seed": -1}, "seed"),
    ({"context": context("file.wav")}, "path"),
    ({"context": context(np.ones(1920, np.int16))}, "floating"),
    ({"context": context(np.full(1920, np.nan, np.float32))}, "NaN"),
    ({"context": context(np.ones((2, 1920), np.float32))}, "mono"),
    ({"context": context(None)}, "floating"),
    ({"context": context(object())}, "floating"),
    ({"context": context([[1.0], [2.0, 3.0]])}, ""),
    ({"voice": voice(1, codebooks=3)}, "codebooks"),
    ({"voice": voice(1, frames=2000)}, "positions"),
]


def test_a_bad_request_has_a_result_that_says_so_and_stops_no_other(alone: list[Result]) -> None:
    synthesizer = make()
    good = iter(range(len(MIXED)))
    asked: list[tuple[object, Request]] = []
    for i, (change, _) in enumerate(BAD):
        asked.append((("bad", i), request(**{"seed": 1} | change)))
        if (n := next(good, None)) is not None:
            asked.append((n, MIXED[n]))
    results = {result.id: result for result in synthesizer.run(asked)}
    assert_idle(synthesizer)
    assert len(results) == len(asked)
    for i, (change, message) in enumerate(BAD):
        result = results["bad", i]
        assert result.error, change
        assert message in result.error, change
        assert result.finish_reason == "error"
        assert result.audio is None
        assert result.codes.shape == (0, CONFIG.num_codebooks)
    for n, one in enumerate(alone[: len(asked) - len(BAD)]):
        assert_same(results[n], one.codes)


def test_what_a_bad_request_raises_is_raised_by_submit_and_stream() -> None:
    synthesizer = make()
    with pytest.raises(ValueError, match="speaker"):
        synthesizer.submit(request(1, speaker=-1))
    with pytest.raises(ValueError, match="speaker"):
        synthesizer.stream(request(1, speaker=-1))
    assert_idle(synthesizer)


def test_a_device_that_fails_while_context_is_encoded_fails_its_request(
    alone: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = plain_codec()
    encode = codec.encode

    def failing(audio: np.ndarray) -> np.ndarray:
        if len(audio) > 9 * SAMPLES_PER_FRAME:
            raise failure()
        return encode(audio)

    monkeypatch.setattr(codec, "encode", failing)
    bad = request(1, context=context(np.ones(10 * SAMPLES_PER_FRAME, np.float32)))
    results = run(make(codec=codec), [MIXED[0], bad, MIXED[1]])
    assert results[1].error is not None
    assert "planted" in results[1].error
    for i, n in ((0, 0), (2, 1)):
        assert_same(results[i], alone[n].codes)


def test_closing_the_iterator_gives_up_what_it_has_started(alone: list[Result]) -> None:
    synthesizer = make()
    results = synthesizer.run(enumerate(MIXED))
    next(results)
    kept = synthesizer.submit(MIXED[3], id="kept")
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert list(synthesizer._tasks) == [kept]
    outputs: list[Piece | Result] = []
    while synthesizer.busy:
        outputs += synthesizer.pump()
    [result] = outputs
    assert isinstance(result, Result)
    assert_same(result, alone[3].codes)
    stream = synthesizer.stream(request(1, frames=40))
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert_idle(synthesizer)
    for one, again in zip(alone, run(synthesizer, MIXED), strict=True):
        assert_same(again, one.codes)


def test_an_exception_of_the_source_comes_through_and_leaves_nothing() -> None:
    synthesizer = make()

    def source() -> Iterator[tuple[int, Request]]:
        yield 0, request(1, frames=3)
        yield 1, request(2, frames=30)
        raise KeyError("the source")

    with pytest.raises(KeyError, match="the source"):
        list(synthesizer.run(source()))
    assert_idle(synthesizer)


def test_warming_up_beside_requests_is_refused() -> None:
    synthesizer = make()
    ticket = synthesizer.submit(request(1))
    with pytest.raises(RuntimeError, match="on their way"):
        synthesizer.warm_up()
    synthesizer.cancel(ticket)


# --- drawn again --------------------------------------------------------------------------------


def test_a_request_that_reaches_the_cap_of_its_text_is_drawn_again() -> None:
    asked = [
        request(5, frames=None),
        request(5, frames=frame_cap("a")),  # its cap is the caller's wish
        request(6, frames=None),
    ]
    for redraws in (0, 2):
        results = run(make(redraws=redraws), asked)
        assert [result.redraws for result in results] == [redraws, 0, redraws]
        for result, one in zip(results, asked, strict=True):
            seed = redraw_seed(one.seed, result.redraws) if result.redraws else one.seed
            [want] = solo([dataclasses.replace(one, seed=seed)])
            assert_same(result, want.codes)
            assert len(result.codes) == frame_cap("a")
            assert result.finish_reason == "length"
    assert redraw_seed(5, 1) != redraw_seed(5, 2) != redraw_seed(6, 2)


class SometimesSilent(PlainCodec):
    """Says nothing where the first code is even."""

    def open_stream(self) -> SometimesSilentStream:
        return SometimesSilentStream(self)


class SometimesSilentStream(PlainCodec):
    def __init__(self, codec: PlainCodec) -> None:
        super().__init__(num_codebooks=codec.num_codebooks, codebook_size=codec.codebook_size)
        self.silent: bool | None = None

    def decode(self, codes: np.ndarray) -> np.ndarray:
        if self.silent is None:
            self.silent = silent(codes)
        # A tone at full scale, so that only this codec's silence is silent.
        audio = np.tile(np.sin(np.arange(SAMPLES_PER_FRAME)), len(codes)).astype(np.float32)
        return audio * (not self.silent)


def silent(codes: np.ndarray) -> bool:
    return codes[0, 0] % 2 == 0


def test_silence_is_drawn_again_until_it_speaks_or_the_draws_are_used_up() -> None:
    codec = SometimesSilent(num_codebooks=CONFIG.num_codebooks, codebook_size=CONFIG.codebook_size)
    asked = [request(seed, frames=3) for seed in range(12)]
    redraws = 2
    synthesizer = make(codec=codec, redraws=redraws)
    results = run(synthesizer, asked)
    times = []
    for result, one in zip(results, asked, strict=True):
        seeds = [one.seed, *(redraw_seed(one.seed, n + 1) for n in range(redraws))]
        draws = [each.codes for each in solo([dataclasses.replace(one, seed=s) for s in seeds])]
        good = next((n for n, codes in enumerate(draws) if not silent(codes)), None)
        times.append(redraws if good is None else good)
        assert result.redraws == times[-1]
        np.testing.assert_array_equal(result.codes, draws[times[-1]])
        assert result.audio is not None
        assert len(result.audio) == len(result.codes) * SAMPLES_PER_FRAME
        assert result.flags == ((Flags.SILENCE,) if good is None else ())
    assert {0, 1, 2} == set(times)
    flagged = sum(times) + sum(bool(result.flags) for result in results)
    assert synthesizer.stats.flagged == {Flags.SILENCE: flagged}


def test_a_loop_is_stopped_flagged_and_drawn_again() -> None:
    params = params_of(CONFIG)
    # The same scores at every frame: code 7, whatever came before.
    head = jnp.zeros_like(params["backbone"]["codebook0_head"])
    stuck = {
        "backbone": params["backbone"] | {"codebook0_head": head},
        "decoder": params["decoder"],
    }
    synthesizer = make(params=stuck, redraws=1, stop_repetition=True)
    [result] = run(synthesizer, [request(1, frames=100, temperature=0.0)])
    assert result.flags == (Flags.REPETITION,)
    assert result.finish_reason == "length"
    assert result.redraws == 1
    assert len(result.codes) < 50
    assert synthesizer.stats.flagged == {Flags.REPETITION: 2}


def test_a_stream_is_never_drawn_again() -> None:
    synthesizer = make(redraws=2)
    audio = np.concatenate(list(synthesizer.stream(request(5, frames=None))))
    assert len(audio) == frame_cap("a") * SAMPLES_PER_FRAME


def test_codes_alone_need_neither_codec_nor_watermark(alone: list[Result]) -> None:
    def refuse(audio: np.ndarray) -> Exception:
        return AssertionError("nothing to mark")

    synthesizer = make(watermarker=Marker(refuse))
    synthesizer.submit(MIXED[0], id=1, decode=False)
    outputs: list[Piece | Result] = []
    while synthesizer.busy:
        outputs += synthesizer.pump()
    [result] = outputs
    assert isinstance(result, Result)
    assert result.audio is not None
    assert result.audio.size == 0
    np.testing.assert_array_equal(result.codes, alone[0].codes)


# --- codec and watermark that fail --------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("the networks gave NaN"), ValueError("the audio is NaN"), failure("NaN")]
)
def test_a_watermark_that_fails_fails_its_request_alone(error: Exception) -> None:
    asked = [request(n, frames=6) for n in range(3)]  # marked together
    want = solo(asked)
    damaged = plain_codec().decode(want[1].codes)

    def bad(audio: np.ndarray) -> Exception | None:
        # Also the first piece of its stream.
        return error if len(audio) and audio[0] == damaged[0] else None

    synthesizer = make(watermarker=Marker(bad))
    first, failed, last = run(synthesizer, asked)
    assert_same(first, want[0].codes, offset=1)
    assert_same(last, want[2].codes, offset=1)
    assert failed.finish_reason == "error"
    assert failed.audio is None
    assert failed.error is not None
    assert "NaN" in failed.error
    np.testing.assert_array_equal(failed.codes, want[1].codes)
    with pytest.raises(SynthesisError, match="NaN"):
        list(synthesizer.stream(asked[1]))
    assert_idle(synthesizer)


class FailingCodec(PlainCodec):
    """Whose rows fail at given calls; `opened` are all there have been."""

    def __init__(self, *, begin: set[int] = frozenset(), wait: set[int] = frozenset()) -> None:  # pyright: ignore
        super().__init__(num_codebooks=CONFIG.num_codebooks, codebook_size=CONFIG.codebook_size)
        self.begin_at, self.wait_at = begin, wait
        self.opened: list[Rows] = []

    def open_rows(self, rows: int, frames: int) -> Rows:  # pyright: ignore
        made = Rows(self, rows, frames)
        # The first of each kind only; what replaces them works.
        if len(self.opened) < 2:
            made.fail_begin, made.fail_wait = set(self.begin_at), set(self.wait_at)
        self.opened.append(made)
        return made


@pytest.mark.parametrize("where", ["begin", "wait"])
@pytest.mark.parametrize("call", [0, 2, 3])
def test_a_codec_that_fails_fails_what_was_in_it(
    alone: list[Result], where: str, call: int
) -> None:
    codec = FailingCodec(**{where: {call}})
    synthesizer = make(codec=codec)
    results = run(synthesizer, MIXED)
    assert len(codec.opened) == 3
    failed = [result for result in results if result.error is not None]
    assert 1 <= len(failed) <= 12
    for one, result in zip(alone, results, strict=True):
        np.testing.assert_array_equal(result.codes, one.codes)
        if result.error is None:
            assert_same(result, one.codes)
        else:
            assert result.finish_reason == "error"
            assert result.audio is None
            assert "codec" in result.error
            assert "planted" in result.error
    for one, result in zip(alone, run(synthesizer, MIXED), strict=True):
        assert_same(result, one.codes)


@pytest.mark.parametrize("where", ["begin", "wait"])
def test_a_codec_that_fails_in_a_stream_frees_its_slot(alone: list[Result], where: str) -> None:
    codec = FailingCodec(**{where: {2}})
    synthesizer = make(codec=codec, slots=4)
    stream = synthesizer.stream(request(1, frames=90))
    heard = [next(stream)]
    with pytest.raises(SynthesisError, match="codec"):
        heard.extend(stream)
    [want] = solo([request(1, frames=90)])
    np.testing.assert_array_equal(
        np.concatenate(heard), plain_codec().decode(want.codes[: 2 * len(heard)])
    )
    assert_idle(synthesizer)
    np.testing.assert_array_equal(
        np.concatenate(list(synthesizer.stream(MIXED[0]))), plain_codec().decode(alone[0].codes)
    )


def test_scores_that_are_not_finite_fail_their_request_alone(alone: list[Result]) -> None:
    params = params_of(CONFIG)
    # One text token's embedding is damaged: only the request that says it fails.
    [bad] = set(tokenizer().encode("[0]z")) - set(tokenizer().encode("[0]a"))
    table = params["backbone"]["text_embeddings"].at[bad].set(jnp.nan)
    damaged = params | {"backbone": params["backbone"] | {"text_embeddings": table}}
    synthesizer = make(params=damaged)
    results = run(synthesizer, [MIXED[0], request(1, text="z"), MIXED[1]])
    assert results[1].error is not None
    assert "not finite" in results[1].error
    assert results[1].audio is None
    for i, n in ((0, 0), (2, 1)):
        assert_same(results[i], alone[n].codes)
    with pytest.raises(SynthesisError, match="not finite"):
        list(synthesizer.stream(request(1, text="z")))
    assert_idle(synthesizer)


# --- compiling ----------------------------------------------------------------------------------

WATERMARK = "silentcipher/44_1_khz/73999_iteration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What is compiled from now on."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            seen.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow  # the slots' own test of this is not
def test_after_warming_up_nothing_is_compiled(random_model: Path, compiled: list[str]) -> None:
    """With the codec and the watermark of a real model as well.

    Context audio is left out: its encoder compiles one program for each power of two of frames.
    """
    mimi = load_mimi(random_model / "tokenizer-e351c8d8-checkpoint125.safetensors")
    synthesizer = make(
        codec=JaxMimi(*mimi, num_codebooks=CONFIG.num_codebooks),
        watermarker=JaxWatermarker.from_dir(random_model / WATERMARK),
        slots=3,  # no other test's programs
        capacity=64,
        codec_frames=4,
        redraws=1,
    )
    synthesizer.warm_up()
    before = synthesizer.compilations
    assert before > 0
    assert len(compiled) > before  # the listener hears
    compiled.clear()
    asked = [
        Request(
            text="a" * (1 + 2 * i),
            speaker=i % 2,
            seed=i,
            voice=(None, voice(1), voice(2, frames=20))[i % 3],
            max_audio_length_ms=80 * (1 + 3 * i),
            topk=(0, 50, 5)[i % 3],
            temperature=(0.9, 0.0)[i % 2],
            top_p=(1.0, 0.8)[i % 2],
        )
        for i in range(7)
    ]
    results = list(synthesizer.run(enumerate(asked)))
    assert {result.id for result in results if result.error is None} == set(range(7))
    assert sum(map(len, synthesizer.stream(asked[3]))) == 10 * SAMPLES_PER_FRAME
    stream = synthesizer.stream(asked[4])
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert list(synthesizer.run([(0, asked[0])]))
    assert compiled == []
    assert synthesizer.compilations == before


def test_generators_hand_on_what_they_have() -> None:
    """A synthesizer of a generator makes what the generator makes."""
    synthesizer = generator().synthesizer(make().settings)
    for wanted, result in zip(MIXED[:3], run(synthesizer, MIXED[:3]), strict=True):
        assert result.audio is not None
        [audio] = generator().generate_batch([wanted])
        np.testing.assert_array_equal(result.audio, audio)
