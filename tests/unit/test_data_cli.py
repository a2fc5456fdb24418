"""`csm-jax data`, as its user sees it, with a model directory like any other."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from csm_jax import cli
from csm_jax.audio import read_audio, write_audio
from csm_jax.data.identity import codec_hash, tokenizer_hash
from csm_jax.data.loader import TrainData
from csm_jax.data.shards import Shards
from csm_jax.data.tokenize import tokenize_for
from csm_jax.pipeline import load_codec
from csm_jax.weights.mimi import load_mimi, save_mimi
from tests.support.data import contents, line, message, write_clip, write_lines
from tests.support.model_directory import config, vowels
from tests.support.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = cli.main(["data", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("talks")
    lines = []
    for i in range(6):  # of 9 to 14 frames: sizes that one compiled program takes
        write_audio(where / f"{i}.wav", vowels(pitch=100 + 20 * i, seconds=0.72 + 0.08 * i), 24_000)
        lines.append(line(message(i % 2, f"Number {i}.", f"{i}.wav"), lang="en"))
    write_lines(where / "talks.jsonl", lines)
    return where / "talks.jsonl"


@pytest.fixture(scope="module")
def tokens(random_model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "out"
    words = [
        "data",
        "tokenize",
        source,
        "-o",
        out,
        "--model",
        random_model,
        "--shard-minutes",
        0.04,
    ]
    assert cli.main(list(map(str, words))) == 0
    return out


def test_check_tells_what_is_there(
    random_model: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "check", source, "--model", random_model)
    assert (status, err) == (0, "")
    assert "6 lines, 0 bad; 6 conversations of 6 messages, 5.5 s of audio" in out
    assert "languages: en 6" in out
    assert "1 rows of 2,048 positions" in out


def test_check_lists_bad_lines(
    random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "ok.wav", 10)
    ok = line(message(0, "fine", "ok.wav"))
    path = write_lines(tmp_path / "x.jsonl", [ok, {}, line(message(0, "a", "no.wav")), ok, ok])
    status, out, _ = run(capsys, "check", path, "--model", random_model)
    assert status == 1
    assert "line 2: messages must be a list" in out
    assert "line 3: message 0: no audio file at" in out
    assert "5 lines, 2 bad; 3 conversations" in out
    status, out, err = run(
        capsys, "tokenize", path, "-o", tmp_path / "out", "--model", random_model
    )
    assert status == 1
    assert out.startswith("line 2: messages")
    assert err.startswith("csm-jax: 1 of 5 lines are bad, the first (line 2): ")
    assert "with `csm-jax data tokenize --skip-bad`" in err
    status, out, _ = run(
        capsys, "tokenize", path, "-o", tmp_path / "out", "--model", random_model, "--skip-bad"
    )
    assert status == 0
    assert "2 bad lines were left out" in out


def test_tokens_hold_what_the_codec_gives(random_model: Path, source: Path, tokens: Path) -> None:
    shards, codec = Shards(tokens), load_codec(str(random_model))
    manifest = shards.manifest
    assert [shard["records"] for shard in manifest["shards"]] == [3, 3]
    audios = [read_audio(source.parent / f"{i}.wav")[0] for i in range(6)]
    codes = codec.encode_batch(audios[:3]) + codec.encode_batch(audios[3:])
    for i, example in enumerate(shards.read(range(6), facts=True)):
        assert example.facts["texts"] == [f"Number {i}."]
        np.testing.assert_array_equal(example.turns[0].codes, codes[i])
    assert manifest["codec_hash"] == codec_hash(random_model)
    assert manifest["tokenizer_hash"] == tokenizer_hash(random_model / "tokenizer.json")


def test_training_reads_them(
    random_model: Path, tokens: Path, source: Path, tmp_path: Path
) -> None:
    data = TrainData(tokens, config=config(), max_length=2048)
    [batch] = data.batches(
        seed=0, epochs=1, rows=1, accumulation=1, process_index=0, process_count=1
    )
    assert int(np.sum(batch.trained)) == data.num_trained_frames
    again = tokenize_for(
        source, tmp_path / "out", model=str(random_model), max_length=2048, shard_minutes=0.04
    )
    assert again == Shards(tokens).manifest
    assert contents(tmp_path / "out") == contents(tokens)


def test_inspect_shows_no_lengths_that_there_are_not(
    tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "inspect", tokens, "--max-length", 4)
    assert status == 0
    assert "6 are longer than 4 positions" in out
    assert "positions:" not in out
    assert "rows of" not in out


def test_what_lines_do_not_say(
    random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "a.wav", 10)
    said = message(0, "fine", "a.wav")
    path = write_lines(tmp_path / "x.jsonl", [line(said), line(said, lang="en"), line(said)])
    given = ("check", path, "--model", random_model, "--lang", "zh")
    status, out, _ = run(capsys, *given)
    assert status == 0
    assert "languages: en 1, zh 2" in out
    status, _, err = run(capsys, *given, "--speaker", 7)
    assert status == 2
    assert "--speaker is for recordings in tars; the lines of x.jsonl say who" in err


def test_inspect(tokens: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "inspect", tokens)
    assert status == 0
    for wanted in ("6 conversations of 6 messages", "5.5 s of audio", "codec hash: ", "longest:"):
        assert wanted in out
    status, out, _ = run(capsys, "inspect", tokens, "--index", 3)
    assert status == 0
    assert "conversation 3: lang en" in out
    assert "speaker 1 (trained, weight 1; " in out
    assert out.rstrip().endswith("12 frames, 1.0 s): Number 3.")
    status, out, _ = run(capsys, "inspect", tokens, "--verify")
    assert (status, out.splitlines()[0]) == (
        0,
        f"{len(list(tokens.glob('*.array_record')))} shards, 0 damaged",
    )
    shutil.copytree(tokens, tmp_path / "copy")
    shard = tmp_path / "copy" / "shard-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    status, out, _ = run(capsys, "inspect", tmp_path / "copy", "--verify")
    assert status == 1
    assert "shard-00000.array_record is damaged" in out


def test_export_and_tokenize_again(
    random_model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "export", tokens, tmp_path / "x.parquet", "--to", "parquet")[0] == 0
    words = ["tokenize", tmp_path / "x.parquet", "-o", tmp_path / "out", "--model", random_model]
    assert run(capsys, *words)[0] == 0
    assert Shards(tmp_path / "out").manifest["counts"] == Shards(tokens).manifest["counts"]


def test_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"text": "a", "audio_path": "a.wav"}]))
    target = tmp_path / "x.jsonl"
    status, out, _ = run(capsys, "import", "--from", "csm-mlx", tmp_path / "x.json", "-o", target)
    assert (status, out) == (0, f"{target}: 1 conversations\n")
    assert json.loads(target.read_text())["messages"][0]["role"] == "speaker_0"
    before = target.read_bytes()
    (tmp_path / "x.json").write_text('[{"text": "a"}]')
    status, _, err = run(capsys, "import", "--from", "csm-mlx", tmp_path / "x.json", "-o", target)
    assert (status, target.read_bytes()) == (2, before)
    assert "entry 1 has no audio_path" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.jsonl"]


def test_another_codec_is_refused(
    random_model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tokens, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    manifest["codec_hash"] = "0" * 64
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    run(capsys, "export", tmp_path / "copy", tmp_path / "x.parquet", "--to", "parquet")
    status, _, err = run(
        capsys, "tokenize", tmp_path / "x.parquet", "-o", tmp_path / "o", "--model", random_model
    )
    assert status == 2
    assert "holds codes of another codec (0000" in err


# --- mistakes: one line, exit status 2 -----------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("check no.jsonl --model {model}", "no file no.jsonl"),
        ("check {here} --model {model}", "is a directory; give the files in it"),
        ("check {here}/x.txt --model {model}", "must end in .jsonl or .tar or .parquet"),
        ("check {here}/x.jsonl {here}/x.tar --model {model}", "all of one kind"),
        ("check {here}/x.jsonl --model {here}/nowhere", "nowhere"),
        ("check {here}/x.jsonl --model {model} --max-length 5000", "must be in 4..2,048"),
        (
            "tokenize {here}/x.jsonl -o {here}/o --model {model} --shard-minutes 0",
            "--shard-minutes must",
        ),
        ("tokenize {here}/x.jsonl -o {here}/x.txt --model {model}", "x.txt: File exists"),
        (
            "tokenize {here}/x.jsonl -o {here}/full --model {model}",
            "is not empty and holds no tokens",
        ),
        ("tokenize {here}/x.tar -o {here}/o --model {model}", "cannot be read as a tar"),
        (
            "tokenize {here}/empty.jsonl -o {here}/o --model {model}",
            "there is no conversation in it",
        ),
        ("inspect no", "no directory no"),
        ("inspect {here}/x.txt", "is a file, not a directory of tokens"),
        ("inspect {here}", "it holds no tokens of `csm-jax data tokenize`"),
        ("inspect {tokens} --index 6", "--index must be in 0..5, got 6"),
        ("export {tokens} {here}/x.csv --to parquet", "must end in .parquet"),
        ("export {here} {here}/x.parquet --to parquet", "it holds no tokens"),
        ("import --from ljspeech {here}/x.txt -o {here}/y.jsonl", "is not a folder"),
        ("import --from csm-mlx {here} -o {here}/y.jsonl", "is not a file"),
        ("import --from csm-mlx no.json -o {here}/y.jsonl", "no file no.json"),
        ("import --from csm-mlx {here}/x.txt -o {here}/y.csv", "must end in .jsonl"),
        ("import --from csm-mlx {here}/x.txt -o {here}/no/y.jsonl", "there is no directory"),
        (
            "import --from csm-mlx {here}/x.txt -o {here}/y.jsonl --number-speakers",
            "goes with --from webdataset",
        ),
    ],
)
def test_mistakes_are_one_line(
    random_model: Path,
    tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    complaint: str,
) -> None:
    write_clip(tmp_path / "ok.wav", 5)
    write_lines(tmp_path / "x.jsonl", [line(message(0, "fine", "ok.wav"))])
    for name in ("x.txt", "x.tar"):
        (tmp_path / name).write_text("nothing")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").touch()
    status, out, err = run(
        capsys, *shlex.split(words.format(here=tmp_path, model=random_model, tokens=tokens))
    )
    assert (status, out) == (2, "")
    assert complaint in err
    assert err.startswith("csm-jax: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    ["", "check", "tokenize x.jsonl", "inspect a b", "import x -o y", "export a b --to csv"],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], words: str) -> None:
    status, _, err = run(capsys, *words.split())
    assert status == 2
    assert "error: " in err


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from csm_jax import cli; cli.main(['data', 'tokenize', '--help']); "
        "heavy = {'jax', 'numpy', 'soundfile', 'grain'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--skip-bad" in done.stdout


# --- identity ----------------------------------------------------------------------------------


def test_a_tokenizer_is_what_it_makes_of_text(random_model: Path, tmp_path: Path) -> None:
    before = tokenizer_hash(random_model / "tokenizer.json")
    given = json.loads((random_model / "tokenizer.json").read_text())
    given["post_processor"] = None
    given["model"]["merges"] = [" ".join(merge) for merge in given["model"]["merges"]]
    (tmp_path / "same.json").write_text(json.dumps(given, indent=4))
    assert tokenizer_hash(tmp_path / "same.json") == before
    build_tokenizer(vocab_size=300).save(str(tmp_path / "other.json"))
    assert tokenizer_hash(tmp_path / "other.json") != before
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        tokenizer_hash(tmp_path / "no.json")


def test_a_codec_is_its_weights_in_any_layout(random_model: Path, tmp_path: Path) -> None:
    before = codec_hash(random_model)
    name = "tokenizer-e351c8d8-checkpoint125.safetensors"
    for file in random_model.iterdir():
        if file.is_file() and file.name != name:
            (tmp_path / file.name).symlink_to(file)
    sizes, params = load_mimi(random_model / name)
    save_mimi(tmp_path / name, sizes, params, layout="moshi")
    assert codec_hash(tmp_path) == before
    params["encoder"]["conv_out"]["bias"] = params["encoder"]["conv_out"]["bias"] + 1
    save_mimi(tmp_path / name, sizes, params, layout="moshi", overwrite=True)
    assert codec_hash(tmp_path) != before


def test_the_commands_of_the_manual_work(
    random_model: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) > 15
    (tmp_path / "csm-1b").symlink_to(random_model)
    clips = [f"{i}.wav" for i in range(3)]  # of sizes that are compiled already
    for name in clips:
        shutil.copy(source.parent / name, tmp_path)
    ok = [line(message(0, name, name)) for name in clips]
    write_lines(tmp_path / "talks.jsonl", ok)
    (tmp_path / "LJSpeech-1.1" / "wavs").mkdir(parents=True)
    (tmp_path / "LJSpeech-1.1" / "metadata.csv").write_text("0|One.|One.\n")
    rows = [{"path": name, "audio_path": name, "text": name} for name in clips]
    for name in ("metadata.json", "dataset.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    chat = [
        {"role": "0", "content": [{"type": "text", "text": "a"}, {"type": "audio", "path": "a"}]}
    ]
    (tmp_path / "chats.json").write_text(json.dumps([chat]))
    for number in range(2):
        with tarfile.open(tmp_path / f"ZH-B00000{number}.tar", "w") as tar:
            for i, name in enumerate(clips[: 3 - number]):
                told = {"text": "你好。", "language": "zh", "speaker": f"ZH_S{i}"}
                (tmp_path / "told.json").write_text(json.dumps(told))
                tar.add(tmp_path / name, f"ZH_{number}_{i}.wav")
                tar.add(tmp_path / "told.json", f"ZH_{number}_{i}.json")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["csm-jax", "data"]
        if "--split" in words:  # of a file that has splits
            write_lines(tmp_path / "talks.jsonl", [*ok, *({**each, "split": "dev"} for each in ok)])
        status, _, err = run(capsys, *words[2:])
        assert (status, err) == (0, ""), command
    assert json.loads((tmp_path / "zh.speakers.json").read_text()) == {
        f"ZH_S{i}": i for i in range(3)
    }
    zh = Shards(tmp_path / "tokens-zh-speakers").read(range(5), facts=True)
    assert [e.facts["speakers"] for e in zh] == [[0], [1], [2], [0], [1]]
    assert {e.facts["lang"] for e in zh} == {"zh"}
