"""`csm-jax eval`, from the words of its command line to its exit status and its files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_jax import cli, config, hub, pipeline
from csm_jax.audio import write_audio
from csm_jax.eval import run
from csm_jax.eval.cli import add_arguments, main
from csm_jax.synthesizer import Synthesizer
from tests.support import synthesizer as support
from tests.support.corpus import write_manifest
from tests.support.model import short_config

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("Good morning, my small friend.", "The red house has four doors.", "One, two, three!")


class Evaluate:
    def __init__(self, out: Path) -> None:
        self.out, self.opened = out, []

    def __call__(self, *words: Any) -> int:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args([*map(str, words), "-o", str(self.out)])
        return main(args, open_synthesizer=self.open)

    def open(self, settings: Mapping[str, Any]) -> Synthesizer:
        self.opened.append(settings)
        return support.make()

    @property
    def document(self) -> dict[str, Any]:
        return json.loads((self.out / "eval.json").read_text())


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    monkeypatch.setenv("CSM_JAX_VOICES", str(tmp_path / "voices"))
    monkeypatch.setattr(hub, "locate_config", lambda source: None)  # as a lone checkpoint
    return Evaluate(tmp_path / "out")


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """A manifest of recordings by flite."""
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    rows = []
    for i, text in enumerate(TEXTS):
        name = f"{i}.wav"
        words = ["flite", "-voice", "rms", "-t", text, "-o", str(tmp_path / name)]
        subprocess.run(words, check=True)
        rows.append({"id": f"r{i}", "text": text, "audio_filepath": name, "speaker": i % 2})
    return write_manifest(tmp_path / "spoken.jsonl", rows)


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A manifest of recordings of nothing."""
    rows = []
    for i, text in enumerate(TEXTS):
        audio = np.random.default_rng(i).normal(0, 0.1, 8_000).astype(np.float32)
        write_audio(tmp_path / f"{i}.wav", audio, 16_000)
        rows.append({"id": f"r{i}", "text": text, "audio_filepath": f"{i}.wav"})
    return write_manifest(tmp_path / "noise.jsonl", rows)


def test_recordings_of_speech_are_heard_and_shuffled_texts_are_not(
    evaluate: Evaluate, spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.txt").write_text("\n".join(TEXTS))
    words = (spoken, "--vocabulary", tmp_path / "s.txt")
    assert evaluate(*words) == 0
    out = capsys.readouterr().out
    assert "word error rate: 0.0% (0.0% to 0.0%)" in out
    found = evaluate.document
    assert found["format"] == 1
    assert found["summary"]["wer"]["of"] == 14
    assert found["summary"]["real_time_factor"] is None
    assert found["recogniser"].startswith("pocketsphinx, 14 words, bigram")
    assert set(found["speakers"]) == {"0", "1"}
    assert 80 < found["summary"]["words_per_minute"]["mean"] < 260
    assert "<audio" not in (evaluate.out / "report.html").read_text()  # they lie elsewhere

    assert evaluate(*words, "--shuffle-text") == 0
    assert evaluate.document["summary"]["wer"]["value"] > 0.9

    assert evaluate(spoken, "--recogniser", "none") == 0
    assert evaluate.document["summary"]["wer"] is None
    assert evaluate.document["summary"]["seconds"]["mean"] > 1


def test_a_model_speaks_and_its_recordings_can_be_judged_again(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    rows = [
        {"id": f"r{i}", "text": text, "seed": i, "max_audio_length_ms": 80 * (i + 1)}
        for i, text in enumerate(TEXTS)
    ]
    rows.append({"id": "bad", "text": "Hers.", "voice": "nobody"})
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    (tmp_path / "s.txt").write_text("\n".join(TEXTS))
    hears = ("--vocabulary", tmp_path / "s.txt")
    words = (manifest, "--model", "m", "--no-watermark", "--slots", 2, "--against", "n", *hears)
    assert evaluate(*words, "--against-dtype", "bfloat16") == 3
    first, second = evaluate.opened
    assert first == {
        "model": "m",
        "layout": None,
        "dtype": None,
        "slots": 2,
        "redraws": 0,
        "watermark": False,
        "watermark_key": (212, 211, 146, 56, 201),
        "mesh": None,
    }
    assert second == {**first, "model": "n", "dtype": "bfloat16"}
    found = evaluate.document
    figures = found["summary"]
    assert (figures["rows"], figures["failed"]) == (4, 1)
    assert "nobody" in found["rows"][3]["error"]
    # The other model is the same one, with the same seeds.
    assert figures["agreement"]["identical"]["value"] == 1.0
    assert figures["agreement"]["equal_codes"] == 1.0
    assert figures["stop_rate"]["of"] == 3
    assert figures["watermark_rate"] is None
    assert figures["real_time_factor"]["wall_s"] > 0

    again = Evaluate(tmp_path / "again")
    assert again(evaluate.out / "rows.jsonl", *hears, "--language-model", "unigram") == 0
    assert again.opened == []
    assert [each["id"] for each in again.document["rows"]] == ["r0", "r1", "r2"]
    assert {"slots", "temperature"} <= found["settings"].keys()
    assert not {"slots", "temperature"} & again.document["settings"].keys()
    for name in ("stop_rate", "repetition_rate", "seconds"):
        assert again.document["summary"][name] == figures[name]


def test_the_watermark_of_recordings_is_looked_for(
    evaluate: Evaluate, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Watermarker:
        def verify(self, audio: np.ndarray, rate: int, key: Any) -> bool:
            asked.append((len(audio), rate, key))
            return len(asked) == 2

    monkeypatch.setattr(pipeline, "load_watermarker", lambda find: Watermarker())
    words = (noise, "--recogniser", "none", "--watermark-from", "m")
    assert evaluate(*words, "--watermark-key", "1,2,3,4,5") == 0
    assert asked == [(8_000, 16_000, (1, 2, 3, 4, 5))] * 3
    assert evaluate.document["summary"]["watermark_rate"]["count"] == 1
    # A model's own speech is marked and looked at; of the other's, codes alone are asked for.
    words = (noise, "--recogniser", "none", "--model", "m", "--against", "n")
    assert evaluate(*words, "--max-audio-length-ms", 160) == 0
    assert [settings["watermark"] for settings in evaluate.opened] == [True, False]
    assert evaluate.document["summary"]["watermark_rate"]["of"] == 3


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--against", "m"], "say with --model"),
        (["--temperature", "0.6", "--slots", "3"], "--slots, --temperature: say with --model"),
        (["--model", "m", "--against-dtype", "float32"], "--against-dtype goes with"),
        (["--model", "m", "--watermark-from", "m"], "--watermark-from is for recordings"),
        (["--no-watermark", "--watermark-from", "m"], "exclude each other"),
        (["--language-model", "unigram"], "--language-model goes with --vocabulary"),
        (["--pronunciations", "p"], "--pronunciations goes with --vocabulary"),
        (["--language", "xx"], "language must be one of"),
        (["--seed", "-1"], "--seed must be in"),
        (["--slots", "0"], "--slots must be at least 1"),
        (["--redraws", "-1"], "--redraws must be 0 or more"),
        (["--model", "m", "--temperature", "-1", "--recogniser", "none", "--no-watermark"], "temp"),
    ],
)
def test_arguments_that_make_no_sense(
    evaluate: Evaluate, noise: Path, words: list[str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        evaluate(noise, *words)
    assert not (evaluate.out / "eval.json").exists()


@pytest.mark.parametrize("package", ["matplotlib.figure", "rapidfuzz.distance"])
def test_missing_packages_are_told_before_anything_is_spoken(
    evaluate: Evaluate, noise: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'csm_jax\[eval\]'"):
        evaluate(noise, "--model", "m", "--no-watermark")
    assert not evaluate.opened


def test_models_that_cannot_be_compared_are_told_before_anything_is_spoken(
    evaluate: Evaluate, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = short_config()
    fewer = dataclasses.replace(
        sizes, num_codebooks=2, decoder=dataclasses.replace(sizes.decoder, max_seq_len=2)
    )
    monkeypatch.setattr(hub, "locate_config", Path)
    monkeypatch.setattr(config, "read_config", {Path("m"): sizes, Path("n"): fewer}.get)
    words = (noise, "--model", "m", "--against", "n", "--no-watermark", "--recogniser", "none")
    with pytest.raises(ValueError, match="m makes 4 codes a frame and n 2"):
        evaluate(*words)
    assert not evaluate.opened


def test_an_earlier_runs_figures_do_not_stay_beside_new_recordings(
    evaluate: Evaluate, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = ["eval.json", "report.html", "rows.jsonl"]
    words = [noise, "--recogniser", "none"]
    assert evaluate(*words) == 0
    words += ["--model", "m", "--no-watermark", "--max-audio-length-ms", "160"]
    with pytest.raises(ValueError, match="temperature"):
        evaluate(*words, "--temperature", "-1")
    assert sorted(path.name for path in evaluate.out.iterdir()) == figures  # nothing was spoken

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "speak", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*words)
    assert not list(evaluate.out.iterdir())


def test_a_manifest_is_not_overwritten(evaluate: Evaluate, noise: Path) -> None:
    evaluate.out.mkdir()
    manifest = evaluate.out / "eval.json"
    manifest.write_bytes(noise.read_bytes())
    with pytest.raises(ValueError, match="would be overwritten"):
        evaluate(manifest, "--recogniser", "none", "--model", "m")
    assert manifest.read_bytes() == noise.read_bytes()


def test_the_command_says_what_is_wrong_in_one_line(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out")]
    assert cli.main(["eval", "--help"]) == 0
    assert "csm-jax eval test.jsonl --model" in capsys.readouterr().out
    for words, complaint in (
        ([str(tmp_path / "none.jsonl"), *out], "no manifest at"),
        ([str(noise), *out, "--vocabulary", str(tmp_path / "none")], "no sentences at"),
        ([str(noise), *out, "--recogniser", "ears"], "invalid choice"),
        ([str(noise)], "-o/--out"),
    ):
        assert cli.main(["eval", *words]) == 2
        assert complaint in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "1.wav").unlink()
    assert cli.main(["eval", str(noise), *out, "--recogniser", "none"]) == 2
    assert "1 recordings are not there" in capsys.readouterr().err
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    assert cli.main(["eval", str(noise), *out, "--recogniser", "none"]) == 3
    document = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert "cannot be read as audio" in document["rows"][1]["error"]


def test_the_command_hands_over_what_it_needs(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_synthesizer(settings: Mapping[str, Any]) -> Synthesizer:
        opened.append((settings["slots"], cli._interrupt._tidying))
        return support.make()

    monkeypatch.setattr(cli, "_open_synthesizer", open_synthesizer)
    words = ["eval", str(noise), "-o", str(tmp_path / "out"), "--model", "m", "--no-watermark"]
    words += ["--recogniser", "none", "--max-audio-length-ms", "160"]
    assert cli.main(words) == 0
    assert opened == [(3, 1)]
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_the_command_measures_a_model(random_model: Path, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "Hi.", "max_audio_length_ms": 160}]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    out = tmp_path / "out"
    words = ["eval", str(manifest), "-o", str(out), "--model", str(random_model)]
    assert cli.main([*words, "--recogniser", "none"]) == 0
    [row] = json.loads((out / "eval.json").read_text())["rows"]
    assert row["watermarked"] is False  # the networks are random
    assert row["audio"] == "audio/a.wav"
    assert (out / "audio" / "a.wav").is_file()


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, 160_000).astype(np.float32)
    write_audio(tmp_path / "a.wav", audio, 16_000)
    rows = [{"id": f"r{i}", "text": "Hi.", "audio_filepath": "a.wav"} for i in range(2_000)]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    words = ["eval", str(manifest), "-o", str(tmp_path / "out"), "--recogniser", "none"]
    process = subprocess.Popen(
        [sys.executable, "-m", "csm_jax", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (tmp_path / "out").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert err == "csm-jax: interrupted\n"
    assert out == ""
    assert list((tmp_path / "out").iterdir()) == []
