"""Voices of trained vectors: what they hold, their files, and the commands that show them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from csm_jax import cli
from csm_jax.audio import read_audio
from csm_jax.config import read_config, tiny
from csm_jax.prompt import TextTokenizer
from csm_jax.synthesizer import Synthesizer
from csm_jax.voices import (
    MODEL_KEY,
    Voice,
    VoiceFileError,
    VoiceLibrary,
    VoiceTurn,
    find_voice,
    model_hash,
    prefix_voice,
    read_voice,
    voice_prompt,
    write_voice,
)
from csm_jax.voices import files as voice_files
from tests.support.model import params_of, short_config
from tests.support.tokenizer import build_tokenizer

CONFIG = tiny()
D, C = CONFIG.backbone.embed_dim, CONFIG.num_codebooks
PROVENANCE = {"source": "a test", "consent": "yes", "created": "2020-01-02T03:04:05+00:00"}
VECTORS = np.random.default_rng(0).normal(0, 0.1, (16, D)).astype(np.float32)


def prefix(vectors: np.ndarray = VECTORS, *, name: str = "anna") -> Voice:
    return prefix_voice(name, vectors, config=CONFIG, model="ab12", provenance=PROVENANCE)


def turn(seed: int = 0) -> VoiceTurn:
    codes = np.random.default_rng(seed).integers(0, CONFIG.codebook_size, (3, C), np.int32)
    return VoiceTurn(speaker=0, text="hello", codes=codes)


BOTH = dataclasses.replace(prefix(), turns=(turn(), turn(1)))


# --- a voice -----------------------------------------------------------------------------------


def test_what_it_holds() -> None:
    given = np.array(VECTORS)
    made = prefix(given)
    given[0, 0] = 9
    assert made.vectors is not None
    np.testing.assert_array_equal(made.vectors, VECTORS)
    assert made.vectors.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        made.vectors[0, 0] = 9
    assert (made.turns, made.frames, made.seconds) == ((), 0, 0.0)
    assert (made.num_codebooks, made.codebook_size) == (C, CONFIG.codebook_size)
    assert made.provenance == {**PROVENANCE, MODEL_KEY: "ab12"}


def test_the_key_is_of_vectors_and_turns() -> None:
    changed = np.array(VECTORS)
    changed[-1, -1] += 1e-6
    turns = dataclasses.replace(BOTH, vectors=None)
    others = [
        BOTH,
        turns,
        prefix(changed),
        prefix(VECTORS[:-1]),
        prefix(VECTORS[::-1]),
        dataclasses.replace(prefix(), vectors=VECTORS.reshape(8, -1)),
        dataclasses.replace(BOTH, turns=BOTH.turns[::-1]),
    ]
    keys = {each.key for each in (prefix(), *others)}
    assert len(keys) == len(others) + 1
    assert prefix(name="bob").key == prefix().key


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (np.zeros(D, np.float32), r"must have shape \[positions, embed_dim\], got \[128\]"),
        (np.zeros((0, D), np.float32), r"got \[0, 128\]"),
        (np.full((2, D), np.nan, np.float32), "256 numbers of its vectors are not finite"),
        (np.full((1, D), np.inf, np.float32), "128 numbers of its vectors are not finite"),
        (np.zeros((2, D + 1), np.float32), r"\(2, 129\) must be .* embed_dim=128"),
    ],
)
def test_bad_vectors(vectors: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prefix(vectors)


def test_bad_voices() -> None:
    with pytest.raises(ValueError, match="voice 'anna' has no turns and no vectors"):
        dataclasses.replace(prefix(), vectors=None)
    with pytest.raises(ValueError, match="num_codebooks must be 1 or more, got 0"):
        dataclasses.replace(prefix(), num_codebooks=0)
    with pytest.raises(ValueError, match=r"turn 0: codes must have shape \[frames, 31\]"):
        dataclasses.replace(BOTH, num_codebooks=31)


def test_it_must_leave_room() -> None:
    tokenizer = TextTokenizer(build_tokenizer())
    most = CONFIG.backbone.max_seq_len * 3 // 4
    frames, mask = voice_prompt(tokenizer, prefix(np.zeros((most, D), np.float32)), CONFIG)
    assert frames.shape == mask.shape == (0, C + 1)
    with pytest.raises(ValueError, match=r"takes 1,537 positions \(0 of them audio\)"):
        voice_prompt(tokenizer, prefix(np.zeros((most + 1, D), np.float32)), CONFIG)
    turns = len(voice_prompt(tokenizer, BOTH, CONFIG)[0])
    fits = dataclasses.replace(BOTH, vectors=np.zeros((most - turns, D), np.float32))
    assert len(voice_prompt(tokenizer, fits, CONFIG)[0]) == turns
    over = dataclasses.replace(BOTH, vectors=np.zeros((most - turns + 1, D), np.float32))
    with pytest.raises(ValueError, match=r"takes 1,537 positions \(6 of them audio\)"):
        voice_prompt(tokenizer, over, CONFIG)


def test_the_hash_of_a_model() -> None:
    params = params_of(short_config())
    mine = model_hash(params)
    assert mine is not None
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert model_hash(half) == mine
    assert model_hash(params_of(short_config(), seed=1)) != mine
    backbone = params["backbone"]
    norm = backbone["final_norm"].at[3].add(0.1)
    assert model_hash(params | {"backbone": backbone | {"final_norm": norm}}) != mine


# --- its file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [prefix(), BOTH], ids=["vectors", "both"])
def test_round_trip(tmp_path: Path, made: Voice) -> None:
    path = tmp_path / "any name.safetensors"
    write_voice(path, made)
    for read in (read_voice(path), find_voice(str(path))):
        assert read.vectors is not None
        np.testing.assert_array_equal(read.vectors, VECTORS)
        assert (read.key, read.name, read.provenance) == (made.key, made.name, made.provenance)
        assert read.num_codebooks == C
        assert len(read.turns) == len(made.turns)
    with safe_open(path, "numpy") as file:
        assert file.metadata()["csm_jax.voice.format"] == "2"
        np.testing.assert_array_equal(file.get_tensor("vectors"), VECTORS)
    library = VoiceLibrary(tmp_path / "voices")
    library.add(made)
    assert library.get("anna").key == find_voice("anna", library.directory).key == made.key


def test_a_voice_without_vectors_is_written_as_before(tmp_path: Path) -> None:
    path = tmp_path / "turns.safetensors"
    write_voice(path, dataclasses.replace(BOTH, vectors=None))
    with safe_open(path, "numpy") as file:
        assert file.metadata()["csm_jax.voice.format"] == "1"
        assert sorted(file.keys()) == ["turns.0.codes", "turns.1.codes"]
    assert read_voice(path).vectors is None


def refused(path: Path) -> str:
    with pytest.raises(VoiceFileError) as caught:
        read_voice(path)
    return str(caught.value)


def test_a_flipped_bit_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "anna.safetensors"
    write_voice(path, dataclasses.replace(BOTH, vectors=VECTORS[:2, :8]))
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for position in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        refused(path)
    for length in (0, 8, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "is damaged" in refused(path)
    path.write_bytes(data)
    read_voice(path)


def test_content_that_is_not_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "anna.safetensors"
    write_voice(path, BOTH)
    data = path.read_bytes()

    def rewritten(change: Any) -> str:
        path.write_bytes(data)
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(metadata, tensors)
        save_file(tensors, path, metadata)
        return refused(path)

    def without(metadata: Any, tensors: Any) -> None:
        del tensors["vectors"]

    def older(metadata: Any, tensors: Any) -> None:
        metadata["csm_jax.voice.format"] = "1"

    def doubled(metadata: Any, tensors: Any) -> None:
        tensors["vectors"] = tensors["vectors"].astype(np.float64)

    def not_finite(metadata: Any, tensors: Any) -> None:
        # Whoever writes such a file has computed the hash as well; the sums are looked at before.
        tensors["vectors"] = np.full_like(tensors["vectors"], np.nan)
        arrays = [tensors[name] for name in ("vectors", "turns.0.codes", "turns.1.codes")]
        metadata["csm_jax.voice.hash"] = voice_files._hash(metadata["csm_jax.voice"], arrays)

    assert "hash it was written with" in rewritten(without)
    assert "format 1 is not that of its tensors" in rewritten(older)
    assert "the tensor vectors is not float32" in rewritten(doubled)
    assert "checksums" in rewritten(not_finite)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_voice(str(tmp_path / "none.safetensors"))


# --- commands ----------------------------------------------------------------------------------


def test_list_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library, here = VoiceLibrary(tmp_path / "voices"), ["--dir", str(tmp_path / "voices")]
    library.add(prefix())
    library.add(dataclasses.replace(BOTH, name="both"))
    assert cli.main(["voices", "list", *here]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME  SECONDS  TURNS  SPEAKERS  CREATED     SOURCE",
        "anna      0.0      0            2020-01-02  prefix of 16 vectors; a test",
        "both      0.5      2  0         2020-01-02  prefix of 16 vectors; a test",
    ]
    assert cli.main(["voices", "list", "--json", *here]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["vectors"] for each in listed] == [[16, D], [16, D]]
    assert cli.main(["voices", "show", "anna", *here]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "anna",
        "  trained   prefix of 16 vectors of 128 numbers",
        "  source    a test",
        "  consent   yes",
        "  created   2020-01-02T03:04:05+00:00",
        "  model     ab12",
        "  codec     32 codebooks of 256 codes",
        f"  key       {prefix().key}",
        f"  file      {library.path('anna')}",
    ]
    assert cli.main(["voices", "show", "both", *here]) == 0
    assert "  audio     0.5 s in 2 turns (6 frames)" in capsys.readouterr().out.splitlines()
    wanted = ["voices", "show", "anna", "-o", str(tmp_path / "x.wav"), *here]
    assert cli.main(wanted) == 2
    assert "is a prefix of 16 vectors, without a recording" in capsys.readouterr().err


def test_generate_and_batch_speak_with_it(
    random_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Synthesizer, "warm_up", lambda self: None)  # all its programs, in minutes
    sizes = read_config(random_model / "config.json")
    shape = (16, sizes.backbone.embed_dim)
    vectors = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    made = prefix_voice("anna", vectors, config=sizes, model="another", provenance=PROVENANCE)
    library = VoiceLibrary(tmp_path / "voices")
    library.add(made)
    write_voice(tmp_path / "file.safetensors", made)

    def said(*words: str) -> np.ndarray:
        out = tmp_path / "out.wav"
        base = ["generate", "Hi.", "--model", str(random_model), "--no-watermark", "-o", str(out)]
        assert cli.main([*base, "--max-audio-length-ms", "400", *words]) == 0
        return read_audio(out)[0]

    by_name = said("--voice", "anna", "--voices-dir", str(library.directory))
    assert "voice 'anna' was trained for another model" in capsys.readouterr().err
    np.testing.assert_array_equal(said("--voice", str(tmp_path / "file.safetensors")), by_name)
    assert len(by_name) == 5 * 1920
    assert by_name.std() > 0

    row = {"id": "a", "text": "Hi.", "max_audio_length_ms": 160, "voice": "anna"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    corpus = tmp_path / "corpus"
    words = ["batch", str(tmp_path / "rows.jsonl"), "--out", str(corpus), "--slots", "2"]
    words += ["--model", str(random_model), "--voices", str(library.directory)]
    assert cli.main(words) == 0
    assert json.loads((corpus / "plan.json").read_text())["identity"]["voices"] == {
        "anna": made.key
    }
    # Vectors are a part of what the plan is bound to.
    library.add(dataclasses.replace(made, vectors=2 * vectors), replace=True)
    assert cli.main(words) == 2
    assert "voices.anna" in capsys.readouterr().err
