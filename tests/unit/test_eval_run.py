"""Rows spoken by a small engine, measured, summed up and reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_jax.audio import read_audio, write_audio
from csm_jax.corpus.requests import RequestMaker
from csm_jax.eval.manifest import read_rows, read_sentences, recordings_of, texts_of
from csm_jax.eval.metrics import words_of
from csm_jax.eval.report import numbers, render
from csm_jax.eval.run import Measured, Speed, Spoken, measure, recorded, shuffled, speak
from csm_jax.eval.summary import as_json, by_speaker, summarise
from tests.support import synthesizer as support
from tests.support.corpus import write_manifest

RATE = 24_000


class Ears:
    """Hears what it is told to, by the length of the audio."""

    name = "ears"

    def __init__(self, heard: dict[int, str]) -> None:
        self.heard = heard

    def hear(self, audio: np.ndarray, sample_rate: int) -> str:
        return self.heard[len(audio)]


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)


def row(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "a", "line": 1, "text": text, "speaker": 0, **more}


def measured(path: Path, text: str, heard: str, **spoken: Any) -> Measured:
    """Returns what is known of a second of noise that is heard as something."""
    write_audio(path, noise(RATE), RATE)
    words = words_of(text)
    return measure(
        row(text),
        Spoken(audio=path, **spoken),
        own=words,
        said=words,
        recogniser=Ears({RATE: heard}),
        language="en",
    )


# --- the manifest ------------------------------------------------------------------------------


def test_bad_lines_empty_files_and_ids_given_twice_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no manifest at"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is empty: a manifest has a line"):
        read_rows(write_manifest(tmp_path / "m.jsonl", []))
    twice = [{"id": "a", "text": "One."}, {"id": "b", "text": ""}, {"id": "a", "text": "Two."}]
    path = write_manifest(tmp_path / "m.jsonl", twice)
    with pytest.raises(
        ValueError, match=r"2 bad lines: line 2: text is empty; line 3: .* on line 1"
    ):
        read_rows(path)
    path = write_manifest(tmp_path / "m.jsonl", [{"id": "a", "text": "..."}, {"text": "Two."}])
    with pytest.raises(ValueError, match="1 texts without a word: a: leave them out"):
        texts_of(read_rows(path), language="en")


def test_recordings_are_found_beside_the_manifest(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", noise(RATE), RATE)
    rows = [{"text": "One.", "audio_filepath": "a.wav"}, {"text": "Two.", "audio_filepath": None}]
    read = read_rows(write_manifest(tmp_path / "m.jsonl", rows))
    assert recordings_of(read, tmp_path) == [tmp_path / "a.wav", None]
    read = read_rows(write_manifest(tmp_path / "m.jsonl", [*rows, {"id": "x", "text": "Three."}]))
    with pytest.raises(ValueError, match="1 rows without audio_filepath: x: say with --model"):
        recordings_of(read, tmp_path)
    rows[1]["audio_filepath"] = "b.wav"
    read = read_rows(write_manifest(tmp_path / "m.jsonl", rows))
    with pytest.raises(FileNotFoundError, match=r"1 recordings are not there: .*b\.wav"):
        recordings_of(read, tmp_path)


def test_sentences_are_lines_or_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("Hello, you!\n\nIt's 2.\n")
    assert read_sentences(tmp_path / "s.txt", language="en") == [["hello", "you"], ["it's", "two"]]
    path = write_manifest(tmp_path / "s.jsonl", [{"text": "Hello, you!"}])
    assert read_sentences(path, language="en") == [["hello", "you"]]
    (tmp_path / "s.txt").write_text("...\n")
    with pytest.raises(ValueError, match="holds no words"):
        read_sentences(tmp_path / "s.txt", language="en")
    (tmp_path / "s.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_sentences(tmp_path / "s.txt", language="en")
    with pytest.raises(FileNotFoundError, match="no sentences at"):
        read_sentences(tmp_path / "none.txt", language="en")


# --- speaking ----------------------------------------------------------------------------------


def rows_for(count: int) -> list[dict[str, Any]]:
    return [
        row("a", id=f"r.{i}", seed=i, max_audio_length_ms=80.0 * (2 + i % 5)) for i in range(count)
    ]


def prepare(**defaults: Any) -> RequestMaker:
    return RequestMaker(base=Path(), seed=0, voices={}, defaults=defaults)


def test_rows_are_spoken_by_the_engine_in_their_order(tmp_path: Path) -> None:
    rows = rows_for(9)
    rows[4]["context"] = [{"audio": "nowhere.wav", "text": "Before.", "speaker": 0}]
    seconds: list[float] = []
    spoken, speed = speak(
        rows, support.make(), prepare(), tmp_path / "audio", on_row=seconds.append
    )
    assert len(seconds) == 9
    assert "no audio file" in (spoken[4].error or "")
    alone = support.solo([prepare()(each)[0] for i, each in enumerate(rows) if i != 4])
    for one, other in zip([*spoken[:4], *spoken[5:]], alone, strict=True):
        assert one.codes is not None
        np.testing.assert_array_equal(one.codes, other.codes)
        assert one.finish_reason == other.finish_reason
        if one.audio is not None:
            audio, rate = read_audio(one.audio)
            assert (len(audio), rate) == (1920 * len(one.codes), RATE)
    names = {path.name for path in (tmp_path / "audio").iterdir()}
    assert names == {f"r%2E{i}.wav" for i in range(9) if spoken[i].audio is not None}
    assert speed.audio_s == pytest.approx(sum(seconds))
    assert speed.wall_s > 0


def test_codes_alone_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spoken, _ = speak(rows_for(3), support.make(), prepare(), None)
    assert all(one.codes is not None and one.audio is None for one in spoken)
    assert list(tmp_path.iterdir()) == []


def test_a_stop_closes_the_engine(tmp_path: Path) -> None:
    synthesizer = support.make()

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speak(rows_for(9), synthesizer, prepare(), tmp_path / "audio", on_row=stop)
    assert not synthesizer.busy
    assert not list((tmp_path / "audio").glob(".*"))


def test_a_synthesizer_that_loses_rows_is_an_error() -> None:
    class Loses:
        sample_rate = RATE

        def run(self, requests: Any) -> Iterator[Any]:
            list(requests)
            return iter(())

    with pytest.raises(RuntimeError, match=r"no answer for rows \['r.0', 'r.1'\]"):
        speak(rows_for(2), Loses(), prepare(), None)


# --- measuring ---------------------------------------------------------------------------------


def test_what_is_heard_is_compared_with_what_was_to_be_said(tmp_path: Path) -> None:
    found = measured(
        tmp_path / "a.wav",
        "The cat sat on 2 mats.",
        "the the cat sit on two mats",
        finish_reason="eos",
        flags=(),
    )
    assert found.words is not None
    assert (found.words.substitutions, found.words.insertions, found.words.deletions) == (1, 1, 0)
    assert (found.stopped, found.looped, found.silent, found.repeated) == (True, False, False, 1)
    assert found.facts is not None
    assert found.facts.seconds == 1.0
    assert found.characters is not None
    assert found.characters.length == len("the cat sat on two mats")


def test_nothing_said_is_all_words_missing() -> None:
    words = ["a", "b"]
    found = measure(
        row("A b."),
        Spoken(audio=None, finish_reason="eos", flags=()),
        own=words,
        said=words,
        recogniser=Ears({}),
        language="en",
        is_marked=lambda audio, rate: True,
    )
    assert found.words is not None
    assert (found.words.deletions, found.silent, found.watermarked) == (2, True, False)
    assert found.facts is None


def test_a_recording_without_history_is_measured_by_its_sound(tmp_path: Path) -> None:
    quiet = np.concatenate([noise(RATE), np.zeros(4 * RATE, np.float32)])
    write_audio(tmp_path / "a.wav", quiet, RATE)
    given = {"recogniser": None, "language": "en", "own": ["a"], "said": ["a"]}
    found = measure(row("A."), recorded(row("A."), tmp_path / "a.wav"), **given)
    assert (found.silent, found.stopped, found.looped, found.words) == (True, None, None, None)
    told = row("A.", extra={"finish_reason": "length", "flags": ["repetition"]})
    found = measure(told, recorded(told, tmp_path / "a.wav"), **given)
    assert (found.silent, found.stopped, found.looped) == (False, False, True)
    for reason, stopped in (("eos", True), ("cancelled", False)):
        told = row("A.", extra={"finish_reason": reason})
        assert measure(told, recorded(told, tmp_path / "a.wav"), **given).stopped is stopped


def test_bad_audio_is_an_error_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"no audio at all")
    found = measure(
        row("A."),
        Spoken(audio=tmp_path / "a.wav"),
        own=["a"],
        said=["a"],
        recogniser=Ears({}),
        language="en",
    )
    assert "cannot be read as audio" in (found.error or "")
    assert summarise([found], seed=0)["wer"] is None
    assert summarise([found], seed=0)["failed"] == 1


def test_shuffled_texts_stand_nowhere_where_they_stood() -> None:
    texts = [[str(i)] for i in range(50)]
    mixed = shuffled(texts, seed=3)
    assert sorted(mixed) == sorted(texts)
    assert all(one != other for one, other in zip(mixed, texts, strict=True))
    assert shuffled(texts, seed=3) == mixed != shuffled(texts, seed=4)


def test_shuffled_texts_are_other_texts_even_if_some_are_the_same() -> None:
    texts = [["a"], ["b"], ["a"], ["c"], ["b"], ["a"]]
    for seed in range(20):
        mixed = shuffled(texts, seed=seed)
        assert sorted(mixed) == sorted(texts)
        assert all(one != other for one, other in zip(mixed, texts, strict=True))
    for bad in ([], texts[:1], [["a"], ["a"], ["b"]]):
        with pytest.raises(ValueError, match="no more than half"):
            shuffled(bad, seed=0)


def test_stutter_is_what_the_rows_own_text_has_not(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", noise(RATE), RATE)
    found = measure(
        row("very very good"),
        Spoken(audio=tmp_path / "a.wav", finish_reason="eos", flags=()),
        own=["very", "very", "good"],
        said=["another", "text"],
        recogniser=Ears({RATE: "very very good"}),
        language="en",
    )
    assert found.repeated == 0


# --- the figures -------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path) -> list[Measured]:
    given: dict[str, Any] = {"finish_reason": "eos", "flags": ()}
    rows = [
        measured(tmp_path / "a.wav", "one two three four", "one two three four", **given),
        measured(tmp_path / "b.wav", "one two", "one b two b more", **given),
        measured(
            tmp_path / "c.wav", "five six", "five", finish_reason="length", flags=("repetition",)
        ),
    ]
    for i, each in enumerate(rows):
        each.id = f"r{i}"
    rows[2].speaker = 1
    rows[2].error, rows[1].watermarked, rows[0].watermarked = None, False, True
    return rows


def test_figures_are_sums_over_sentences(several: list[Measured]) -> None:
    figures = summarise(several, seed=0, speed=Speed(wall_s=1.5, audio_s=3.0))
    # b two b more for two: three besides; six is missing: 4 errors in 8 words.
    wer = figures["wer"]
    assert (wer["value"], wer["of"], wer["hits"]) == (0.5, 8, 7)
    assert (wer["substitutions"], wer["deletions"], wer["insertions"]) == (0, 1, 3)
    assert 0 <= wer["low"] < 0.5 < wer["high"]
    assert figures["sentences_right"]["count"] == 1
    assert (figures["stop_rate"]["count"], figures["stop_rate"]["of"]) == (2, 3)
    assert figures["repetition_rate"]["count"] == 1
    assert (figures["watermark_rate"]["count"], figures["watermark_rate"]["of"]) == (1, 2)
    assert figures["real_time_factor"]["value"] == 0.5
    assert figures["seconds"]["mean"] == 1.0
    assert figures["words_per_minute"]["max"] == pytest.approx(240, rel=0.05)
    assert figures["agreement"] is None
    speakers = by_speaker(several, seed=0)
    assert speakers["1"]["wer"]["value"] == 0.5
    assert speakers["0"]["rows"] == 2


def document(rows: list[Measured], base: Path) -> dict[str, Any]:
    return {
        "manifest": {"path": "m.jsonl"},
        "csm_jax": "0",
        "created": "today",
        "model": None,
        "recogniser": "ears",
        "settings": {"shuffle_text": True},
        "summary": summarise(rows, seed=0),
        "speakers": by_speaker(rows, seed=0),
        "rows": [as_json(each, base) for each in rows],
    }


def test_the_json_is_json(several: list[Measured], tmp_path: Path) -> None:
    found = json.loads(json.dumps(document(several, tmp_path), allow_nan=False))
    assert found["rows"][1]["audio"] == "b.wav"
    assert found["rows"][1]["heard"] == "one b two b more"
    assert found["rows"][2]["words"]["deletions"] == 1
    assert as_json(several[0], tmp_path / "elsewhere")["audio"] == str(tmp_path / "a.wav")


def test_the_report_shows_what_went_wrong(several: list[Measured], tmp_path: Path) -> None:
    several[0].error = "would <not>"
    page = render(document(several, tmp_path), several, tmp_path)
    assert page.count("<img ") == 4
    assert "data:image/png;base64" in page
    assert "would &lt;not&gt;" in page
    assert "<del>six</del>" in page
    assert "<ins>b</ins>" in page
    assert "Negative control" in page
    assert '<audio controls preload="none" src="b.wav">' in page
    worst = page[page.index("Worst sentences") :]
    assert worst.index("r1") < worst.index("r2")  # 3 of 2 words wrong before 1 of 2


def test_only_what_was_measured_is_shown() -> None:
    words = ["a"]
    found = measure(
        row("A."),
        Spoken(audio=None),
        own=words,
        said=words,
        recogniser=None,
        language="en",
    )
    figures = summarise([found], seed=0)
    assert set(numbers(figures)) == {"fall silent", "rows", "nothing said"}
