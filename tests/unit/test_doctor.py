"""What `csm-jax doctor` finds, with and without PyTorch, in directories, files and the hub's cache."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from csm_jax import cli, doctor, hub
from csm_jax.weights import mimi


def found(source: object) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(str(source))}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError(f"asked the hub for {args}")

    monkeypatch.setattr(hub, "_fetch", fail)


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cached", lambda repo, file: None)


def test_directories(
    capsys: pytest.CaptureFixture[str], random_model: Path, tmp_path: Path, no_network: None
) -> None:
    assert cli.main(["doctor", "--model", str(random_model)]) == 0
    text = capsys.readouterr().out
    assert "2 + 2 layers, 32 codebooks" in text
    assert "everything is there" in text

    partial = tmp_path / "partial"
    partial.mkdir()
    for name in ("config.json", "model.safetensors"):
        (partial / name).symlink_to(random_model / name)
    assert cli.main(["doctor", "--model", str(partial)]) == 1
    text = capsys.readouterr().out
    assert "3 missing" in text
    assert "hf download" in text

    assert cli.main(["doctor", "--model", str(tmp_path)]) == 1
    assert "lacks" in capsys.readouterr().out


def test_torch_is_optional(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], random_model: Path
) -> None:
    original = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("torch", "moshi"):
            raise importlib.metadata.PackageNotFoundError(package)
        return original(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["doctor", "--model", str(random_model)]) == 0
    text = capsys.readouterr().out
    assert "not installed (only for --codec torch)" in text
    assert "everything is there" in text
    monkeypatch.setattr(doctor, "_CORE", ("torch",))
    assert cli.main(["doctor", "--model", str(random_model)]) == 1


def test_a_codec_inside_the_checkpoint_counts(
    monkeypatch: pytest.MonkeyPatch, random_model: Path, tmp_path: Path, no_network: None
) -> None:
    for item in random_model.iterdir():
        if item.name != hub.MIMI:
            (tmp_path / item.name).symlink_to(item)
    assert not found(tmp_path)["mimi"].ok
    monkeypatch.setattr(mimi, "holds_mimi", lambda path: True)
    assert found(tmp_path)["mimi"].detail == str(tmp_path / "model.safetensors")
    monkeypatch.setattr(doctor, "_cached", lambda repo, file: str(tmp_path / file))
    assert found("sesame/csm-1b")["mimi"].detail == "within the checkpoint of sesame/csm-1b"


@pytest.mark.parametrize("source", ["/nowhere", "not/a/b", "", "nowhere"])
def test_a_mistyped_path_is_no_hub_id(
    source: str, capsys: pytest.CaptureFixture[str], no_network: None
) -> None:
    assert cli.main(["doctor", "--model", source]) == 1
    text = capsys.readouterr().out
    assert f"no model at {source!r}" in text
    assert "hf download" not in text
    assert "1 missing" in text


def test_a_lone_checkpoint_and_an_orbax_directory(
    tmp_path: Path, no_network: None, no_cache: None
) -> None:
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "mine.safetensors")
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "_METADATA").touch()
    for name in ("mine.safetensors", "params"):
        findings = found(tmp_path / name)
        assert findings["checkpoint"].ok
        assert findings["tokenizer"].detail == str(tmp_path / "tokenizer.json")
        assert f"hf download {hub.MIMI_REPO}" in findings["mimi"].remedy
        assert findings["watermark"].remedy.count(hub.WATERMARK_FOLDER) == 4
    (tmp_path / "sound.wav").touch()
    assert "unknown kind of file" in found(tmp_path / "sound.wav")["model"].detail


def test_the_hubs_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    there = {("sesame/csm-1b", "ckpt.pt"), ("sesame/csm-1b", "config.json")}
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, file: "/cached" if (repo, file) in there else None,
    )
    findings = found("sesame/csm-1b")
    assert findings["checkpoint"].ok
    assert findings["config"].ok
    assert not findings["tokenizer"].ok
    assert "hf download" in findings["mimi"].remedy
    assert cli.main(["doctor"]) == 1
    assert "3 missing" in capsys.readouterr().out


def test_a_missing_package_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: str) -> None:
        raise ModuleNotFoundError("No module named 'tokenizers'")

    monkeypatch.setattr(doctor, "_model", broken)
    findings = found("sesame/csm-1b")
    assert findings["python"].ok
    assert "tokenizers" in findings["model"].detail
