"""The demo voice's speech: read by a program that stands in for flite, and a little by flite itself."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from csm_jax.data.sources import open_source
from recipes.demo_voice import flite, text
from recipes.demo_voice.flite import (
    AFTER_S,
    BEFORE_S,
    PEAKS,
    VOICES,
    at_sample_rate,
    find_flite,
    sounding,
    speak,
    trim,
)
from recipes.demo_voice.speech import clips, main, seconds_of, synthesize
from recipes.demo_voice.text import sentences

ROOT = Path(__file__).resolve().parents[2]
RATE = 24_000
HELD_OUT = 40
CLIPS = 20  # of a tar: two of each held-out split
HOURS = 0.006  # three tars of training

# Copies a recording that depends on the voice and on the number of words, and notes what it was asked.
PROGRAM = """#!/bin/sh
case "$1" in
-lv) echo "Voices available: kal $VOICES_THERE"; exit 0;;
--version) echo "  version: flite-stand-in"; exit 1;;
esac
home=${0%/*}
voice=$2 set=$4 text=$6 out=$8
echo "$voice|$set|$text" >> "$home/asked"
if [ -e "$home/broken" ]; then echo "cannot read this" >&2; exit 0; fi
set -- $text
cp "$home/$voice-$#.wav" "$out"
"""


@pytest.fixture(scope="module", autouse=True)
def few_held_out() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "HELD_OUT", HELD_OUT)
        text._held_out.cache_clear()
        yield
    text._held_out.cache_clear()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a stand-in for flite and its recordings."""
    home = tmp_path_factory.mktemp("bin")
    (home / "flite").write_text(PROGRAM)
    (home / "flite").chmod(0o755)
    for pitch, voice in ((500, "rms"), (800, "awb")):
        for words in range(1, 14):
            sound = tone(0.05 * words, pitch=pitch + 20 * words, rate=16_000)
            silence = np.zeros(1600, np.float32)
            recording = np.concatenate([silence, sound, silence])
            soundfile.write(home / f"{voice}-{words}.wav", recording, 16_000, subtype="PCM_16")
    return home


@pytest.fixture
def stand_in(program: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{program}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("VOICES_THERE", "rms awb")
    (program / "asked").unlink(missing_ok=True)
    return program


def tone(seconds: float, *, pitch: float = 500.0, rate: int = RATE) -> np.ndarray:
    times = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


def asked(stand_in: Path) -> list[list[str]]:
    return [line.split("|") for line in (stand_in / "asked").read_text().splitlines()]


def tars(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.tar"))}


# --- one clip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [0.0, 0.02, 1.0])
def test_a_clip_begins_and_ends_at_fixed_distances_from_its_sound(around: float) -> None:
    silence = np.zeros(round(around * RATE), np.float32)
    found = trim(np.concatenate([silence, tone(0.5), silence]))
    assert found.dtype == np.float32
    assert len(found) / RATE == pytest.approx(0.5 + BEFORE_S + AFTER_S, abs=0.011)
    first, last = sounding(found)
    assert first / RATE == pytest.approx(BEFORE_S, abs=0.006)
    assert (len(found) - last) / RATE == pytest.approx(AFTER_S, abs=0.006)
    assert not found[: first - 10].any()


def test_a_click_where_a_recording_was_cut_is_faded() -> None:
    # Noise all through, too faint to count as sound: it must not begin or end at once.
    faint = np.full(RATE, 1e-3, np.float32)
    faint[8000:16000] += tone(8000 / RATE)
    found = trim(faint)
    assert abs(found[0]) < 1e-5
    assert abs(found[-1]) < 1e-5
    assert abs(found[600]) > 1e-4


def test_a_recording_keeps_its_band_and_loses_what_lies_below() -> None:
    times = np.arange(16_000) / 16_000
    window = np.hanning(16_000)

    def level(hertz: float) -> tuple[float, float]:
        wave = (0.3 * window * np.cos(2 * np.pi * hertz * times)).astype(np.float32)
        found = at_sample_rate(wave, 16_000)
        assert found.dtype == np.float32
        assert len(found) % 2400 == 0
        spectrum = np.abs(np.fft.rfft(found, RATE * 4))
        at = np.argmax(spectrum) / 4
        return float(at), float(np.abs(found).max())

    for hertz in (100.0, 1000.0, 7000.0):
        at, peak = level(hertz)
        assert at == pytest.approx(hertz, abs=0.5)
        assert peak == pytest.approx(0.3, rel=0.02)
    for hertz in (0.0, 20.0):
        assert level(hertz)[1] < 0.005


def test_nothing_appears_above_the_band_of_a_recording() -> None:
    rng = np.random.default_rng(0)
    found = at_sample_rate(rng.normal(size=16_001).astype(np.float32), 16_000)
    power = np.abs(np.fft.rfft(found)) ** 2
    hertz = np.fft.rfftfreq(len(found), 1 / RATE)
    assert power[hertz > 8000].sum() < 1e-9 * power.sum()
    # In time with the recording: a click stays where it was.
    click = np.zeros(16_000, np.float32)
    click[4000] = 1.0
    assert np.argmax(np.abs(at_sample_rate(click, 16_000))) == 6000


@pytest.mark.parametrize("gain", [0.01, 1.0, 30.0])
def test_a_clip_has_one_loudness_however_loud_the_recording_was(gain: float) -> None:
    rng = np.random.default_rng(0)
    sound = rng.normal(size=RATE).astype(np.float32) * np.hanning(RATE).astype(np.float32)
    found, whole = trim(sound * np.float32(gain)), trim(sound)
    assert PEAKS[0] - 1e-6 <= np.abs(found).max() <= PEAKS[1] + 1e-6
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_silence_is_no_clip() -> None:
    with pytest.raises(ValueError, match="silent"):
        trim(np.zeros(RATE, np.float32))
    with pytest.raises(ValueError, match="silent"):
        trim(np.zeros(10, np.float32))


def test_a_recording_is_asked_for_and_resampled(stand_in: Path, tmp_path: Path) -> None:
    found = speak("flite", "one, two", voice="awb", stretch=1.067, folder=tmp_path)
    assert asked(stand_in) == [["awb", "duration_stretch=1.07", "one, two"]]
    assert len(found) / RATE == pytest.approx(0.1 + BEFORE_S + AFTER_S, abs=0.024)
    assert list(tmp_path.iterdir()) == []


def test_a_sentence_that_is_not_read_is_an_error(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "broken").touch()
    try:
        with pytest.raises(RuntimeError, match=r"'one two' in the voice rms.*cannot read this"):
            speak("flite", "one two", voice="rms", stretch=1.0, folder=tmp_path)
    finally:
        (stand_in / "broken").unlink()


def test_a_missing_program_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--hours", "1", "--out", str(tmp_path / "out")]) == 1
    assert "apt install flite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_program_without_the_voices_is_named(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOICES_THERE", "rms slt")
    with pytest.raises(FileNotFoundError, match="lacks the voices awb"):
        find_flite()


# --- tars --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speech of three tars of training, made in one go."""
    directory = tmp_path_factory.mktemp("speech") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{program}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("VOICES_THERE", "rms awb")
        (program / "asked").unlink(missing_ok=True)
        synthesize(directory, hours=HOURS, workers=2, clips_per_tar=CLIPS)
        shutil.copy(program / "asked", directory / "asked")
    return directory


def test_the_splits_are_there_until_the_hours_are(made: Path) -> None:
    names = list(tars(made))
    train = [name for name in names if name.startswith("train-")]
    assert [name for name in names if name not in train] == [
        *("dev-0000.tar", "dev-0001.tar", "test-0000.tar", "test-0001.tar"),
    ]
    assert train == [f"train-{number:04d}.tar" for number in range(len(train))]
    hours = [seconds_of(made / name) / 3600 for name in train]
    assert sum(hours) >= HOURS > sum(hours[:-1])
    assert not list(made.glob("*.part"))


def test_clips_are_the_sentences_in_their_order(made: Path) -> None:
    splits: list[tuple[text.Split, int | None]]
    splits = [("dev", HELD_OUT), ("test", HELD_OUT), ("train", None)]
    for split, count in splits:
        found = list(clips(made, split))
        assert len(found) == (count or len(list(made.glob("train-*"))) * CLIPS)
        wanted = [each.text for each in islice(sentences(split), len(found))]
        assert [read for read, _, _ in found] == wanted
        assert {speaker for _, speaker, _ in found[:4]} == {0, 1}
        for read, _, audio in found[:20]:
            assert audio.dtype == np.int16
            seconds = 0.05 * len(read.split()) + BEFORE_S + AFTER_S
            assert len(audio) / RATE == pytest.approx(seconds, abs=0.024)
            assert PEAKS[0] - 1e-3 <= np.abs(audio).max() / 32_768 <= PEAKS[1] + 1e-3


def test_both_voices_read_both_kinds(made: Path) -> None:
    rows = told(made / "dev-0000.tar")
    assert {(row["speaker"], row["kind"]) for row in rows} == {
        (speaker, kind) for speaker in (0, 1) for kind in ("random", "template")
    }
    voices = {
        read: (voice, float(setting.removeprefix("duration_stretch=")))
        for voice, setting, read in (
            line.split("|") for line in (made / "asked").read_text().splitlines()
        )
    }
    for row in rows:
        assert voices[row["text"]][0] == ("rms", "awb")[row["speaker"]]
    stretches = [stretch for _, stretch in voices.values()]
    assert 0.90 <= min(stretches) < 0.93
    assert 1.12 < max(stretches) <= 1.15


def told(path: Path) -> list[dict[str, Any]]:
    with tarfile.open(path) as tar:
        return [
            json.loads(tar.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]
            for member in tar
            if member.name.endswith(".json")
        ]


def test_a_tar_tells_how_long_its_clips_are(made: Path) -> None:
    with tarfile.open(made / "train-0000.tar") as tar:
        names = tar.getnames()
        data = tar.extractfile("train-0000-007.wav")
        assert data is not None
        info = soundfile.info(io.BytesIO(data.read()))
    rows = told(made / "train-0000.tar")
    assert names[:2] == ["train-0000-000.wav", "train-0000-000.json"]
    assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
    assert rows[7]["id"] == "train-0000-007"
    assert rows[7]["duration"] == pytest.approx(info.frames / RATE, abs=1e-4)
    total = sum(row["duration"] for row in rows)
    assert seconds_of(made / "train-0000.tar") == pytest.approx(total, abs=0.05)


def test_the_tars_are_a_source_of_conversations(made: Path) -> None:
    items = list(open_source(sorted(made.glob("dev-*.tar"))))
    assert len(items) == HELD_OUT
    for item, (read, speaker, _) in zip(items, clips(made, "dev"), strict=True):
        assert item.problems == ()
        assert item.conversation is not None
        (message,) = item.conversation.messages
        assert (message.speaker, message.text) == (speaker, read)


def test_there_are_no_clips_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dev-\*.tar"):
        next(clips(tmp_path, "dev"))


# --- going on ----------------------------------------------------------------------------------


class Stop(Exception):
    """Stops a run from within."""


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    stand_in: Path, made: Path, tmp_path: Path
) -> None:
    seen, threads = 0, threading.active_count()

    def stop(progress: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 2 * CLIPS + 10:
            raise Stop

    with pytest.raises(Stop):
        synthesize(tmp_path, hours=HOURS, workers=1, clips_per_tar=CLIPS, on_progress=stop)
    assert threading.active_count() == threads
    assert list(tars(tmp_path)) == ["dev-0000.tar", "dev-0001.tar"]
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / ".train-0000.tar.abc.part").touch()
    (tmp_path / "tmpx.part").mkdir()
    (tmp_path / "tmpx.part" / "x.wav").touch()
    before = len(asked(stand_in))
    synthesize(tmp_path, hours=HOURS, workers=2, clips_per_tar=CLIPS)
    assert tars(tmp_path) == tars(made)
    assert not list(tmp_path.glob("*.part"))
    # What was there was not read again.
    again = asked(stand_in)[before:]
    assert len(again) == CLIPS * (len(tars(made)) - 2)


def test_more_hours_are_more_tars(stand_in: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "more")
    before = tars(made)
    synthesize(tmp_path / "more", hours=HOURS - 0.001, workers=2, clips_per_tar=CLIPS)
    assert tars(tmp_path / "more") == before
    assert not (stand_in / "asked").exists()
    total = sum(seconds_of(path) for path in made.glob("train-*.tar")) / 3600
    synthesize(tmp_path / "more", hours=total + 0.001, workers=2, clips_per_tar=CLIPS)
    after = tars(tmp_path / "more")
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()


def test_speech_of_another_loudness_is_not_mixed_in(
    stand_in: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flite, "_LOUDNESS", 0.2)
    with pytest.raises(ValueError, match="levelling"):
        synthesize(made, hours=HOURS, workers=2, clips_per_tar=CLIPS)


def test_other_speech_is_not_mixed_in(stand_in: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clips_per_tar"):
        synthesize(made, hours=HOURS, workers=1, clips_per_tar=CLIPS + 1)
    shutil.copy(made / "dev-0000.tar", tmp_path / "dev-0000.tar")
    with pytest.raises(ValueError, match="not of this recipe"):
        synthesize(tmp_path, hours=HOURS, workers=1, clips_per_tar=CLIPS)


def test_the_log_has_a_line_for_each_tar(made: Path) -> None:
    lines = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    assert sorted(line["tar"] for line in lines) == list(tars(made))
    for line in lines:
        assert line["clips"] == CLIPS
        assert line["speech_s"] == pytest.approx(seconds_of(made / line["tar"]), abs=0.05)


def test_a_process_that_is_ended_is_gone_on_with(stand_in: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.demo_voice.speech", "--hours", "0.0001"]
    command += ["--out", str(tmp_path), "--workers", "2"]
    whole = ["dev-0000.tar", "test-0000.tar", "train-0000.tar"]
    for how, status, there in ((signal.SIGINT, 130, 1), (signal.SIGKILL, -signal.SIGKILL, 2)):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / whole[there - 1]).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, how)  # as a terminal does: flite hears it as well
        _, said = process.communicate(timeout=20)
        assert process.returncode == status
        assert "Traceback" not in said
        assert ("the same command goes on" in said) == (how == signal.SIGINT)
        assert list(tars(tmp_path)) == whole[:there]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert list(tars(tmp_path)) == whole
    assert "3 tars" in ended.stdout
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("wrong", [["--hours", "0"], ["--hours", "-1"], ["--workers", "0"]])
def test_wrong_numbers_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0] in capsys.readouterr().err


# --- flite itself ------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("flite") is None, reason="the program flite is not installed")
@pytest.mark.parametrize("voice", VOICES)
def test_flite_reads(voice: str, tmp_path: Path) -> None:
    flite = find_flite()
    slow, fast = (
        speak(flite, "hello, my name is anna.", voice=voice, stretch=stretch, folder=tmp_path)
        for stretch in (1.15, 0.9)
    )
    assert 1.1 < len(fast) / RATE < len(slow) / RATE < 3.0
    for clip in (slow, fast):
        first, last = sounding(clip)
        assert first / RATE == pytest.approx(BEFORE_S, abs=0.006)
        assert (len(clip) - last) / RATE == pytest.approx(AFTER_S, abs=0.006)
        assert PEAKS[0] - 1e-6 <= np.abs(clip).max() <= PEAKS[1] + 1e-6
    again = speak(flite, "hello, my name is anna.", voice=voice, stretch=0.9, folder=tmp_path)
    np.testing.assert_array_equal(again, fast)
