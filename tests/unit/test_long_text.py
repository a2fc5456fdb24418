"""Long texts: what each piece is asked with, what is heard between pieces, and what goes wrong."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from csm_jax.config import CSMConfig, csm_1b
from csm_jax.long_text import (
    SpokenChunk,
    join_chunks,
    speak_chunks,
    speak_long,
    split_text,
)
from csm_jax.pipeline import GenerationError, Generator
from csm_jax.prompt import Segment, TextTokenizer
from csm_jax.request import Request
from csm_jax.runaway import Flags, frame_cap
from csm_jax.synthesizer import Result, redraw_seed
from csm_jax.text import Chunk
from csm_jax.voices import Voice, VoiceTurn
from tests.support.codec import PlainCodec
from tests.support.model import params_of, short_config
from tests.support.tokenizer import write_tokenizer

CONFIG = short_config()
SAMPLES = 1920
CHUNKS = [
    Chunk("One.", 350),
    Chunk("Two.", 800),
    Chunk("Three.", 150),
    Chunk("Four.", 0),
    Chunk("Five.", 0),
]
BEFORE = Segment(speaker=1, text="Before.", audio=np.ones(3 * SAMPLES, np.float32) / 2)


def result(frames: int, *, reason: str = "eos", flags: tuple[str, ...] = ()) -> Result:
    return Result(
        id=0,
        audio=np.full(frames * SAMPLES, 0.5, np.float32),
        codes=np.full((frames, CONFIG.num_codebooks), frames, np.int32),
        finish_reason=reason,  # pyright: ignore[reportArgumentType]
        flags=flags,
    )


class Scripted(Generator):
    """A generator that says what a test has written, after checking that it could be said."""

    def __init__(self, tokenizer: TextTokenizer, config: CSMConfig = CONFIG, **script: Any) -> None:
        super().__init__(
            config=config,
            params=params_of(CONFIG),
            tokenizer=tokenizer,
            codec=PlainCodec(
                num_codebooks=config.num_codebooks, codebook_size=config.codebook_size
            ),
            watermarker=None,
        )
        self.script: dict[str, Sequence[Result]] = script
        self.asked: list[Request] = []

    def generate_results(self, requests: Any, **options: Any) -> list[Result]:
        [request] = requests
        assert options["stop_repetition"] is True
        self.prompt_lengths(requests)
        self.asked.append(request)
        times = sum(each.text == request.text for each in self.asked)
        name = request.text.removesuffix(".")
        answer = self.script[name][times - 1] if name in self.script else result(len(name))
        options["on_progress"](len(answer.codes), request.max_frames)
        return [answer]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return TextTokenizer.from_file(write_tokenizer(path, vocab_size=CONFIG.text_vocab_size))


@pytest.fixture
def scripted(tokenizer: TextTokenizer) -> Callable[..., Scripted]:
    return lambda **script: Scripted(tokenizer, **script)


def heard(request: Request) -> list[tuple[int, str, int]]:
    return [
        (s.speaker, s.text, len(s.codes) if s.codes is not None else -len(s.audio))
        for s in request.context
    ]


# --- the pieces --------------------------------------------------------------------------------


def test_a_short_text_is_one_piece_as_it_is() -> None:
    text = "One  sentence.\n\nAnother paragraph."
    assert split_text(text, normalise=False) == [Chunk(text, 0)]
    assert split_text("a" * 240, normalise=False) == [Chunk("a" * 240, 0)]


def test_a_long_text_is_cut_and_not_if_that_is_turned_off() -> None:
    text = "This is a sentence of no great length. " * 10
    pieces = split_text(text)
    assert len(pieces) > 1
    assert all(len(piece.text) <= 240 for piece in pieces)
    assert " ".join(piece.text for piece in pieces) == text.strip()
    assert [piece.pause_ms for piece in pieces] == [350] * (len(pieces) - 1) + [0]
    assert [piece.text for piece in split_text(text, max_characters=None)] == [text.strip()]


def test_the_length_is_that_of_the_words_that_are_said() -> None:
    assert len(split_text("1234567 " * 25, normalise=False)) == 1
    assert len(split_text("1234567 " * 25)) > 1


def test_normalising_is_on_and_knows_languages() -> None:
    assert split_text("3 cats") == [Chunk("Three cats", 0)]
    assert split_text("3 Katzen", language="de") == [Chunk("drei Katzen", 0)]
    assert split_text("3 cats", normalise=False) == [Chunk("3 cats", 0)]


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        ("", {}, "the text is empty"),
        ("a\0b", {}, "control character"),
        ("hi", {"language": "klingon"}, "language must be"),
        ("word " * 100, {"max_characters": 5}, "max_characters must be at least"),
    ],
)
def test_what_cannot_be_split(text: str, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        split_text(text, **options)


def test_a_model_of_few_positions_takes_shorter_pieces() -> None:
    words = "a good word " * 30
    for text in (words, "One. Two. " * 30, "LOUD " * 60):
        for config, positions in ((csm_1b(), 2048), (with_positions(512), 512)):
            pieces = split_text(text, normalise=False, config=config)
            assert " ".join(piece.text for piece in pieces) == text.strip()
            # As many tokens as characters, the marks around them, and what is spoken.
            longest = max(len(piece.text) + 10 + frame_cap(piece.text) for piece in pieces)
            assert longest < positions
            assert positions == 512 or pieces == split_text(text, normalise=False)
    assert len(split_text(words, normalise=False, config=with_positions(512))) < 6
    # Where nothing is short enough, the request itself will say so.
    assert split_text("One. Two. " * 30, config=with_positions(16))


@pytest.mark.parametrize(("positions", "frames"), [(512, 256), (1200, 600), (2048, 1125)])
def test_generate_asks_for_90_s_or_half_of_few_positions(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, positions: int, frames: int
) -> None:
    asked: list[Request] = []

    def results(self: Generator, requests: Sequence[Request], **options: Any) -> list[Result]:
        asked.extend(requests)
        return [result(1)]

    monkeypatch.setattr(Scripted, "generate_results", results)
    generator = Scripted(tokenizer, with_positions(positions))
    generator.generate("Hi.", 0)
    generator.generate("Hi.", 0, max_audio_length_ms=800)
    assert [request.max_frames for request in asked] == [frames, 10]


# --- requests ----------------------------------------------------------------------------------


def test_each_piece_hears_the_context_and_the_last_two(scripted: Callable[..., Scripted]) -> None:
    generator = scripted()
    pieces = list(speak_chunks(generator, CHUNKS, 3, context=[BEFORE]))
    before = (1, "Before.", -3 * SAMPLES)
    assert [heard(request) for request in generator.asked] == [
        [before],
        [before, (3, "One.", 3)],
        [before, (3, "One.", 3), (3, "Two.", 3)],
        [before, (3, "Two.", 3), (3, "Three.", 5)],
        [before, (3, "Three.", 5), (3, "Four.", 4)],
    ]
    # The codes as they were made, not audio that carries a watermark.
    assert generator.asked[1].context[1].codes is pieces[0].codes
    assert [piece.text for piece in pieces] == [chunk.text for chunk in CHUNKS]


@pytest.mark.parametrize(("count", "most"), [(0, 0), (1, 1), (9, 4)])
def test_how_many_pieces_are_heard(
    scripted: Callable[..., Scripted], count: int, most: int
) -> None:
    generator = scripted()
    list(speak_chunks(generator, CHUNKS, 0, context_chunks=count))
    assert [len(request.context) for request in generator.asked] == [min(i, most) for i in range(5)]


def test_settings_arrive(scripted: Callable[..., Scripted]) -> None:
    generator = scripted()
    codes = np.ones((4, CONFIG.num_codebooks), np.int32)
    voice = Voice(
        name="anna",
        turns=(VoiceTurn(speaker=0, text="Hi.", codes=codes),),
        codebook_size=CONFIG.codebook_size,
        provenance={},
    )
    list(speak_chunks(generator, CHUNKS, 0, voice=voice, temperature=0.3, top_p=0.5, topk=7))
    for request in generator.asked:
        assert request.voice is voice
        assert (request.temperature, request.top_p, request.topk) == (0.3, 0.5, 7)


def test_seeds(scripted: Callable[..., Scripted]) -> None:
    def seeds(seed: int) -> list[int]:
        generator = scripted()
        list(speak_chunks(generator, CHUNKS, 0, seed=seed))
        return [request.seed for request in generator.asked]

    assert seeds(7)[0] == 7
    assert seeds(7) == seeds(7)
    taken = [*seeds(7), *seeds(8), *(redraw_seed(seed, 1) for seed in seeds(7))]
    assert len(set(taken)) == len(taken)
    assert all(0 <= seed < 2**64 for seed in taken)


def test_the_longest_audio_is_that_of_the_pieces_text(scripted: Callable[..., Scripted]) -> None:
    generator = scripted()
    list(speak_chunks(generator, [Chunk("One.", 0)], 0))
    assert generator.asked[0].max_frames == frame_cap("One.")
    assert frame_cap("7" * 200) * 80 > 90_000
    list(speak_chunks(generator, [Chunk("7" * 200, 0)], 0))
    assert generator.asked[1].max_frames == 90_000 // 80
    list(speak_chunks(generator, [Chunk("One.", 0)], 0, max_audio_length_ms=400))
    assert generator.asked[2].max_frames == 5


def with_positions(count: int) -> CSMConfig:
    backbone = dataclasses.replace(CONFIG.backbone, max_seq_len=count)
    return dataclasses.replace(CONFIG, backbone=backbone)


def test_pieces_that_do_not_fit_are_left_out_and_the_context_stays(
    tokenizer: TextTokenizer,
) -> None:
    # Every segment of 9 text positions ("[0]One." is begin, 7 bytes, end) or so and its codes.
    chunks = [Chunk(name, 0) for name in ("One.", "Two.", "Six.", "Ten.")]
    (own,) = Scripted(tokenizer).prompt_lengths([Request(text="One.", speaker=0)])
    (given,) = Scripted(tokenizer).prompt_lengths(
        [Request(text="One.", speaker=0, context=[BEFORE])]
    )
    piece, cap = own + 3 + 1, 5
    for pieces in (0, 1, 2):
        for spare in (-1, 0):
            # The reference's rule: prompt < max_seq_len - max_frames.
            generator = Scripted(
                tokenizer, with_positions(given + pieces * piece + cap + 1 + spare)
            )
            if pieces == 0 and spare < 0:
                with pytest.raises(ValueError, match="do not fit"):
                    speak_chunks(
                        generator, chunks, 0, context=[BEFORE], max_audio_length_ms=cap * 80
                    )
                continue
            list(speak_chunks(generator, chunks, 0, context=[BEFORE], max_audio_length_ms=cap * 80))
            fit = pieces + (spare < 0) * -1
            assert [len(request.context) - 1 for request in generator.asked] == [
                min(i, fit) for i in range(4)
            ]
            for i, request in enumerate(generator.asked):
                assert request.context[0] is BEFORE
                assert [s.text for s in request.context[1:]] == [
                    chunk.text for chunk in chunks[max(i - fit, 0) : i]
                ]


def test_with_truncation_the_oldest_of_all_goes_first(tokenizer: TextTokenizer) -> None:
    (given,) = Scripted(tokenizer).prompt_lengths(
        [Request(text="One.", speaker=0, context=[BEFORE])]
    )
    generator = Scripted(tokenizer, with_positions(given + 6))
    chunks = [Chunk("One.", 0), Chunk("Two.", 0)]
    list(
        speak_chunks(
            generator,
            chunks,
            0,
            context=[BEFORE],
            max_audio_length_ms=400,
            truncate_context=True,
        )
    )
    assert [s.text for s in generator.asked[1].context] == ["Before.", "One."]


# --- what is heard -----------------------------------------------------------------------------


def test_pauses_are_exact(scripted: Callable[..., Scripted]) -> None:
    pieces = list(speak_chunks(scripted(), CHUNKS, 0))
    assert [piece.pause for piece in pieces] == [0, 8400, 19200, 3600, 0]
    audio = join_chunks(pieces)
    lengths = [3 * SAMPLES, 8400, 3 * SAMPLES, 19200, 5 * SAMPLES, 3600, 4 * SAMPLES, 4 * SAMPLES]
    sounds = np.repeat([0.5, 0, 0.5, 0, 0.5, 0, 0.5, 0.5], lengths)
    np.testing.assert_array_equal(audio, sounds.astype(np.float32))
    assert audio.dtype == np.float32
    assert len(join_chunks([])) == 0


@pytest.mark.parametrize(
    ("silent", "pauses"),
    [
        ("Two", [0, 0, 19200, 3600, 0]),
        ("Three", [0, 8400, 0, 19200, 0]),  # the longer of the two that meet
        ("One", [0, 0, 19200, 3600, 0]),  # none before the first sound
    ],
)
def test_a_piece_without_audio_is_left_out(
    scripted: Callable[..., Scripted],
    caplog: pytest.LogCaptureFixture,
    silent: str,
    pauses: list[int],
) -> None:
    generator = scripted(**{silent: [result(0), result(0)]})
    pieces = list(speak_chunks(generator, CHUNKS, 0))
    assert [piece.pause for piece in pieces] == pauses
    missing = next(piece for piece in pieces if piece.text == f"{silent}.")
    assert missing.fault == "ended at once, without audio"
    assert len(missing.audio) == len(missing.codes) == 0
    assert not any(silent in s.text for request in generator.asked for s in request.context)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is left out" in caplog.text
    assert f"'{silent}.'" in caplog.text


# --- what runs away ----------------------------------------------------------------------------

GOOD, LONG, LOOP, NONE = (
    result(5),
    result(9, reason="length"),
    result(8, reason="length", flags=(Flags.REPETITION,)),
    result(0),
)
QUIET = result(7, flags=(Flags.SILENCE,))


@pytest.mark.parametrize(
    ("draws", "taken", "fault"),
    [
        ([GOOD], 5, None),
        ([LONG, GOOD], 5, None),
        ([LOOP, GOOD], 5, None),
        ([QUIET, GOOD], 5, None),
        ([NONE, GOOD], 5, None),
        ([NONE, LONG], 9, "went on"),
        ([LOOP, NONE], 8, "repeats itself"),
        ([QUIET, LONG], 7, "is silent"),
        ([NONE, NONE], 0, "ended at once"),
    ],
)
def test_the_best_draw_is_kept(
    scripted: Callable[..., Scripted],
    caplog: pytest.LogCaptureFixture,
    draws: list[Result],
    taken: int,
    fault: str | None,
) -> None:
    caplog.set_level(logging.INFO)
    generator = scripted(Two=draws)
    pieces = list(speak_chunks(generator, CHUNKS, 0, seed=7))
    assert [len(piece.codes) for piece in pieces] == [3, taken, 5, 4, 4]
    asked = [request for request in generator.asked if request.text == "Two."]
    assert [request.seed for request in asked[1:]] == [redraw_seed(asked[0].seed, 1)][
        : len(draws) - 1
    ]
    assert [heard(request) for request in asked] == [[(0, "One.", 3)]] * len(draws)
    assert caplog.text.count("piece 2 of 5") == len(draws) - (fault is None)
    if fault is None:
        assert pieces[1].fault is None
    else:
        assert fault in (pieces[1].fault or "")
        assert fault in caplog.messages[-1]
        # What is wrong must not be learned from.
        assert not any("Two" in s.text for r in generator.asked for s in r.context)


def test_no_redraws_and_several(scripted: Callable[..., Scripted]) -> None:
    generator = scripted(Two=[LOOP])
    assert len(list(speak_chunks(generator, CHUNKS, 0, redraws=0))[1].codes) == 8
    assert len(generator.asked) == 5
    generator = scripted(Two=[LOOP, NONE, GOOD])
    assert len(list(speak_chunks(generator, CHUNKS, 0, redraws=5))[1].codes) == 5
    assert len(generator.asked) == 7


def test_a_length_that_was_asked_for_is_no_fault(scripted: Callable[..., Scripted]) -> None:
    generator = scripted(Two=[LONG])
    pieces = list(speak_chunks(generator, CHUNKS, 0, max_audio_length_ms=720))
    assert pieces[1].fault is None
    assert len(generator.asked) == 5


def test_a_failure_is_raised(scripted: Callable[..., Scripted]) -> None:
    failed = dataclasses.replace(result(2), audio=None, finish_reason="error", error="not finite")
    pieces = speak_chunks(scripted(Two=[failed]), CHUNKS, 0)
    assert next(pieces).text == "One."
    with pytest.raises(GenerationError, match=r"not finite \(in 'Two\.'\)"):
        next(pieces)


@pytest.mark.parametrize(
    ("chunks", "options", "error", "match"),
    [
        ([*CHUNKS, Chunk("<|end_of_text|>", 0)], {}, ValueError, "control token"),
        ([*CHUNKS, Chunk("x" * 3000, 0)], {}, ValueError, "do not fit"),
        (CHUNKS, {"context_chunks": -1}, ValueError, "context_chunks must be 0 or more"),
        (CHUNKS, {"redraws": -1}, ValueError, "redraws must be 0 or more"),
        (CHUNKS, {"seed": -1}, ValueError, "seed must be"),
        (CHUNKS, {"temperature": -1.0}, ValueError, "temperature"),
        (CHUNKS, {"max_audio_length_ms": 10}, ValueError, "less than one frame"),
        (CHUNKS, {"top_k": 3}, TypeError, "top_k"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_spoken(
    scripted: Callable[..., Scripted],
    chunks: list[Chunk],
    options: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        speak_chunks(scripted(), chunks, 0, **options)


def test_progress_counts_all_pieces(scripted: Callable[..., Scripted]) -> None:
    seen: list[tuple[int, int]] = []
    generator = scripted(Two=[LOOP, GOOD])
    list(speak_chunks(generator, CHUNKS, 0, on_progress=lambda *at: seen.append(at)))
    caps = [frame_cap(chunk.text) for chunk in CHUNKS]
    assert [done for done, _ in seen] == [3, 3 + 8, 3 + 5, 3 + 5 + 5, 17, 21]
    assert seen[0][1] == sum(caps)
    assert seen[-1][1] == 17 + caps[-1]


# --- with a model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer: TextTokenizer) -> Generator:
    return Generator(
        config=CONFIG,
        params=params_of(CONFIG),
        tokenizer=tokenizer,
        codec=PlainCodec(num_codebooks=CONFIG.num_codebooks, codebook_size=CONFIG.codebook_size),
        watermarker=None,
    )


def test_a_short_text_is_what_generate_makes_of_it(model: Generator) -> None:
    whole = model.generate("Hello there.", 1, [BEFORE], 480, 0.8, 20, seed=5, top_p=0.9)
    long = speak_long(
        model,
        "Hello there.",
        1,
        context=[BEFORE],
        max_audio_length_ms=480,
        temperature=0.8,
        topk=20,
        seed=5,
        top_p=0.9,
    )
    assert len(whole) == 6 * SAMPLES
    np.testing.assert_array_equal(long, whole)


def test_a_long_text_is_each_piece_after_the_last_two(model: Generator) -> None:
    text = "One is here. Two is here. Three is here. Four is here."
    options: dict[str, Any] = {"seed": 3, "max_audio_length_ms": 240}
    chunks = split_text(text, max_characters=15)
    assert len(chunks) == 4
    pieces: list[SpokenChunk] = []
    for piece in speak_chunks(model, chunks, 0, **options):
        request = Request(
            text=piece.text,
            speaker=0,
            context=[each.segment for each in pieces[-2:]],
            max_audio_length_ms=240,
            seed=3 if not pieces else _seed(3, len(pieces)),
        )
        np.testing.assert_array_equal(piece.audio, model.generate_batch([request])[0])
        pieces.append(piece)
    audio = speak_long(model, text, 0, max_characters=15, **options)
    np.testing.assert_array_equal(audio, join_chunks(pieces))
    assert len(audio) == 4 * 3 * SAMPLES + 3 * 8400


def _seed(seed: int, index: int) -> int:
    from csm_jax.long_text import _chunk_seed

    return _chunk_seed(seed, index)
