"""What a line may be, and what `check` says about those that are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from csm_jax.config import tiny
from csm_jax.data.check import Findings, check
from csm_jax.data.conversations import MAX_LINE_BYTES, SchemaError, parse_line
from csm_jax.data.prepare import prepare
from csm_jax.data.sources import open_source
from tests.support.data import line, message, tokenizer, write_clip, write_lines

CONFIG = tiny()


def checked(path: Path, max_length: int = 64) -> tuple[Findings, list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    found = check(
        open_source([path]),
        tokenizer=tokenizer(),
        config=CONFIG,
        max_length=max_length,
        on_problem=lambda where, problem: problems.append((where, problem)),
    )
    return found, problems


def parsed(given: Any) -> Any:
    return parse_line(json.dumps(given).encode(), Path())


def test_a_line_with_everything() -> None:
    found = parsed(
        line(
            {
                "role": "speaker_7",
                "content": [
                    {"type": "text", "text": "One."},
                    {"type": "audio", "url": "a.wav", "start": 1, "end": 2.5},
                    {"type": "text", "text": "Two."},
                ],
            },
            message(0, "Hm.", codes=[[1] * 32]),
            training_mask=[False, True],
            id=12,
            weight=2,
            split="dev",
            lang="zh",
        )
    )
    one, two = found.messages
    assert (one.speaker, one.text, one.trained) == (7, "One. Two.", False)
    assert (one.sound.url, one.sound.start, one.sound.end) == ("a.wav", 1.0, 2.5)
    assert (two.trained, two.sound.codes) == (True, [[1] * 32])
    assert (found.kind, found.id, found.weight) == ("speech", "12", 2.0)
    assert (found.split, found.lang) == ("dev", "zh")


def test_without_a_mask_everything_is_trained() -> None:
    found = parsed(line(message(0, "a", "a.wav"), message(1, "b", "b.wav")))
    assert [each.trained for each in found.messages] == [True, True]
    assert found.weight == 1.0


GOOD = message(0, "a", "a.wav")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "must be a JSON object, got list"),
        ({}, "messages must be a list, got None"),
        (line(), "messages is empty"),
        (line(GOOD, trainingmask=[True]), r"unknown keys \['trainingmask'\]"),
        (line(GOOD, training_mask=[True, True]), "training_mask has 2 values for 1 messages"),
        (line(GOOD, training_mask=[1]), "training_mask must be a list of true and false"),
        (line(GOOD, training_mask=[False]), "nothing is trained"),
        (line(GOOD, weight=0), "weight must be a number from 1e-06 to 1e.06, got 0"),
        (line(GOOD, weight=1e39), "weight must be a number from 1e-06 to 1e.06, got 1e.39"),
        (line(GOOD, weight=1e-46), "weight must be"),
        (line(GOOD, weight=True), "weight must be"),
        (line(GOOD, id=""), "id must be a string"),
        (line(GOOD, split=["a"]), "split must be a string"),
        (line("a"), "message 0 must be an object"),
        (line({**GOOD, "role": "0"}), 'message 0: role must be "speaker_<number>"'),
        (line({**GOOD, "role": "speaker_-1"}), "role must be"),
        (line({**GOOD, "role": "speaker_١"}), "role must be"),
        (line({**GOOD, "speaker": 1}), r"message 0 has unknown keys \['speaker'\]"),
        (line({**GOOD, "content": "a"}), "content must be a list"),
        (line({**GOOD, "content": [{"type": "image"}]}), "an item must be"),
        (line(message(0, " ", "a.wav")), "message 0: text is empty"),
        (line(message(0, None, "a.wav")), "message 0: text is empty"),
        (line(message(0, "a\x00", "a.wav")), "control character"),
        (line(message(0, "a"), GOOD), "message 0 has no audio"),
        (line({**GOOD, "content": [*GOOD["content"], GOOD["content"][1]]}), "has 2 audios"),
        (line(message(0, "a", "a.wav", begin=1)), r"audio has unknown keys \['begin'\]"),
        (line(message(0, "a", 5)), "audio must have a url or codes"),
        (line(message(0, "a", "a.wav", start=-1)), "audio.start must be seconds, got -1"),
        (line(message(0, "a", "a.wav", start=2, end=2)), "audio.end=2 is not after audio.start=2"),
        (line(message(0, "a", "a.wav", codes=[[1]])), "audio has codes, so it must have no url"),
        (line(message(0, "a", codes=[])), "audio.codes must be a list or a .npy file"),
        ({**line(GOOD), "chosen": GOOD}, "chosen and rejected go together"),
    ],
)
def test_wrong_lines(given: Any, complaint: str) -> None:
    with pytest.raises(SchemaError, match=complaint):
        parsed(given)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'{"messages": [', "not JSON"),
        (b'{"weight": NaN}', "NaN is not a number"),
        (b'{"id": "\xff"}', "not UTF-8 text: byte 0xFF at position 8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_lines_that_are_not_json(data: bytes, complaint: str) -> None:
    with pytest.raises(SchemaError, match=complaint):
        parse_line(data, Path())


def test_every_mistake_of_a_line_is_told_at_once() -> None:
    wrong = line(message(0, "", "a.wav"), {**GOOD, "role": "x"}, weight=-1, training_mask=[True])
    with pytest.raises(SchemaError) as caught:
        parsed(wrong)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({**line(GOOD), "chosen": GOOD, "rejected": GOOD}, "preference"),
        ({**line(), "chosen": GOOD, "rejected": GOOD}, "preference"),
        (line(GOOD, message(1, "And?")), "prompt"),
        (line(message(1, "And?")), "prompt"),
    ],
)
def test_other_kinds_are_recognised(given: Any, kind: str) -> None:
    assert parsed(given).kind == kind


# --- with audio --------------------------------------------------------------------------------


def test_check_lists_every_bad_line_with_its_number(tmp_path: Path) -> None:
    write_clip(tmp_path / "ok.wav", 5)
    write_clip(tmp_path / "long.wav", 65)
    write_clip(tmp_path / "stereo.wav", 5, channels=2)
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 24_000)
    cut = write_clip(tmp_path / "cut.wav", 20)
    cut.write_bytes(cut.read_bytes()[:-20_000])
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000)
    for ending in ("flac", "mp3"):
        cut = tmp_path / f"cut.{ending}"
        soundfile.write(cut, noise, 24_000)
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    np.save(tmp_path / "good.npy", np.ones((3, 32), np.int32))
    np.save(tmp_path / "float.npy", np.ones((3, 32), np.float32))
    ok = message(0, "fine", "ok.wav")
    lines: list[tuple[Any, str | None]] = [
        (line(ok, id="a"), None),
        (line(message(0, "x", "nothing.wav")), "message 0: no audio file at"),
        (line(ok, message(0, "x", "text.wav")), "message 1: text.wav cannot be read as audio"),
        (line(message(0, "x", "folder.wav")), "is not a file"),
        (line(message(0, "x", "empty.wav")), "holds no audio"),
        (line(message(0, "x", "stereo.wav")), "has 2 channels and CSM needs one"),
        (line(message(0, "x", "cut.wav")), "cut short"),
        (line(message(0, "x", "cut.mp3")), r"cut\.mp3 is cut short: .* samples can be read"),
        (line(message(0, "x", "cut.flac")), r"cut\.flac (is cut short|cannot be read)"),
        (line(message(0, "x", "long.wav")), "has 5.2 s of audio, but at most 5.1 s fit"),
        (line(message(0, "x", "ok.wav", start=0.5)), "lasts 0.40 s, but start=0.5"),
        (line(message(0, "x", "ok.wav", start=0.1, end=0.6)), "lasts 0.40 s"),
        (line(message(0, "x", "ok.wav", start=0.1, end=0.41)), None),
        (line(message(0, "x", codes="good.npy")), None),
        (line(message(0, "x", codes="float.npy")), "codes must be integers"),
        (line(message(0, "x", codes="none.npy")), "no codes at"),
        (line(message(0, "x", codes="ok.wav")), "is no .npy file"),
        (line(message(0, "x", codes=[[256] * 32])), "32 codes lie outside 0..255"),
        (line(message(0, "x", codes=[[1] * 8])), r"codes must have shape \[frames, 32\]"),
        (line(message(0, "x", codes=[[1] * 32, [1]])), "codes"),
        (line(message(0, "x", codes=[[1] * 32, [0] * 32])), "end in a frame of zeros"),
        (line(message(0, "x", codes=[[1] * 32] * 70)), "codes are 70 frames, but at most 64 fit"),
        (line(ok, id="a"), "id 'a' was used before, in line 1"),
        (line(message(0, "<|end_of_text|>", "ok.wav")), "control token"),
        (line(message(0, "word " * 70, "ok.wav")), "trained message 0 alone takes"),
        (line(ok, ok, ok, ok, ok, ok, ok), r"first trained message \(number 0\) on it takes"),
        (line(ok, message(0, "And?")), None),
        ({**line(ok), "chosen": ok, "rejected": ok}, None),
        ({**line(ok), "chosen": ok, "rejected": message(0, "x", "no.wav")}, "no audio file"),
    ]
    found, problems = checked(write_lines(tmp_path / "x.jsonl", [each for each, _ in lines]))
    wanted = {f"line {i}": why for i, (_, why) in enumerate(lines, start=1) if why is not None}
    assert [where for where, _ in problems] == list(wanted)
    for where, problem in problems:
        assert re.search(wanted[where], problem), (where, problem)
    assert (found.items, found.bad) == (len(lines), len(wanted))
    assert dict(found.kinds) == {"speech": 3, "prompt": 1, "preference": 1}
    assert found.frames == 5 + 4 + 3
    assert found.dropped == 0


def test_check_counts_what_is_kept(tmp_path: Path) -> None:
    for name, frames in (("a", 30), ("b", 20), ("c", 10)):
        write_clip(tmp_path / f"{name}.wav", frames)
    talk = line(
        *(message(0, "x", f"{name}.wav") for name in "abc"),
        training_mask=[False, False, True],
        lang="zh",
        split="dev",
    )
    found, problems = checked(write_lines(tmp_path / "x.jsonl", [talk]), max_length=50)
    assert not problems
    assert (found.dropped, found.turns, found.frames, found.trained_frames) == (1, 2, 30, 10)
    assert (dict(found.langs), dict(found.splits)) == ({"zh": 1}, {"dev": 1})
    [length] = found.lengths
    assert 32 < length <= 50


def test_text_is_never_kept_without_all_of_its_audio(tmp_path: Path) -> None:
    """Audio cut at some length, under its full text, teaches a model to swallow words."""
    write_clip(tmp_path / "a.wav", 100.2)
    conversation = parse_line(json.dumps(line(message(0, "x", "a.wav"))).encode(), tmp_path)
    whole = prepare(conversation, tokenizer(), config=CONFIG, max_length=256)
    assert whole.frames == 101
    # One frame less than its audio: refused, whatever the length.
    for max_length in range(4, 105):
        with pytest.raises(SchemaError, match=r"fit"):
            prepare(conversation, tokenizer(), config=CONFIG, max_length=max_length)
    # A codec that returns less than it was given is refused as well.
    codes = np.ones((100, 32), np.int32)
    with pytest.raises(ValueError, match="gave 100 frames for audio of 101"):
        whole.example([codes])


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_other_rates_give_as_many_frames(tmp_path: Path, rate: int) -> None:
    write_clip(tmp_path / "a.wav", 7.5, rate=rate)
    conversation = parse_line(json.dumps(line(message(0, "x", "a.wav"))).encode(), tmp_path)
    assert prepare(conversation, tokenizer(), config=CONFIG, max_length=64).frames == 8


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3"])
def test_other_formats(tmp_path: Path, ending: str) -> None:
    write_clip(tmp_path / f"a.{ending}", 12, level=0.1)
    conversation = parse_line(json.dumps(line(message(0, "x", f"a.{ending}"))).encode(), tmp_path)
    ready = prepare(conversation, tokenizer(), config=CONFIG, max_length=64)
    assert ready.frames in (12, 13)  # MP3 adds a little at both ends


def test_part_of_a_recording_is_that_part(tmp_path: Path) -> None:
    samples = np.repeat(np.array([0.1, 0.2, 0.3, 0.4], np.float32), 24_000)
    soundfile.write(tmp_path / "a.wav", samples, 24_000)
    given = line(message(0, "x", "a.wav", start=1.0, end=3.0))
    conversation = parse_line(json.dumps(given).encode(), tmp_path)
    [sound] = prepare(conversation, tokenizer(), config=CONFIG, max_length=64).sounds
    assert len(sound) == 48_000
    np.testing.assert_allclose(sound, samples[24_000:72_000], atol=1e-4)


def test_a_line_too_long_does_not_hide_the_next(tmp_path: Path) -> None:
    write_clip(tmp_path / "ok.wav", 5)
    path = tmp_path / "x.jsonl"
    good = json.dumps(line(message(0, "a", "ok.wav"))).encode()
    path.write_bytes(b" " * (MAX_LINE_BYTES + 10) + b"{}\n\n" + b"\xef\xbb\xbf" + good)
    found, problems = checked(path)
    assert [where for where, _ in problems] == ["line 1"]
    assert found.kinds["speech"] == 1
