"""Shards: what is in them, and that no stop loses, repeats or changes anything."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from csm_jax.config import tiny
from csm_jax.data.examples import decode_record
from csm_jax.data.shards import Shards, verify
from csm_jax.data.survey import BadLinesError
from tests.support.data import (
    CODEC,
    TOKENIZER,
    LevelCodec,
    contents,
    line,
    message,
    some_lines,
    tokenize,
    tokenizer,
    write_clip,
    write_lines,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_lines(tmp_path_factory.mktemp("source"), 40)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "out"
    tokenize(source, directory)
    return directory


def test_a_shard_holds_every_turn_whole(source: Path, whole: Path) -> None:
    lines = [json.loads(each) for each in source.read_text().splitlines()]
    shards, codec = Shards(whole), LevelCodec(tiny())
    assert len(shards) == len(lines)
    for given, example in zip(lines, shards.read(range(len(lines)), facts=True), strict=True):
        assert example.facts["id"] == given["id"]
        assert example.facts["lang"] == given["lang"]
        assert [turn.trained for turn in example.turns] == given["training_mask"]
        for each, turn in zip(given["messages"], example.turns, strict=True):
            text, audio = each["content"]
            speaker = each["role"].removeprefix("speaker_")
            assert turn.text.tolist() == tokenizer().encode(f"[{speaker}]{text['text']}")
            samples, _ = soundfile.read(source.parent / audio["url"], dtype="float32")
            np.testing.assert_array_equal(turn.codes, codec.encode(samples))
            assert len(turn.codes) == -(-len(samples) // 1920)


def test_the_manifest(source: Path, whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["codec_hash"], manifest["tokenizer_hash"]) == (CODEC, TOKENIZER)
    assert (manifest["num_codebooks"], manifest["codebook_size"]) == (32, 256)
    assert manifest["source"]["files"] == ["talks.jsonl"]
    counts = manifest["counts"]
    assert counts["conversations"] == sum(shard["records"] for shard in manifest["shards"]) == 40
    assert counts["langs"] == {"en": 20, "zh": 20}
    examples = Shards(whole).read(range(40))
    assert counts["frames"] == sum(len(turn.codes) for e in examples for turn in e.turns)
    assert counts["trained_turns"] == sum(turn.trained for e in examples for turn in e.turns)
    assert counts["max_text_id"] == max(int(t.text.max()) for e in examples for t in e.turns)
    assert len(manifest["shards"]) > 3
    assert all(problem is None for _, problem in verify(whole, manifest))


def test_the_same_source_gives_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    tokenize(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)


class _StopError(Exception):
    pass


def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    out, codec = tmp_path / "out", LevelCodec(tiny())
    stops = 0
    for budget in range(1, 200, 9):
        left = [budget]

        def stop(progress: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise _StopError

        try:
            tokenize(source, out, codec=codec, on_progress=stop)
        except _StopError:
            stops += 1
            assert not (out / "manifest.json").exists()
            continue
        break
    assert stops >= 3
    assert contents(out) == contents(whole)
    # What was committed was not encoded again: at most a shard's worth was lost at each stop.
    turns = json.loads((whole / "manifest.json").read_text())["counts"]["turns"]
    shard = max(
        len(json.loads(path.read_text())["turns"]["text"]) for path in whole.glob("shard-*.json")
    )
    assert codec.encoded <= turns + stops * (shard + 4)


def test_a_killed_run_goes_on_to_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.support.data", str(source), str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("shard-*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match="another process is at work"):
            tokenize(source, out)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(out.glob("shard-*.json"))
    assert not (out / "manifest.json").exists()
    (out / ".shard-00009.array_record.abc.part").write_bytes(b"left behind")
    codec = LevelCodec(tiny())
    tokenize(source, out, codec=codec)
    assert contents(out) == contents(whole)
    assert codec.encoded < json.loads((out / "manifest.json").read_text())["counts"]["turns"]


def test_a_finished_run_does_nothing_more(source: Path, tmp_path: Path) -> None:
    codec = LevelCodec(tiny())
    tokenize(source, tmp_path / "out", codec=codec)
    before, encoded = contents(tmp_path / "out"), codec.encoded
    tokenize(source, tmp_path / "out", codec=codec)
    assert (contents(tmp_path / "out"), codec.encoded) == (before, encoded)


def test_a_damaged_shard_of_a_finished_run_is_told(source: Path, tmp_path: Path) -> None:
    tokenize(source, tmp_path / "out")
    shard = tmp_path / "out" / "shard-00001.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"shard-00001\.array_record is damaged"):
        tokenize(source, tmp_path / "out")


def test_a_missing_shard_is_made_again(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize(source, out)
    (out / "manifest.json").unlink()
    (out / "shard-00002.array_record").unlink()
    tokenize(source, out)
    assert contents(out) == contents(whole)


def test_another_source_or_setting_needs_another_directory(source: Path, tmp_path: Path) -> None:
    tokenize(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"something else \(differing in max_length\)"):
        tokenize(source, tmp_path / "out", max_length=200)
    other = write_lines(source.parent / "other.jsonl", [line(message(0, "a", "clips/000-0.wav"))])
    with pytest.raises(ValueError, match=r"differing in source"):
        tokenize(other, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no tokens"):
        tokenize(source, tmp_path / "mine")


def test_a_full_disk_is_told_and_what_is_committed_stays(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sizes = [path.stat().st_size for path in sorted(whole.glob("*.array_record"))]
    code = (
        "import resource, signal, sys; from pathlib import Path; "
        "from tests.support.data import tokenize; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({max(sizes) - 1}, resource.RLIM_INFINITY)); "
        "tokenize(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert not list(out.glob(".*.part"))
    committed = len(list(out.glob("shard-*.json")))
    assert committed == len(list(out.glob("shard-*.array_record"))) == sizes.index(max(sizes))
    tokenize(source, out)
    assert contents(out) == contents(whole)


# --- bad lines, other kinds, splits --------------------------------------------------------------


def test_bad_lines_stop_the_run_before_anything_is_encoded(tmp_path: Path) -> None:
    write_clip(tmp_path / "ok.wav", 5)
    good = line(message(0, "fine", "ok.wav"))
    path = write_lines(tmp_path / "x.jsonl", [good, {"messages": []}, good, [1]])
    codec = LevelCodec(tiny())
    with pytest.raises(BadLinesError, match="2 of 4 lines are bad") as caught:
        tokenize(path, tmp_path / "out", codec=codec)
    assert [where for where, _ in caught.value.listed] == ["line 2", "line 4"]
    assert not (tmp_path / "out").exists()
    assert codec.encoded == 0


def test_audio_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    write_clip(tmp_path / "ok.wav", 5)
    lines = [line(message(0, "fine", name)) for name in ("ok.wav", "no.wav")]
    with pytest.raises(BadLinesError, match="line 2 is bad"):
        tokenize(write_lines(tmp_path / "x.jsonl", lines), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_lines_can_be_left_out_and_are_listed(tmp_path: Path) -> None:
    write_clip(tmp_path / "ok.wav", 5)
    good = line(message(0, "fine", "ok.wav"))
    lines = [good, {"messages": []}, line(message(0, "fine", "no.wav")), good]
    manifest = tokenize(write_lines(tmp_path / "x.jsonl", lines), tmp_path / "out", skip_bad=True)
    assert manifest["counts"]["conversations"] == 2
    assert manifest["counts"]["rejected"] == 2
    rejected = [
        json.loads(each) for each in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [each["where"] for each in rejected] == ["line 2", "line 3"]
    assert "no audio file" in rejected[1]["error"]
    only_bad = write_lines(tmp_path / "y.jsonl", [line(message(0, "fine", "no.wav"))])
    with pytest.raises(BadLinesError, match="no conversation is left"):
        tokenize(only_bad, tmp_path / "none", skip_bad=True)


def test_lines_that_are_not_for_fine_tuning_are_refused(tmp_path: Path) -> None:
    ok = message(0, "a", "ok.wav")
    write_clip(tmp_path / "ok.wav", 5)
    both = {**line(ok), "chosen": ok, "rejected": ok}
    path = write_lines(tmp_path / "x.jsonl", [line(ok), both, both])
    with pytest.raises(ValueError, match="2 lines are not for fine-tuning, each is a preference"):
        tokenize(path, tmp_path / "out")
    path = write_lines(tmp_path / "y.jsonl", [line(ok), line(ok, message(1, "And?"))])
    with pytest.raises(ValueError, match="1 lines are not for fine-tuning, each is a prompt"):
        tokenize(path, tmp_path / "out")


def test_splits_are_never_mixed(tmp_path: Path) -> None:
    write_clip(tmp_path / "ok.wav", 5)
    ok = message(0, "a", "ok.wav")
    path = write_lines(
        tmp_path / "x.jsonl", [line(ok), line(ok, split="dev"), line(ok, split="dev")]
    )
    with pytest.raises(
        ValueError, match=r"dev \(2\), train \(1\): name one with `csm-jax data tokenize --s"
    ):
        tokenize(path, tmp_path / "out")
    with pytest.raises(ValueError, match="no line is of the split 'test'"):
        tokenize(path, tmp_path / "out", split="test")
    assert tokenize(path, tmp_path / "dev", split="dev")["counts"]["conversations"] == 2
    assert tokenize(path, tmp_path / "train", split="train")["counts"]["conversations"] == 1


def test_context_that_does_not_fit_is_not_encoded(tmp_path: Path) -> None:
    for name, frames in (("a", 30), ("b", 20), ("c", 10)):
        write_clip(tmp_path / f"{name}.wav", frames)
    talk = line(
        *(message(0, name, f"{name}.wav") for name in "abc"), training_mask=[False, False, True]
    )
    codec = LevelCodec(tiny())
    manifest = tokenize(
        write_lines(tmp_path / "x.jsonl", [talk]), tmp_path / "out", codec=codec, max_length=50
    )
    [example] = Shards(tmp_path / "out").read([0], facts=True)
    assert example.facts["texts"] == ["b", "c"]
    assert [turn.trained for turn in example.turns] == [False, True]  # the mask moved with them
    assert (manifest["counts"]["dropped"], codec.encoded) == (1, 2)


def test_a_codec_that_cuts_audio_is_refused(tmp_path: Path) -> None:
    class Short(LevelCodec):
        def encode(self, audio: np.ndarray) -> np.ndarray:
            return super().encode(audio)[:-1]

    write_clip(tmp_path / "ok.wav", 5)
    path = write_lines(tmp_path / "x.jsonl", [line(message(0, "a", "ok.wav"))])
    with pytest.raises(ValueError, match="gave 4 frames for audio of 5: it is not Mimi"):
        tokenize(path, tmp_path / "out", codec=Short(tiny()))


def test_a_codec_that_encodes_one_at_a_time(source: Path, whole: Path, tmp_path: Path) -> None:
    codec = LevelCodec(tiny())

    class Alone:
        num_codebooks, codebook_size = codec.num_codebooks, codec.codebook_size

        def encode(self, audio: np.ndarray) -> np.ndarray:
            return codec.encode(audio)

    tokenize(source, tmp_path / "out", codec=Alone())
    assert contents(tmp_path / "out") == contents(whole)


# --- tars --------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_are_read_directly(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(6):
        clip = write_clip(tmp_path / "clip.mp3", 6 + i, level=0.1).read_bytes()
        told = {
            "id": f"ZH_{i}",
            "wav": "x",
            "text": f"你好 {i}。",
            "duration": 1.0,
            "speaker": f"ZH_S{i % 2}",
            "language": "zh",
        }
        members |= {f"ZH/ZH_{i}.mp3": clip, f"ZH/ZH_{i}.json": json.dumps(told).encode()}
    first = write_tar(tmp_path / "zh-0.tar", members)
    clip = write_clip(tmp_path / "clip.flac", 9).read_bytes()
    codes = tmp_path / "codes.npy"
    np.save(codes, np.full((4, 32), 7, np.int16))
    second = write_tar(
        tmp_path / "zh-1.tar",
        {
            "a.flac": clip,
            "a.txt": b"wie geht's\n",
            "b.codes.npy": codes.read_bytes(),
            "b.flac": clip,
            "b.json": json.dumps({"text": "b", "speaker": 3}).encode(),
            "c.flac": clip,
            "d.json": b'{"text": 1}',
        },
    )
    manifest = tokenize([first, second], tmp_path / "out", skip_bad=True)
    examples = Shards(tmp_path / "out").read(range(8), facts=True)
    assert [e.facts["id"] for e in examples] == [*(f"ZH_{i}" for i in range(6)), "a", "b"]
    assert [e.facts.get("lang") for e in examples] == ["zh"] * 6 + [None] * 2
    assert examples[0].facts["texts"] == ["你好 0。"]
    assert examples[6].facts["texts"] == ["wie geht's"]
    assert [e.facts["speakers"] for e in examples] == [[0]] * 7 + [[3]]
    assert len(examples[6].turns[0].codes) == 9
    assert examples[7].turns[0].codes.tolist() == [[7] * 32] * 4
    assert manifest["counts"]["langs"] == {"": 2, "zh": 6}
    rejected = [
        json.loads(each) for each in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert {each["where"] for each in rejected} == {"zh-1.tar: c", "zh-1.tar: d"}


@pytest.mark.parametrize("cut", [100, 5_000])
def test_a_damaged_tar_is_told(tmp_path: Path, cut: int) -> None:
    clip = write_clip(tmp_path / "clip.wav", 9).read_bytes()
    path = write_tar(tmp_path / "x.tar", {"a.txt": b"a", "a.wav": clip})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises((ValueError, BadLinesError), match=r"cannot be read as a tar|is cut short"):
        tokenize(path, tmp_path / "out")


def test_records_are_what_readers_of_array_record_see(whole: Path) -> None:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with ArrayRecordDataSource(
        [str(path) for path in sorted(whole.glob("*.array_record"))]
    ) as all_:
        assert len(all_) == 40
        assert decode_record(all_[39]).facts["id"] == "c39"
