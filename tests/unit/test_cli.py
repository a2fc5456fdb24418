"""The command line, with a generator that only takes notes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from csm_jax import audio, cli, hub, pipeline
from csm_jax.audio import read_audio, write_audio
from csm_jax.config import csm_1b
from csm_jax.interrupt import Interrupt
from csm_jax.prompt import Segment, TextTokenizer
from csm_jax.synthesizer import Result, Synthesizer, redraw_seed
from csm_jax.voices import Voice, VoiceLibrary, VoiceTurn, make_provenance
from tests.support.tokenizer import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


class FakeGenerator:
    """Answers every request with a tone as long as its text, and keeps what it was asked."""

    sample_rate = 24_000

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.config, self.tokenizer = csm_1b(), tokenizer
        self.calls: list[dict[str, Any]] = []
        self.loaded: tuple[Any, dict[str, Any]] | None = None
        self.error: BaseException | None = None
        self.log: str | None = None
        self.watermarker: object = None
        self.finished = 0

    def load(self, source: Any, **options: Any) -> FakeGenerator:
        self.loaded = (source, options)
        self.watermarker = object() if options["watermark"] else None
        return self

    def prompt_lengths(self, requests: Any) -> list[int]:
        return [len(request.text) for request in requests]

    def generate_results(
        self, requests: Any, *, stop_repetition: bool, on_progress: Any
    ) -> list[Result]:
        [request] = requests
        if self.error is not None:
            raise self.error
        if self.log is not None:
            logging.getLogger("csm_jax.prompt").info(self.log)
        given = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        given["context"] = [heard(segment) for segment in request.context]
        self.calls.append(given)
        on_progress(len(request.text), 1125)
        self.finished += 1
        frames = 0 if "silence" in request.text else len(request.text)
        return [
            Result(
                id=0,
                audio=np.full(1920 * frames, 0.25, np.float32),
                codes=np.full((frames, 32), frames, np.int32),
                finish_reason="eos",
            )
        ]


def heard(segment: Segment) -> tuple[int, str, str, int]:
    if segment.codes is not None:
        return segment.speaker, segment.text, "codes", len(segment.codes)
    return segment.speaker, segment.text, f"{segment.sample_rate} Hz", len(segment.audio)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return TextTokenizer.from_file(write_tokenizer(path, vocab_size=1000))


@pytest.fixture
def fake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: TextTokenizer
) -> FakeGenerator:
    generator = FakeGenerator(tokenizer)
    monkeypatch.setattr(pipeline, "load_csm_1b", generator.load)
    monkeypatch.setattr(hub, "locate_config", lambda source: None)
    monkeypatch.chdir(tmp_path)
    return generator


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_every_option_arrives(fake: FakeGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio("a.wav", np.zeros(16_000, np.float32), 16_000)
    write_audio("b.flac", np.zeros(24_000, np.float32), 24_000)
    words = ["generate", "abc", "--speaker", "3", "--seed", "7", "--temperature", "0.5"]
    words += ["--topk", "9", "--top-p", "0.8", "--min-p", "0.1", "--decoder-temperature", "0"]
    words += ["--decoder-topk", "4", "--max-audio-length-ms", "800", "--truncate-context"]
    words += ["--context", "a.wav", "first", "0", "--context", "b.flac", "second", "1"]
    words += ["--model", "dir", "--dtype", "bfloat16", "--layout", "csm-mlx"]
    words += ["--watermark-key", "1,2,3,4,5", "--codec", "torch", "-o", "x.flac"]
    assert cli.main(words) == 0
    assert fake.loaded == (
        "dir",
        {
            "dtype": "bfloat16",
            "layout": "csm-mlx",
            "codec": "torch",
            "watermark": "torch",
            "watermark_key": (1, 2, 3, 4, 5),
            "mesh": None,
        },
    )
    (call,) = fake.calls
    assert call == {
        "text": "abc",
        "speaker": 3,
        "context": [(0, "first", "16000 Hz", 16_000), (1, "second", "24000 Hz", 24_000)],
        "voice": None,
        "max_audio_length_ms": 800,
        "temperature": 0.5,
        "topk": 9,
        "top_p": 0.8,
        "min_p": 0.1,
        "decoder_temperature": 0.0,
        "decoder_topk": 4,
        "seed": 7,
        "truncate_context": True,
    }
    samples, rate = read_audio("x.flac")
    assert (len(samples), rate) == (3 * 1920, 24_000)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "0.24 s of audio, watermarked" in out
    assert "frames/s, real-time factor" in out


def test_defaults_are_sesames(fake: FakeGenerator) -> None:
    assert cli.main(["generate", "abc"]) == 0
    assert fake.loaded == (
        "sesame/csm-1b",
        {
            "dtype": None,
            "layout": None,
            "codec": "jax",
            "watermark": "jax",
            "watermark_key": (212, 211, 146, 56, 201),
            "mesh": None,
        },
    )
    call = fake.calls[0]
    assert (call["speaker"], call["temperature"], call["topk"]) == (0, 0.9, 50)
    assert call["max_audio_length_ms"] is None  # by the text
    assert (call["top_p"], call["min_p"], call["seed"]) == (1.0, 0.0, 0)
    assert call["decoder_temperature"] is None
    assert call["decoder_topk"] is None
    assert call["truncate_context"] is False
    assert Path("out.wav").is_file()


LONG = "This is a sentence of no great length. " * 10


def test_a_long_text_is_spoken_in_pieces(
    fake: FakeGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", LONG, "--seed", "4"]) == 0
    texts = [call["text"] for call in fake.calls]
    assert [len(text) <= 240 for text in texts] == [True, True]
    assert " ".join(texts) == LONG.strip()
    assert fake.calls[0]["seed"] == 4
    assert fake.calls[1]["context"] == [(0, texts[0], "codes", len(texts[0]))]
    seconds = sum(map(len, texts)) * 1920 / 24_000 + 0.35
    assert len(read_audio("out.wav")[0]) == round(seconds * 24_000)
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == "spoken in 2 pieces (--no-split: in one go)"
    assert f"{seconds:.2f} s of audio" in captured.out
    fake.calls.clear()
    assert cli.main(["generate", LONG, "--no-split"]) == 0
    assert [call["text"] for call in fake.calls] == [LONG.strip()]


def test_what_normalising_changes_is_shown(
    fake: FakeGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "I have 3 cats."]) == 0
    assert "said as: I have three cats.\n" in capsys.readouterr().err
    assert cli.main(["generate", "Ich habe 3 Katzen.", "--language", "de"]) == 0
    assert "said as: Ich habe drei Katzen.\n" in capsys.readouterr().err
    assert cli.main(["generate", "I have 3 cats.", "--no-normalise"]) == 0
    assert cli.main(["generate", "I have  no cats.\n"]) == 0
    assert "said as" not in capsys.readouterr().err
    assert [call["text"] for call in fake.calls[:3]] == [
        "I have three cats.",
        "Ich habe drei Katzen.",
        "I have 3 cats.",
    ]
    assert cli.main(["generate", "3 " * 900, "--no-split"]) == 0
    assert max(map(len, capsys.readouterr().err.splitlines())) < 320


def test_a_long_turn_of_a_dialogue_is_whole_context_for_the_next(
    fake: FakeGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [(0, LONG), (1, "And you?")]
    Path("talk.jsonl").write_text(
        "\n".join(json.dumps({"speaker": s, "text": t}) for s, t in turns)
    )
    assert cli.main(["generate", "--dialogue", "talk.jsonl", "--turns-dir", "t"]) == 0
    assert "turn 1: spoken in 2 pieces" in capsys.readouterr().err
    pieces = [call["text"] for call in fake.calls[:2]]
    assert [(s, text) for s, text, _, _ in fake.calls[2]["context"]] == [(0, p) for p in pieces]
    whole = len(read_audio("t/turn-01.wav")[0])
    assert whole == sum(map(len, pieces)) * 1920 + 8400


def keep_voice(name: str, *speakers: int) -> Voice:
    codes = np.ones((50, 32), np.int32)
    voice = Voice(
        name=name,
        turns=tuple(VoiceTurn(speaker=n, text="Hi.", codes=codes) for n in speakers),
        codebook_size=2051,
        provenance=make_provenance("a test", consent=True),
    )
    VoiceLibrary(Path("voices")).add(voice)
    return voice


def test_a_voice_of_the_library(
    fake: FakeGenerator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    anna, duo = keep_voice("anna", 2), keep_voice("duo", 0, 1)
    here = ["--voices-dir", "voices"]
    assert cli.main(["generate", "abc", "--voice", "anna", *here]) == 0
    assert fake.calls[-1]["voice"].key == anna.key
    assert fake.calls[-1]["speaker"] == 2
    monkeypatch.setenv("CSM_JAX_VOICES", "voices")
    assert cli.main(["generate", "abc", "--voice", "duo", "--speaker", "1"]) == 0
    assert fake.calls[-1]["voice"].key == duo.key
    assert fake.calls[-1]["speaker"] == 1
    for words, said in (
        (["--voice", "ana"], "did you mean 'anna'?"),
        (["--voice", "duo"], "has the speakers 0, 1: say which with --speaker"),
        (["--voice", "anna", "--speaker", "0"], "has no speaker 0"),
        (["--voice", "../x"], "a voice's name must be"),
        (here, "--voices-dir goes with --voice"),
    ):
        fake.loaded = None
        assert cli.main(["generate", "abc", *words]) == 2
        assert said in capsys.readouterr().err
        assert fake.loaded is None


def test_a_mesh(fake: FakeGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    import jax

    devices = len(jax.devices())
    assert cli.main(["generate", "abc", "--mesh", f"data={devices}"]) == 0
    assert fake.loaded is not None
    assert fake.loaded[1]["mesh"].shape == {"data": devices}
    fake.loaded = None
    assert cli.main(["generate", "abc", "--mesh", "data=77"]) == 2
    assert "takes 77 devices" in capsys.readouterr().err
    assert fake.loaded is None


def test_pieces_drawn_again_are_told(
    fake: FakeGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    text = LONG.replace("length. ", "silence. ", 1)
    assert cli.main(["generate", text, "--redraws", "2"]) == 0
    said = capsys.readouterr().err
    assert "piece 1 of 2 ended at once, without audio: it is drawn again\n" in said
    assert "piece 1 of 2 ended at once, without audio and is left out" in said
    assert len(fake.calls) == 4


def test_batch_hands_over_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, random_model: Path, tmp_path: Path
) -> None:
    from csm_jax.corpus import cli as corpus_cli

    asked: list[tuple[Any, Any]] = []

    def run(args: Any, *, open_synthesizer: Any, on_progress: Any) -> int:
        asked.append((args, cli._interrupt._tidying))
        synthesizer = open_synthesizer(
            {
                "model": str(random_model),
                "layout": None,
                "dtype": "float32",
                "slots": 2,
                "redraws": 1,
                "watermark": False,
                "watermark_key": (1, 2, 3, 4, 5),
                "mesh": None,
            }
        )
        assert (synthesizer.settings.slots, synthesizer.settings.redraws) == (2, 1)
        on_progress()
        return 3

    monkeypatch.setattr(corpus_cli, "main", run)
    monkeypatch.setattr(Synthesizer, "warm_up", lambda self: None)
    assert cli.main(["batch", "rows.jsonl", "--out", str(tmp_path / "corpus")]) == 3
    [(args, tidying)] = asked
    assert (args.action, args.manifest) == ("make", Path("rows.jsonl"))
    assert tidying == 1


def test_batch_speaks_a_manifest(
    random_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Synthesizer, "warm_up", lambda self: None)  # all its programs, in minutes
    rows = [{"id": "a", "text": "Hi.", "max_audio_length_ms": 160}, {"id": "b", "text": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = tmp_path / "corpus"
    words = ["batch", str(tmp_path / "rows.jsonl"), "--out", str(corpus), "--slots", "2"]
    words += ["--model", str(random_model), "--voices", str(tmp_path / "none")]
    assert cli.main(words) == 3
    assert "1 of 1 rows" in capsys.readouterr().out
    assert (corpus / "rejected.jsonl").is_file()
    assert cli.main(["batch", "verify", str(corpus)]) == 3
    assert cli.main(["batch", "run", str(tmp_path / "nowhere")]) == 2
    assert "no corpus is planned" in capsys.readouterr().err


def test_voices_are_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--dir", str(tmp_path)]
    assert cli.main(["voices", "list", *here]) == 0
    assert cli.main(["voices", "remove", "anna", *here]) == 1
    assert cli.main(["voices", "remove", "an/na", *here]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("csm-jax: error: a voice's name")


def test_no_watermark_is_said(fake: FakeGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "abc", "--no-watermark"]) == 0
    assert fake.loaded is not None
    assert fake.loaded[1]["watermark"] is False
    assert "not watermarked" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["-"], []])
def test_text_from_a_pipe(
    fake: FakeGenerator, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    stdin(monkeypatch, "Grüße, 你好\n".encode())
    assert cli.main(["generate", *words]) == 0
    assert fake.calls[0]["text"] == "Grüße, 你好"


def test_dialogue_feeds_each_turn_to_the_next(
    fake: FakeGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    write_audio("a.wav", np.zeros(24_000, np.float32), 24_000)
    lines = [
        {"speaker": 0, "text": "ab"},
        {"speaker": 1, "text": "silence"},
        {"text": "c", "speaker": 0},
    ]
    Path("talk.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    words = ["generate", "--dialogue", "talk.jsonl", "--context", "a.wav", "before", "1"]
    assert cli.main([*words, "--turns-dir", "turns", "--seed", "5", "-o", "all.wav"]) == 0
    before = (1, "before", "24000 Hz", 24_000)
    assert [call["context"] for call in fake.calls] == [
        [before],
        [before, (0, "ab", "codes", 2)],
        [before, (0, "ab", "codes", 2)],  # drawn again
        [before, (0, "ab", "codes", 2)],  # a turn without audio is no context
    ]
    assert [call["seed"] for call in fake.calls] == [5, 6, redraw_seed(6, 1), 7]
    assert sorted(os.listdir("turns")) == ["turn-01.wav", "turn-03.wav"]
    assert [len(read_audio(f"turns/turn-0{i}.wav")[0]) for i in (1, 3)] == [3840, 1920]
    said = capsys.readouterr().err
    assert "turn 2/3: the model ended at once" in said
    assert "turns/turn-02.wav is not written" in said
    assert len(read_audio("all.wav")[0]) == 3840 + 1920


@pytest.mark.parametrize("words", [["silence"], ["--dialogue", "talk.jsonl", "--turns-dir", "t"]])
def test_nothing_said_is_nothing_written(
    fake: FakeGenerator, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    Path("out.wav").write_bytes(b"old")
    Path("talk.jsonl").write_text('{"speaker": 0, "text": "silence"}\n' * 2)
    assert cli.main(["generate", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("csm-jax: no audio: the model ended at once")
    assert "another --seed may speak" in captured.err
    assert Path("out.wav").read_bytes() == b"old"
    assert not list(Path().glob("t/*"))


def test_dropped_context_is_told(fake: FakeGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    fake.log = "left out the oldest 2 of 3 context turns to fit"
    level = logging.getLogger("csm_jax.prompt").level
    assert cli.main(["generate", "abc", "--truncate-context"]) == 0
    assert "left out the oldest 2 of 3 context turns to fit\n" in capsys.readouterr().err
    assert logging.getLogger("csm_jax.prompt").level == level
    assert logging.getLogger("csm_jax.prompt").handlers == []
    assert logging.getLogger("csm_jax.long_text").handlers == []


def test_a_length_that_the_model_cannot_hold_is_found_by_its_config(
    fake: FakeGenerator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    random_model: Path,
) -> None:
    monkeypatch.setattr(hub, "locate_config", lambda source: random_model / "config.json")
    assert cli.main(["generate", "hi", "--max-audio-length-ms", "163840"]) == 2
    said = capsys.readouterr().err
    assert "max_audio_length_ms must be between 80 and 163,760" in said
    assert "got 163,840" in said
    assert fake.loaded is None
    assert cli.main(["generate", "hi", "--max-audio-length-ms", "163760"]) == 0


def test_a_dialogue_may_start_with_a_byte_order_mark(fake: FakeGenerator) -> None:
    Path("talk.jsonl").write_bytes(b'\xef\xbb\xbf{"speaker": 2, "text": "ab"}\r\n')
    assert cli.main(["generate", "--dialogue", "talk.jsonl"]) == 0
    assert [(call["speaker"], call["text"]) for call in fake.calls] == [(2, "ab")]


def bad_lines() -> str:
    return (
        '{"speaker": 0, "text": "fine"}\n{"speaker": -1, "text": "x"}\n{"text": "y"}\nnot json\n[1]'
    )


TALK = ["--dialogue", "talk.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "hi", "-o", "missing/x.wav"], "missing"),
        (["generate", "hi", "-o", "x.mp3"], ".mp3"),
        (["generate", "hi", "-o", "."], "."),
        (["generate", ""], "text is empty"),
        (["generate", "hi", "--redraws", "-1"], "0 or more"),
        (["generate", "hi", "--mesh", "model=2"], "the axes are data, tensor"),
        (["batch"], "MANIFEST | ACTION"),
        (["voices"], "ACTION"),
        (["generate", "a\x00b"], "control character"),
        (["generate", "hi", "--context", "no.wav", "t", "0"], "no.wav"),
        (["generate", "hi", "--context", "a.wav", "t", "x"], "the speaker must be a whole number"),
        (["generate", "hi", "--dialogue", "talk.jsonl"], "not both"),
        (["generate", "--dialogue", "none.jsonl"], "none.jsonl"),
        (["generate", "--dialogue", "empty.jsonl"], "no turns"),
        (["generate", "--dialogue", "latin.jsonl"], "UTF-8"),
        (["generate", "--dialogue", "digits.jsonl"], "line 1: a number in it has too many digits"),
        (["generate", "--dialogue", "minus.jsonl"], "0 or more, got -99999999"),
        (["generate", "hi", "--turns-dir", "t"], "--dialogue"),
        (["generate", *TALK, "--turns-dir", "a.wav"], "--turns-dir a.wav is not a directory"),
        (["generate", *TALK, "--turns-dir", "./t", "-o", "t/turn-01.wav"], "file of a turn"),
        (["generate", "a\udcffb"], "not valid UTF-8: the byte 0xFF at position 1"),
        (["generate", "hi", "--context", "two.wav", "t", "0"], "ffmpeg -i two.wav -ac 1 mono.wav)"),
        (["generate", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "hi", "--temperature", "1e40"], "finite number from 0.001 to 1,000,000"),
        (["generate", "hi", "--decoder-temperature", "nan"], "error: decoder_temperature must"),
        (["generate", "hi", "--decoder-topk", "-1"], "error: decoder_top_k must"),
        (["generate", "hi", "--topk", "-5"], "top_k"),
        (["generate", "hi", "--topk", "999999999999"], "whole number up to 2,147,483,647"),
        (["generate", "hi", "--seed", "9" * 5001], "0 or more, got '99999"),
        (["generate", "hi", "--top-p", "0"], "top_p"),
        (["generate", "hi", "--min-p", "2"], "min_p"),
        (["generate", "hi", "--max-audio-length-ms", "10"], "80 ms"),
        (["generate", "hi", "--max-audio-length-ms", "inf"], "more than any model can make"),
        (["generate", "hi", "--max-audio-length-ms", "1e30"], "more than any model can make"),
        (["generate", "hi", "--watermark-key", "1,2,3"], "1,2,3"),
        (["generate", "hi", "--watermark-key", "1,2,3,4,256"], "256"),
        (["generate", "hi", "--no-watermark", "--watermark-key", "1,2,3,4,5"], "not allowed"),
        (["generate", "hi", "--speaker", "-1"], "0 or more"),
        (["generate", "hi", "--context", "a.wav", "t"], "expected 3"),
        (["nonsense"], "nonsense"),
        (["verify", "no.wav"], "no.wav"),
        (["verify", "a.wav", "--model", "not/a/b"], "no model at 'not/a/b'"),
        (["convert", "none", "d", "--to", "sesame"], "csm-jax: error: none: there is no such"),
        ([], "COMMAND"),
    ],
    ids=lambda value: ascii(" ".join(value))[:80] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_before_loading(
    fake: FakeGenerator, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    write_audio("a.wav", np.zeros(24_000, np.float32), 24_000)
    Path("talk.jsonl").write_text('{"speaker": 0, "text": "x"}')
    Path("empty.jsonl").write_text("\n\n")
    Path("digits.jsonl").write_text('{"speaker": ' + "9" * 5001 + ', "text": "x"}')
    Path("minus.jsonl").write_text('{"speaker": -' + "9" * 4001 + ', "text": "x"}')
    soundfile.write("two.wav", np.zeros((24_000, 2), np.float32), 24_000)
    Path("latin.jsonl").write_bytes('{"speaker": 0, "text": "é"}'.encode("latin-1"))
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.splitlines()[-1]
    assert len(captured.err.splitlines()[-1]) < 300
    assert 'mono="mean"' not in captured.err
    assert "Traceback" not in captured.err
    assert fake.loaded is None
    assert not Path("out.wav").exists()


def test_all_bad_dialogue_lines_are_listed(
    fake: FakeGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("talk.jsonl").write_text(bad_lines())
    assert cli.main(["generate", "--dialogue", "talk.jsonl"]) == 2
    said = capsys.readouterr().err
    for number in (2, 3, 4, 5):
        assert f"line {number}:" in said
    assert "line 1:" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("too long"), 2, "csm-jax: error: too long\n"),
        (pipeline.GenerationError("not finite", [None], [0]), 2, "csm-jax: error: not finite\n"),
        (FileNotFoundError(2, "No such file", "w"), 2, "csm-jax: error: w: No such file\n"),
        (ImportError("pip install it"), 2, "csm-jax: error: pip install it\n"),
        (KeyboardInterrupt(), 130, "csm-jax: interrupted\n"),
    ],
)
def test_failures_while_generating_leave_the_old_file(
    fake: FakeGenerator,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    said: str,
) -> None:
    Path("out.wav").write_bytes(b"old")
    fake.error = error
    assert cli.main(["generate", "hi"]) == status
    assert capsys.readouterr().err.endswith(said)
    assert Path("out.wav").read_bytes() == b"old"
    assert sorted(os.listdir(".")) == ["out.wav"]


@pytest.mark.parametrize(("moment", "calls"), [("load_csm_1b", 0), ("write_audio", 1)])
def test_a_swallowed_ctrl_c_is_remembered(
    fake: FakeGenerator, monkeypatch: pytest.MonkeyPatch, moment: str, calls: int
) -> None:
    monkeypatch.setattr(cli, "_interrupt", Interrupt())
    module: Any = pipeline if moment == "load_csm_1b" else audio
    original = getattr(module, moment)

    def pressed(*args: Any, **options: Any) -> Any:
        with contextlib.suppress(KeyboardInterrupt):  # as a destructor does
            cli._interrupt(signal.SIGINT, None)
        return original(*args, **options)

    monkeypatch.setattr(module, moment, pressed)
    Path("talk.jsonl").write_text('{"speaker": 0, "text": "a"}\n' * 3)
    assert cli.main(["generate", "--dialogue", "talk.jsonl", "--turns-dir", "t"]) == 130
    assert not Path("out.wav").exists()
    assert (len(fake.calls), fake.finished) == (2 * calls, calls)
    assert sorted(os.listdir("t")) == ["turn-01.wav"][:calls]


def test_debug_shows_where(fake: FakeGenerator) -> None:
    fake.error = ValueError("too long")
    with pytest.raises(ValueError, match="too long"):
        cli.main(["generate", "hi", "--debug"])


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--context first.wav" in text
    assert '{"speaker": 0, "text"' in text
    for command in ("generate", "batch", "voices", "convert", "verify", "doctor"):
        assert cli.main([command, "--help"]) == 0
        assert "usage: csm-jax " + command in capsys.readouterr().out
    assert cli.main(["--version"]) == 0


def test_ctrl_c_ends_a_real_process_cleanly(random_model: Path, tmp_path: Path) -> None:
    words = [
        "generate",
        "A long story.",
        "--model",
        str(random_model),
        "-o",
        str(tmp_path / "x.wav"),
    ]
    words += ["--max-audio-length-ms", "90000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "csm_jax", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        assert first.startswith("loaded"), first
        time.sleep(2.5)  # into the frames, of which there are 1,125
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert err == "csm-jax: interrupted\n"
    assert out == ""
    assert list(tmp_path.iterdir()) == []


class FakeWatermarker:
    def __init__(self, key: tuple[int, ...] | None) -> None:
        self.key = key

    def detect(self, audio: np.ndarray, rate: int) -> tuple[int, ...] | None:
        return self.key

    def verify(self, audio: np.ndarray, rate: int, key: tuple[int, ...]) -> bool:
        return self.key == key


@pytest.mark.parametrize(
    ("key", "asked", "status", "said"),
    [
        ((212, 211, 146, 56, 201), [], 0, "Sesame's public key"),
        ((1, 2, 3, 4, 5), ["--watermark-key", "1,2,3,4,5"], 0, "the given key"),
        ((1, 2, 3, 4, 5), [], 1, "reads like 1,2,3,4,5"),
        ((212, 211, 146, 56, 201), ["--watermark-key", "1,2,3,4,5"], 1, "not this key"),
        (None, [], 1, "no watermark found"),
    ],
)
def test_verify(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    random_model: Path,
    tmp_path: Path,
    key: tuple[int, ...] | None,
    asked: list[str],
    status: int,
    said: str,
) -> None:
    def load(directory: Any) -> FakeWatermarker:  # the native one: no other kind is asked for
        assert directory() == random_model / "silentcipher" / hub.WATERMARK_FOLDER
        return FakeWatermarker(key)

    monkeypatch.setattr(pipeline, "load_watermarker", load)
    write_audio(tmp_path / "a.wav", np.zeros(24_000, np.float32), 24_000)
    command = ["verify", str(tmp_path / "a.wav"), "--model", str(random_model), *asked]
    assert cli.main(command) == status
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_speaking_without_a_stream(
    fake: FakeGenerator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, name, None)
    assert cli.main(["generate", "abc"]) == 0
    getattr(sys, name).close()
    assert Path("out.wav").is_file()


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_crash(tmp_path: Path, closed: str) -> None:
    for words, status in (("generate --help", 0), ("generate", 2), ("verify none.wav", 2)):
        done = subprocess.run(
            ["sh", "-c", f"exec {sys.executable} -m csm_jax {words} {closed}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        if words == "generate" and closed == "<&-":
            assert "nothing to say: give TEXT" in done.stderr


def test_files_opened_later_do_not_take_a_closed_streams_number(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom csm_jax import cli\ncli._open_missing_streams()\n"
        "sys.exit(os.open(os.devnull, os.O_RDONLY) <= 2 or sys.stderr is None)"
    )
    command = ["sh", "-c", f"exec {sys.executable} -c '{code}' 2>&- >&-"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
