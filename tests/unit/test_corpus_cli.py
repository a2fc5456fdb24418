"""`csm-jax batch`, from the words of its command line to its exit status."""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_jax import hub
from csm_jax.corpus.cli import add_arguments, main
from csm_jax.corpus.identity import hash_files, model_files
from csm_jax.voices import Voice, VoiceLibrary, VoiceTurn
from tests.support.corpus import FakeSynthesizer, Result, write_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with all files of a model, none of which is one."""
    directory = tmp_path / "model"
    watermark = directory / "silentcipher" / hub.WATERMARK_FOLDER
    watermark.mkdir(parents=True)
    for path in (
        *(directory / name for name in (hub.CONFIG, hub.TOKENIZER, hub.MIMI, "model.safetensors")),
        *(watermark / name for name in hub.WATERMARK_FILES),
    ):
        path.write_text(path.name)
    return directory


class OfRequests(FakeSynthesizer):
    def run(self, requests: Iterable[tuple[Hashable, Any]]) -> Iterator[Result]:
        return super().run((key, self.row(request)) for key, request in requests)

    @staticmethod
    def row(request: Any) -> dict[str, Any]:
        return {"id": str(request.seed), "seed": request.seed, "text": request.text}


class Batch:
    def __init__(self, model: Path):
        self.model, self.opened = model, []

    def __call__(self, *words: Any) -> int:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return main(parser.parse_args(list(map(str, words))), open_synthesizer=self.open)

    def open(self, settings: Mapping[str, Any]) -> FakeSynthesizer:
        self.opened.append(settings)
        return OfRequests()


@pytest.fixture
def batch(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    monkeypatch.setenv("CSM_JAX_VOICES", str(tmp_path / "voices"))
    return Batch(model)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "rows.jsonl", [{"text": f"Row {i}."} for i in range(20)])


def test_in_one_go(batch: Batch, manifest: Path, tmp_path: Path, capsys: Any) -> None:
    words = (manifest, "--out", tmp_path / "c", "--model", batch.model, "--slots", 8)
    assert batch(*words, "--temperature", 0.5) == 0
    out = capsys.readouterr().out.splitlines()
    assert "20 rows in 1 shards" in out[0]
    assert "1 shards are committed: 20 rows" in out[1]
    assert "20 of 20 rows" in out[2]
    assert batch.opened == [
        {
            "model": str(batch.model),
            "layout": None,
            "dtype": None,
            "slots": 8,
            "redraws": 0,
            "watermark": True,
            "watermark_key": (212, 211, 146, 56, 201),
            "mesh": None,
        }
    ]
    # Again: nothing is loaded, and all is there. With something else: refused.
    assert batch("make", *words, "--temperature", 0.5) == 0
    assert len(batch.opened) == 1
    assert "(1 of them before)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"different are options\.settings"):
        batch(*words)


def test_step_by_step(batch: Batch, manifest: Path, tmp_path: Path, capsys: Any) -> None:
    corpus = tmp_path / "c"
    words = ("--out", corpus, "--model", batch.model, "--shard-minutes", 0.1)
    assert batch("plan", manifest, *words) == 0
    assert batch("status", corpus) == 1
    assert batch("verify", corpus) == 1
    assert "missing: shard-00000" in capsys.readouterr().out
    assert batch("run", corpus, "--shards-in-flight", 3, "--mesh", "data=2") == 0
    assert batch.opened[0]["mesh"] == "data=2"
    assert batch("status", corpus) == 0
    assert batch("verify", corpus) == 0
    assert batch("export", corpus, "--to", "nemo", tmp_path / "out") == 0
    assert batch("report", corpus) == 0
    assert (corpus / "report.html").is_file()
    capsys.readouterr()
    (corpus / "shards" / "shard-00000.tar").write_bytes(b"")
    assert batch("verify", corpus) == 1
    streams = capsys.readouterr()
    assert "corrupt: shard-00000" in streams.out
    assert "remove its .json" in streams.err


def test_failed_rows_are_status_3(batch: Batch, tmp_path: Path, capsys: Any) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"text": "fail"}, {"text": "Well."}])
    words = ("--out", tmp_path / "c", "--model", batch.model)
    assert batch(manifest, *words) == 3
    assert "1 rows failed" in capsys.readouterr().out
    assert batch("run", tmp_path / "c") == 3
    assert batch("verify", tmp_path / "c") == 3


def test_bad_rows_are_status_3_or_refused(batch: Batch, tmp_path: Path, capsys: Any) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"text": ""}, {"text": "Well."}])
    words = ("--out", tmp_path / "c", "--model", batch.model)
    with pytest.raises(ValueError, match="1 bad rows"):
        batch("plan", manifest, *words, "--strict")
    assert batch("plan", manifest, *words) == 3
    assert '{"line":1,"error":"text is empty"}' in capsys.readouterr().err
    assert batch("run", tmp_path / "c") == 3
    # A task's own rows are all fine: an array job is not failed as a whole for one bad line.
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JOB_COMPLETION_INDEX", "0")
        assert batch("run", tmp_path / "c", "--executor", "task", "--tasks", 1) == 0


def test_tasks_speak_their_shards(
    batch: Batch, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    corpus = tmp_path / "c"
    words = ("--out", corpus, "--model", batch.model, "--shard-minutes", 0.1)
    assert batch("plan", manifest, *words) == 0
    for name, value in {"ID": 4, "MIN": 4, "MAX": 5, "STEP": 1, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert batch("run", corpus, "--executor", "task") == 0
    names = sorted(path.name for path in (corpus / "shards").glob("*.tar"))
    assert names == ["shard-00000.tar", "shard-00002.tar"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert batch("run", corpus, "--executor", "task") == 0
    assert batch("verify", corpus) == 0
    with pytest.raises(ValueError, match="goes with --executor task"):
        batch("run", corpus, "--tasks", 2)


def test_a_run_with_another_model_key_or_voice_is_refused(
    batch: Batch, tmp_path: Path, model: Path
) -> None:
    turn = VoiceTurn(speaker=0, text="Hers.", codes=np.zeros((3, 32), np.int32))
    given = {"source": "a test", "consent": "yes", "created": "2000-01-01"}
    library = VoiceLibrary(tmp_path / "voices")
    library.add(Voice(name="ann", codebook_size=2048, turns=(turn,), provenance=given))
    manifest = write_manifest(tmp_path / "m.jsonl", [{"text": "Well.", "voice": "ann"}])
    corpus, key = tmp_path / "c", ("--watermark-key", "1,2,3,4,5")
    assert batch("plan", manifest, "--out", corpus, "--model", model, *key) == 0
    assert "1, 2, 3" not in (corpus / "plan.json").read_text()

    with pytest.raises(ValueError, match=r"different are options\.watermark_key"):
        batch("run", corpus)
    weights = (model / "model.safetensors").read_text()
    (model / "model.safetensors").write_text("other")
    with pytest.raises(ValueError, match="different are model;"):
        batch("run", corpus, *key)
    (model / "model.safetensors").write_text(weights)
    other = VoiceTurn(speaker=0, text="Hers.", codes=np.ones((3, 32), np.int32))
    library.add(
        Voice(name="ann", codebook_size=2048, turns=(other,), provenance=given), replace=True
    )
    with pytest.raises(ValueError, match=r"different are voices\.ann;"):
        batch("run", corpus, *key)
    library.add(
        Voice(name="ann", codebook_size=2048, turns=(turn,), provenance=given), replace=True
    )
    assert batch.opened == []

    model.rename(tmp_path / "moved")
    assert batch("run", corpus, *key, "--model", tmp_path / "moved") == 0
    assert batch.opened[0]["model"] == str(tmp_path / "moved")
    assert batch.opened[0]["watermark_key"] == (1, 2, 3, 4, 5)


def test_bad_options_are_told_before_anything_is_written(
    batch: Batch, manifest: Path, tmp_path: Path
) -> None:
    words = (manifest, "--out", tmp_path / "c", "--model", batch.model)
    for bad in (("--temperature", -1), ("--slots", 0), ("--seed", -1), ("--shard-minutes", 0)):
        with pytest.raises(ValueError, match=r"\d"):
            batch(*words, *bad)
    with pytest.raises(FileNotFoundError, match="no manifest at"):
        batch(tmp_path / "none.jsonl", *words[1:])
    with pytest.raises(FileNotFoundError, match="no model at"):
        batch(*words[:3], "--model", tmp_path / "nowhere")
    assert not (tmp_path / "c").exists()
    with pytest.raises(FileNotFoundError, match="no corpus is planned"):
        batch("run", tmp_path / "c")


def test_a_stop_asked_for_by_progress_stops(batch: Batch, manifest: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = (manifest, "--out", tmp_path / "c", "--model", batch.model)
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        main(
            parser.parse_args(list(map(str, words))),
            open_synthesizer=batch.open,
            on_progress=stop,
        )
    assert batch(*words) == 0


def test_a_model_is_the_content_of_its_files(model: Path, tmp_path: Path) -> None:
    files = model_files(str(model), watermark=True)
    assert len(files["model"]) == 7
    assert [path.name for path in files["tokenizer"]] == ["tokenizer.json"]
    assert len(model_files(str(model), watermark=False)["model"]) == 3
    before, remembered = hash_files(files["model"], {})
    model.rename(tmp_path / "moved")
    moved = model_files(str(tmp_path / "moved"), watermark=True)
    assert hash_files(moved["model"], remembered)[0] == before
    changed = moved["model"][1]
    changed.write_text(changed.read_text() + "!")
    assert hash_files(moved["model"], remembered)[0] != before


def test_a_file_that_has_not_changed_is_not_read_again(model: Path) -> None:
    file = model / "config.json"
    _, remembered = hash_files([file], {})
    ((path, (size, changed, _)),) = remembered.items()
    told = json.loads(json.dumps({path: (size, changed, "as remembered")}))
    assert hash_files([file], told)[1] == {path: (size, changed, "as remembered")}
    assert hash_files([file], {path: (size, changed + 1, "old")})[1] == remembered


def test_a_checkpoint_of_several_files_is_all_of_them(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    for name in ("a.safetensors", "b.safetensors"):
        (model / name).write_text(name)
    weights = {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}
    index.write_text(json.dumps({"weight_map": weights}))
    names = [path.name for path in model_files(str(model), watermark=False)["model"]]
    assert names[:3] == [index.name, "a.safetensors", "b.safetensors"]
