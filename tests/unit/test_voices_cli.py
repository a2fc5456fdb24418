"""`csm-jax voices` as a user meets it, with a random model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_jax import __version__, hub, voices_cli
from csm_jax.audio import read_audio, write_audio
from csm_jax.config import csm_1b
from csm_jax.prompt import Segment
from csm_jax.voices import Voice, VoiceLibrary, VoiceTurn, encode_voice
from tests.support.codec import PlainCodec
from tests.support.model_directory import PROMPTS

ROOT = Path(__file__).resolve().parents[2]
STATED = ("--source", "made for a test", "--consent")
A, B = PROMPTS[0][1], PROMPTS[1][1]


def call(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="csm-jax voices")
    parser.add_argument("--debug", action="store_true")
    voices_cli.add_arguments(parser)
    return voices_cli.run(parser.parse_args([*map(str, words)]))


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VoiceLibrary:
    monkeypatch.setenv("CSM_JAX_VOICES", str(tmp_path / "voices"))
    monkeypatch.setenv("COLUMNS", "80")
    return VoiceLibrary(tmp_path / "voices")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> PlainCodec:
    """A codec in the place of the model's, for what does not depend on codes."""
    codec = PlainCodec(num_codebooks=32, codebook_size=2_048)
    monkeypatch.setattr(voices_cli, "_load_codec", lambda args: codec)
    return codec


@pytest.fixture
def no_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(args: Any) -> Any:
        raise AssertionError("the codec is loaded before everything else is checked")

    monkeypatch.setattr(voices_cli, "_load_codec", load)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "recording.wav"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * 16_000)
    write_audio(path, noise.astype(np.float32), 16_000)
    return path


def voice(name: str, *speakers: int, codebook_size: int = 2_048, **provenance: str) -> Voice:
    return Voice(
        name=name,
        turns=tuple(
            VoiceTurn(speaker=n, text="What is said.", codes=np.full((20, 32), n, np.int32))
            for n in speakers or (0,)
        ),
        codebook_size=codebook_size,
        provenance={
            "source": "a test",
            "consent": "yes",
            "created": "2020-01-02T03:04:05+00:00",
            **provenance,
        },
    )


# --- with a model ------------------------------------------------------------------------------


def test_add_and_hear_a_voice(random_model, library, tmp_path, capsys, monkeypatch):
    from csm_jax import weights
    from csm_jax.mimi.codec import JaxMimi
    from csm_jax.prompt import TextTokenizer
    from csm_jax.weights.mimi import load_mimi

    def not_needed(*args: Any, **options: Any) -> Any:
        raise AssertionError("only the codec is needed")

    monkeypatch.setattr(weights, "load_checkpoint", not_needed)
    monkeypatch.setattr(TextTokenizer, "from_file", not_needed)
    first, second = (random_model / "prompts" / f"{name}.wav" for name, *_ in PROMPTS)
    words = ("add", "duo", first, A, "--and", second, B, 7, *STATED, "--model", random_model)
    assert call(*words) == 0
    path = library.directory / "duo.safetensors"
    captured = capsys.readouterr()
    assert captured.out == f"duo: 4.8 s in 2 turns, kept in {path}\n"

    codec = JaxMimi(*load_mimi(random_model / hub.MIMI))
    segments = [
        Segment(speaker, text, *read_audio(file))
        for speaker, text, file in ((0, A, first), (7, B, second))
    ]
    kept = library.get("duo")
    assert kept.key == encode_voice(codec, segments, name="duo", provenance={}).key
    assert kept.codebook_size == 2_048
    assert kept.provenance["source"] == "made for a test"
    assert kept.provenance["consent"] == "yes"
    assert kept.provenance["csm_jax"] == __version__

    heard = tmp_path / "heard.wav"
    assert call("show", "duo", "-o", heard, "--model", random_model) == 0
    assert f"\n{heard}: 4.8 s of audio\n" in capsys.readouterr().out
    audio, rate = read_audio(heard)
    expected = np.concatenate([codec.decode(turn.codes) for turn in kept.turns])
    assert rate == 24_000
    np.testing.assert_allclose(audio, np.clip(expected, -1, 1), atol=1e-4)


def test_of_a_model_on_the_hub_only_config_and_mimi_are_fetched(
    random_model, library, recording, monkeypatch
):
    fetched = []

    def fetch(repo: str, name: str) -> Path:
        fetched.append((repo, name))
        return random_model / name

    monkeypatch.setattr(hub, "_fetch", fetch)
    assert call("add", "anna", recording, "What is said.", *STATED) == 0
    assert sorted(fetched) == [
        ("kyutai/moshiko-pytorch-bf16", hub.MIMI),
        ("sesame/csm-1b", "config.json"),
    ]
    assert library.get("anna").num_codebooks == 32


def test_the_codec_on_torch(random_model, library, recording, monkeypatch):
    from csm_jax.bridge.mimi import TorchMimi

    asked = []

    def from_file(path: Path, *, num_codebooks: int) -> PlainCodec:
        asked.append((path, num_codebooks))
        return PlainCodec(num_codebooks=num_codebooks, codebook_size=2_048)

    monkeypatch.setattr(TorchMimi, "from_file", from_file)
    words = ("--model", random_model, "--codec", "torch")
    assert call("add", "anna", recording, "What is said.", *STATED, *words) == 0
    assert asked == [(random_model / hub.MIMI, csm_1b().num_codebooks)]
    assert library.get("anna").frames == 50


# --- add ---------------------------------------------------------------------------------------


def test_add_and_replace(plain, library, recording, capsys):
    assert call("add", "anna", recording, "One.", *STATED) == 0
    with pytest.raises(FileExistsError, match="already has a voice 'anna'"):
        call("add", "anna", recording, "Two.", *STATED)
    assert library.get("anna").turns[0].text == "One."
    assert call("add", "anna", recording, "Two.", *STATED, "--replace", "--speaker", 3) == 0
    assert library.get("anna").turns[0].text == "Two."
    assert library.get("anna").turns[0].speaker == 3


def test_a_voice_added_by_others_meanwhile_is_kept(library, recording, monkeypatch):
    theirs = voice("anna", 5)

    def load(args: Any) -> PlainCodec:
        library.add(theirs)
        return PlainCodec(num_codebooks=32, codebook_size=2_048)

    monkeypatch.setattr(voices_cli, "_load_codec", load)
    with pytest.raises(FileExistsError, match="already has a voice 'anna'"):
        call("add", "anna", recording, "One.", *STATED)
    assert library.get("anna").key == theirs.key


def test_another_directory(plain, library, recording, tmp_path, capsys):
    other = ("--dir", tmp_path / "other")
    assert call("add", "anna", recording, "One.", *STATED, *other) == 0
    assert library.names() == []
    assert VoiceLibrary(tmp_path / "other").names() == ["anna"]
    assert (
        call("list", *other) == call("show", "anna", *other) == call("remove", "anna", *other) == 0
    )
    assert VoiceLibrary(tmp_path / "other").names() == []


def test_a_short_recording_is_said(plain, tmp_path, caplog):
    write_audio(tmp_path / "short.wav", np.sin(np.arange(24_000) / 9).astype(np.float32), 24_000)
    assert call("add", "anna", tmp_path / "short.wav", "One.", *STATED) == 0
    assert "voice 'anna' has only 1.04 s of audio" in caplog.text


@pytest.mark.usefixtures("no_codec")
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("../x", "{wav}", "One.", *STATED), "a voice's name must be"),
        (("taken", "{wav}", "One.", *STATED), "already has a voice 'taken'"),
        (("Taken", "{wav}", "One.", *STATED), "only in case"),
        (("anna", "{wav}", "One.", "--source", "x"), "--consent is missing"),
        (("anna", "{wav}", "One.", "--source", " ", "--consent"), "the source of a voice is empty"),
        (("anna", "{wav}", "", *STATED), "the transcript of recording 1 is empty"),
        (("anna", "{wav}", "x" * 251, *STATED), r"lasts 4\.0 s and its transcript has 251"),
        (("anna", "{wav}", "One.", "--speaker", -1, *STATED), "must be 0 or more, got -1"),
        (("anna", "{none}", "One.", *STATED), "no audio file at .*none.wav"),
        (("anna", "{wav}", "One.", "--and", "{none}", "Two.", 1, *STATED), "no audio file at"),
        (("anna", "{wav}", "One.", "--and", "{wav}", "Two.", "x", *STATED), "SPEAKER must be a whole"),
        (("anna", "{wav}", "One.", "--and", "{wav}", "Two.", -1, *STATED), "speaker of recording 2"),
        (("anna", "{silent}", "One.", *STATED), "recording 1 is nearly silent"),
        (("anna", "{stereo}", "One.", *STATED), "has 2 channels and CSM needs one"),
        (("anna", "{long}", "One.", *STATED), "longer than the 60 s allowed"),
        (("anna", *["{wav}", "One."], *["--and", "{half}", "Two.", 0] * 2, *STATED), "may hold 60 s"),
        (("anna", "{wav}", "One.", *STATED, "--dir", "{wav}"), "Not a directory"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_codec_is_loaded(
    library, recording, tmp_path, words, complaint
):
    import soundfile

    library.add(voice("taken"))
    for name, shape in (
        ("silent", 72_000),
        ("stereo", (72_000, 2)),
        ("long", 61_000),
        ("half", 29_000),
    ):
        rate = 1_000 if name in ("long", "half") else 24_000
        level = 0.0 if name == "silent" else 0.1
        noise = np.random.default_rng(0).normal(0, 1, shape)
        soundfile.write(tmp_path / f"{name}.wav", level * noise, rate)
    files = {
        name: tmp_path / f"{name}.wav" for name in ("none", "silent", "stereo", "long", "half")
    }
    said = [str(word).format(wav=recording, **files) for word in words]
    with pytest.raises((ValueError, OSError), match=complaint):
        call("add", *said)
    assert library.names() == ["taken"]


# --- list --------------------------------------------------------------------------------------


def test_the_table(library, capsys):
    assert call("list") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"no voices in {library.directory}; add one with `csm-jax voices add`\n"

    library.add(voice("anna", source="recorded by Anna,\n3 May"))
    library.add(voice("a-duo", 0, 12, 0, source="x" * 90))
    assert call("list") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "NAME   SECONDS  TURNS  SPEAKERS  CREATED     SOURCE",
        "a-duo      4.8      3  0,12      2020-01-02  " + "x" * 90,
        "anna       1.6      1  0         2020-01-02  recorded by Anna, 3 May",
    ]
    assert captured.err == ""


@pytest.mark.parametrize(("columns", "shown"), [(60, 14), (20, 11), (200, 90)])
def test_the_table_fits_a_terminal(library, capsys, monkeypatch, columns, shown):
    library.add(voice("a-duo", source="x" * 90))
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call("list") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("  " + "x" * shown + ("…" if shown < 90 else ""))
    assert len(line) <= max(columns, 57)


def test_the_list_for_programs(library, capsys):
    assert call("list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    library.add(voice("anna", 3))
    assert call("list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "name": "anna",
            "seconds": 1.6,
            "turns": [{"speaker": 3, "seconds": 1.6, "text": "What is said."}],
            "provenance": {
                "source": "a test",
                "consent": "yes",
                "created": "2020-01-02T03:04:05+00:00",
            },
            "codec": {"num_codebooks": 32, "codebook_size": 2_048},
            "key": library.get("anna").key,
        }
    ]


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_damaged_voice_does_not_hide_the_others(library, capsys, option):
    for name in ("anna", "bob", "carl"):
        library.add(voice(name))
    path = library.path("bob")
    path.write_bytes(path.read_bytes()[:-1])
    assert call("list", *option) == 1
    captured = capsys.readouterr()
    assert "anna" in captured.out
    assert "carl" in captured.out
    assert "bob" not in captured.out
    assert captured.err.startswith(f"csm-jax: {path} is damaged")
    assert captured.err.count("\n") == 1


# --- show, remove ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_codec")
def test_show(library, capsys):
    made = voice("anna", 0, 12, source="recorded by Anna,\n3 May")
    path = library.add(made)
    assert call("show", "anna") == 0
    assert capsys.readouterr().out.splitlines() == [
        "anna",
        "  audio     3.2 s in 2 turns (40 frames)",
        "  source    recorded by Anna, 3 May",
        "  consent   yes",
        "  created   2020-01-02T03:04:05+00:00",
        "  codec     32 codebooks of 2,048 codes",
        f"  key       {made.key}",
        f"  file      {path}",
        "",
        "  turn 1: speaker 0, 1.6 s",
        "    What is said.",
        "",
        "  turn 2: speaker 12, 1.6 s",
        "    What is said.",
    ]


@pytest.mark.usefixtures("no_codec")
def test_a_name_that_is_not_there(library, capsys):
    library.add(voice("anna"))
    for action in ("show", "remove"):
        assert call(action, "ana") == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == (
            f"csm-jax: {library.directory} has no voice 'ana'; did you mean 'anna'?\n"
        )
        with pytest.raises(ValueError, match="a voice's name must be"):
            call(action, "../anna")
    assert library.names() == ["anna"]


@pytest.mark.usefixtures("no_codec")
def test_output_that_cannot_be_written_is_found_first(library, tmp_path, capsys):
    library.add(voice("anna"))
    with pytest.raises(ValueError, match=r"must end in \.wav or \.flac"):
        call("show", "anna", "-o", tmp_path / "x.mp3")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        call("show", "anna", "-o", tmp_path / "none" / "x.wav")
    assert capsys.readouterr().out == ""


def test_hearing_a_voice_of_another_codec(plain, library, tmp_path):
    library.add(voice("anna", codebook_size=1_024))
    complaint = r"has 32 codebooks of 2,048 codes, but the voice was made with 32 of 1,024"
    with pytest.raises(ValueError, match=complaint):
        call("show", "anna", "-o", tmp_path / "x.wav")
    assert not (tmp_path / "x.wav").exists()


def test_hearing_several_turns(plain, library, tmp_path):
    library.add(voice("anna", 1, 2))
    assert call("show", "anna", "-o", tmp_path / "x.wav") == 0
    audio, _ = read_audio(tmp_path / "x.wav")
    expected = np.repeat([0.032, 0.064], 20 * 1_920)
    np.testing.assert_allclose(audio, expected, atol=1e-4)


def test_remove(library, capsys):
    library.add(voice("anna"))
    assert call("remove", "anna") == 0
    assert capsys.readouterr().out == f"anna: removed from {library.directory}\n"
    assert library.names() == []


# --- the command line itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "the following arguments are required: ACTION"),
        (("eat",), "invalid choice: 'eat'"),
        (("add", "anna", "x.wav", "One."), "required: --source"),
        (("add", "anna", "x.wav"), "required: TRANSCRIPT"),
        (("add", "anna", "x.wav", "One.", *STATED, "--speaker", "x"), "invalid int value: 'x'"),
        (("show",), "required: NAME"),
    ],
)
def test_usage_errors(capsys, words, complaint):
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("action", ["add", "list", "show", "remove"])
def test_help(capsys, action):
    with pytest.raises(SystemExit) as stop:
        call(action, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "exit status: 0" in said
    assert "--dir DIR" in said
    assert max(map(len, said.splitlines())) <= 104


@pytest.mark.parametrize("words", [("--debug", "list"), ("list", "--debug")])
def test_debug_before_and_after_the_action(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    voices_cli.add_arguments(parser)
    assert parser.parse_args(words).debug
    assert not parser.parse_args(["list"]).debug


def test_help_needs_neither_jax_nor_numpy():
    code = (
        "import argparse, sys; from csm_jax import voices_cli; "
        "voices_cli.add_arguments(argparse.ArgumentParser()); "
        "sys.exit(bool({'jax', 'numpy', 'csm_jax.voices'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_list_and_show_need_no_jax(library):
    library.add(voice("anna"))
    code = (
        "import argparse, sys; from csm_jax import voices_cli; "
        "parser = argparse.ArgumentParser(); voices_cli.add_arguments(parser); "
        "run = lambda *words: voices_cli.run(parser.parse_args(words)); "
        "status = run('list') or run('show', 'anna') or run('remove', 'anna'); "
        "sys.exit(status or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
    assert library.names() == []
