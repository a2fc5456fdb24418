"""The demo voice's stages around training: conversations, the model it begins with, sentences, the package."""

from __future__ import annotations

import argparse
import json
import shlex
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import image

from csm_jax import hub, load_csm_1b, weights
from csm_jax.audio import read_audio
from csm_jax.eval.arguments import add_arguments
from csm_jax.mimi.params import init_params as init_mimi
from csm_jax.prompt import TextTokenizer
from csm_jax.weights.mimi import load_mimi, save_mimi
from recipes.demo_voice import base, codec_plan, conversations, curves, evaluation, package
from recipes.demo_voice.text import sentences
from recipes.demo_voice.words import VOCABULARY
from tests.unit.test_recipe_codec import write_speech


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech")
    for split in ("train", "dev", "test"):
        write_speech(path, split, 12)
    write_speech(path, "train", 9, tar=1)
    return path


@pytest.fixture(scope="module")
def codec_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    config = codec_plan.demo_plan().training.mimi
    save_mimi(path, config, init_mimi(config, jax.random.key(0)), layout="moshi")
    return path


@pytest.fixture(scope="module")
def model(codec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "base"
    assert base.main(["--codec", str(codec_file), "--out", str(path)]) == 0
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_clip_is_in_one_conversation(
    speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conversations.main(["--speech", str(speech)]) == 0
    assert not (speech / "test.jsonl").exists()  # nothing is trained with it
    lines = read(speech / "train.jsonl")
    urls = [each["content"][1]["url"] for line in lines for each in line["messages"]]
    assert len(urls) == len(set(urls)) == 21
    assert {len(line["messages"]) for line in lines} > {1}
    assert {each["role"] for line in lines for each in line["messages"]} == {
        "speaker_0",
        "speaker_1",
    }
    assert len({line["id"] for line in lines}) == len(lines)


def test_more_speech_changes_no_earlier_conversation(speech: Path, tmp_path: Path) -> None:
    whole = conversations.write_conversations(speech, "train").read_text().splitlines()
    (tmp_path / "train-0000.tar").write_bytes((speech / "train-0000.tar").read_bytes())
    first = conversations.write_conversations(tmp_path, "train").read_text().splitlines()
    assert whole[: len(first)] == first
    assert len(whole) > len(first)


def test_no_speech(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conversations.main(["--speech", str(tmp_path)]) == 1
    assert "make the speech first" in capsys.readouterr().err


def test_the_model_that_training_begins_with(model: Path) -> None:
    config, params = weights.load_checkpoint(model)
    assert config == base.config()
    assert sum(x.size for x in jax.tree.leaves(params)) < 4_100_000
    # All words are within what the tokenizer knows, and the codec has the model's codes.
    tokenizer = TextTokenizer.from_file(model / hub.TOKENIZER)
    assert max(max(tokenizer.encode(f"[0]{word}")) for word in VOCABULARY) < config.text_vocab_size
    mimi, _ = load_mimi(model / hub.MIMI)
    assert (mimi.num_codebooks, mimi.codebook_size) == (config.num_codebooks, config.codebook_size)


def test_no_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--codec", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert base.main(words) == 1
    assert "train it first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_curves_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curves.main([str(tmp_path)]) == 1
    assert "has no log.jsonl" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("")
    assert curves.main([str(tmp_path)]) == 1
    assert "no step yet" in capsys.readouterr().err
    found = {"c0": 2.0, "decoder": 3.0, "accuracy": 0.1, "eos_c0": None, "learning_rate": 1e-3}
    lines = [{"kind": kind, "step": n, **found} for n in (1, 2) for kind in ("train", "eval")]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves.main([str(tmp_path)]) == 0
    picture = image.imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (480, 880)
    assert (picture[..., :3].std(axis=2) > 0.2).sum() > 100  # coloured lines


def test_sentences_to_speak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sentences", "--split", "dev", "--count", "24", "--out", str(tmp_path)]
    assert evaluation.main(words) == 0
    rows = read(tmp_path / "dev.jsonl")
    told, command = capsys.readouterr().out.splitlines()
    assert "24 sentences" in told
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(shlex.split(command)[2:])
    assert (args.manifest, args.model) == (tmp_path / "dev.jsonl", "demo")
    assert args.vocabulary.is_file()
    assert [row["text"] for row in rows] == [each.text for each in islice(sentences("dev"), 24)]
    kinds = [each.kind for each in islice(sentences("dev"), 24)]
    # Both voices say both kinds.
    assert {(row["speaker"], kind) for row, kind in zip(rows, kinds, strict=True)} == {
        (0, "random"), (0, "template"), (1, "random"), (1, "template"),
    }  # fmt: skip
    told = (tmp_path / evaluation.SENTENCES).read_text().splitlines()
    assert {word for line in told for word in line.split()} == set(VOCABULARY)
    held_out = {" ".join(each.words) for split in ("dev", "test") for each in sentences(split)}
    assert held_out.isdisjoint(told)


@pytest.mark.parametrize("count", ["0", "501"])
def test_too_many_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str], count: str) -> None:
    words = ["sentences", "--count", count, "--out", str(tmp_path / "out")]
    assert evaluation.main(words) == 1
    assert "1 to 500" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_recordings_through_the_codec(speech: Path, codec_file: Path, tmp_path: Path) -> None:
    words = ["codec", "--codec", str(codec_file), "--speech", str(speech), "--split", "dev"]
    assert evaluation.main([*words, "--count", "5", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "rows.jsonl")
    assert len(rows) == 5
    from recipes.demo_voice.speech import clips

    for row, (text, speaker, audio) in zip(rows, clips(speech, "dev"), strict=False):
        heard, rate = read_audio(tmp_path / row["audio_filepath"])
        assert (row["text"], row["speaker"], rate) == (text, speaker, 24_000)
        assert len(heard) == len(audio)
        assert not np.allclose(heard, audio / 32768)


def test_the_package_speaks_as_the_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "README.md").write_text("the card")
    for _ in range(2):  # again over the first
        assert package.main(["--model", str(model), "--out", str(out)]) == 0
    assert sum(path.stat().st_size for path in out.iterdir()) < package.MAX_BYTES
    assert (out / "README.md").read_text() == "the card"
    _, stored = load_mimi(out / hub.MIMI)
    assert {x.dtype.name for x in jax.tree.leaves(stored["decoder"])} == {"float16"}
    generators = [load_csm_1b(path, watermark=False) for path in (model, out)]
    config = generators[0].config
    assert generators[1].config == config
    full, half = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(each.params)]) for each in generators
    )
    assert 0 < np.abs(full - half).max() < 1e-3 * np.abs(full).max()


def test_a_package_that_is_too_large(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(package, "MAX_BYTES", 1_000_000)
    out = tmp_path / "demo"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"the good one")
    assert package.main(["--model", str(model), "--out", str(out)]) == 1
    assert "more than 1,000,000" in capsys.readouterr().err
    assert [path.read_bytes() for path in out.iterdir()] == [b"the good one"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
