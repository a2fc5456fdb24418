"""Manifests and plans: what a row may be, what is refused, and that the order is the rows' alone."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csm_jax.corpus.files import Locks
from csm_jax.corpus.manifest import MAX_LINE_BYTES, key_of, parse_json, parse_seed_tts
from csm_jax.corpus.plan import REJECTED, make_plan, read_plan, row_seed
from tests.support.corpus import IDENTITY, plan_of, some_rows, write_manifest

ROOT = Path(__file__).resolve().parents[2]


def row(**keys: Any) -> bytes:
    return json.dumps({"text": "Hello.", **keys}).encode()


def test_a_row_of_all_keys() -> None:
    found = parse_json(
        row(
            id=12,
            speaker=3,
            seed=2**64 - 1,
            voice="ann",
            context=[{"audio": "a.wav", "text": "A."}],
            context_audio_filepath="b.wav",
            context_audio_text="B.",
            duration=3,
            temperature=0,
            topk=5,
            audio_filepath="of-this-text.wav",
            normalized_text="hello",
            lang="en",
        ),
        7,
    )
    assert found == {
        "id": "12",
        "line": 7,
        "text": "Hello.",
        "speaker": 3,
        "seed": 2**64 - 1,
        "voice": "ann",
        "context": [
            {"audio": "a.wav", "text": "A.", "speaker": 3},
            {"audio": "b.wav", "text": "B.", "speaker": 3},
        ],
        "duration": 3,
        "temperature": 0,
        "topk": 5,
        "extra": {
            "audio_filepath": "of-this-text.wav",
            "normalized_text": "hello",
            "lang": "en",
        },
    }


def test_a_row_of_text_alone_gets_an_id_from_its_line() -> None:
    assert parse_json(row(), 7) == {
        "id": "line-000000007",
        "line": 7,
        "text": "Hello.",
        "speaker": 0,
    }


def test_a_byte_order_mark_is_skipped_on_the_first_line() -> None:
    assert parse_json(b"\xef\xbb\xbf" + row(), 1)["text"] == "Hello."


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"\xff" + row(), "not UTF-8 text: byte 0xFF at position 0"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be a JSON object, got list"),
        (b"{}", "has no text"),
        (row(text=None), "text must be a string"),
        (row(text=""), "text is empty"),
        (row(text=" \n"), "text is empty"),
        (row(text="\x00"), "control character U+0000"),
        (b'{"text": "\\ud800"}', "surrogate U+D800"),
        (row(speaker="5"), "speaker must be a whole number"),
        (row(speaker=True), "speaker must be a whole number"),
        (row(speaker=-1), "speaker must be a whole number"),
        (row(id=""), "id must be a string of visible"),
        (row(id="a\nb"), "id must be a string of visible"),
        (row(id=1.5), "id must be a string of visible"),
        (row(id="x" * 201), "id is 201 bytes"),
        (row(id="ä" * 40), "id is 240 bytes"),
        (row(seed=-1), "seed must be"),
        (row(seed=2**64), "seed must be"),
        (row(voice=3), "voice must be a name"),
        (row(temperature=float("nan")), "NaN is not a number"),
        (row(duration=float("inf")), "Infinity is not a number"),
        (b'{"text": "a", "duration": 1e999}', "duration is out of range"),
        (b'{"text": "a", "topk": 1' + b"0" * 400 + b"}", "topk is out of range"),
        (b'{"text": "a", "topk": 1' + b"0" * 9000 + b"}", "digits"),
        (b'{"text": "a", "x": "\\ud800"}', "cannot be kept"),
        (b'{"text": "a", "x": 1e999}', "cannot be kept"),
        (row(duration=-1), "duration must be 0 or more"),
        (row(duration="3"), "duration must be a number"),
        (row(topk=1.0), "topk must be a whole number"),
        (row(temperature=True), "temperature must be a number"),
        (row(context_audio_filepath="a.wav"), "a recording needs its transcript"),
        (row(context_audio_text="A."), "go together"),
        (row(context="a.wav"), "context must be a list"),
        (row(context=["a.wav"]), "context[0] must be"),
        (row(context=[{"audio": "a", "text": "A.", "who": 1}]), "context[0] must be"),
        (row(context=[{"audio": "", "text": "A."}]), "audio must be a path"),
        (row(context=[{"audio": "a\x00b", "text": "A."}]), "audio must be a path"),
        (row(context=[{"audio": "a", "text": ""}]), "context[0]: text is empty"),
        (row(context=[{"audio": "a", "text": "A.", "speaker": "x"}]), "context[0]: speaker"),
    ],
)
def test_bad_rows(line: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(line, 2)
    assert complaint in str(caught.value)


def test_seed_tts() -> None:
    found = parse_seed_tts(b"utt-1|Prompt words.|p/a.wav|Say this.", 1)
    assert found["id"] == "utt-1"
    assert found["text"] == "Say this."
    assert found["context"] == [{"audio": "p/a.wav", "text": "Prompt words.", "speaker": 0}]
    assert parse_seed_tts(b"u|P.|a.wav|T.|real.wav", 1)["extra"] == {"audio_filepath": "real.wav"}
    with pytest.raises(ValueError, match="got 2 fields"):
        parse_seed_tts(b"u|text", 1)


@pytest.mark.parametrize(
    ("row_id", "key"),
    [("abc_D-9", "abc_D-9"), ("a.b/c", "a%2Eb%2Fc"), ("a%2Eb", "a%252Eb"), ("ä", "%C3%A4")],
)
def test_keys_are_file_names_that_differ_where_ids_do(row_id: str, key: str) -> None:
    assert key_of(row_id) == key


# --- plans -------------------------------------------------------------------------------------


def rejected(directory: Path) -> dict[int, str]:
    lines = (directory / REJECTED).read_text(encoding="utf-8").splitlines()
    return {found["line"]: found["error"] for found in map(json.loads, lines)}


def test_bad_rows_are_listed_and_the_others_planned(tmp_path: Path) -> None:
    (tmp_path / "there.wav").write_bytes(b"")
    rows = [
        row(id="a"),
        b"\xff",
        row(text="x" * 1_000_000),
        row(id="a", text="Again."),
        b"",
        row(id="b", context_audio_filepath="gone.wav", context_audio_text="A."),
        row(id="c", context_audio_filepath="there.wav", context_audio_text="A."),
        row(id="d", voice="nobody"),
        row(id="a", text="And again."),
        row(),
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(b"\r\n".join(rows))  # the last line without an end
    plan = make_plan(
        manifest, tmp_path / "out", identity=IDENTITY, launch={}, seed=0, shard_minutes=60
    )
    found = rejected(tmp_path / "out")
    assert {line: error.split(":")[0] for line, error in found.items()} == {
        2: "not UTF-8 text",
        3: f"the line has 1,000,014 bytes; at most {MAX_LINE_BYTES:,} are read",
        4: "this id was given before, on line 1",
        6: f"no recording at {tmp_path}/gone.wav",
        8: "no voice 'nobody'; known are ann, bob",
        9: "this id was given before, on line 1",
    }
    assert (plan.rows, plan.rejected) == (3, 6)
    assert {r["id"] for r in plan.read_rows(plan.shards[0])} == {"a", "c", "line-000000010"}


def test_strict_refuses_and_leaves_no_plan(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"text": "a"}, {"text": ""}])
    kwargs: dict[str, Any] = {
        "identity": IDENTITY,
        "launch": {},
        "seed": 0,
        "shard_minutes": 60,
    }
    with pytest.raises(ValueError, match="1 bad rows; line 2: text is empty"):
        make_plan(manifest, tmp_path / "out", strict=True, **kwargs)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["lock", "shards"]
    assert make_plan(manifest, tmp_path / "out", **kwargs).rows == 1


def test_a_manifest_without_a_good_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no good row; line 1: text is empty"):
        plan_of([{"text": ""}], tmp_path)
    with pytest.raises(FileNotFoundError, match="no corpus is planned"):
        read_plan(tmp_path / "corpus")


def test_shards_hold_half_to_all_of_the_audio_and_every_row_once(tmp_path: Path) -> None:
    rows = [{"text": "x", "duration": 1 + i * 7919 % 30, "id": i} for i in range(3000)]
    plan = plan_of(rows, tmp_path, shard_minutes=60)
    assert len(plan.shards) == 13
    assert all(30 * 60 <= shard.seconds <= 60 * 60 + 31 for shard in plan.shards)
    ids = [r["id"] for shard in plan.shards for r in plan.read_rows(shard)]
    assert sorted(ids, key=int) == [str(i) for i in range(3000)]
    lengths = [r["duration"] for shard in plan.shards for r in plan.read_rows(shard)]
    assert all(later <= 1.42 * before for before, later in itertools.pairwise(lengths))


def test_rows_of_one_length_lie_together_by_voice(tmp_path: Path) -> None:
    rows = [{"text": "x", "duration": 10, "voice": ("ann", "bob")[i % 2]} for i in range(40)]
    (shard,) = (plan := plan_of(rows, tmp_path, shard_minutes=60)).shards
    voices = [r["voice"] for r in plan.read_rows(shard)]
    assert sum(a != b for a, b in itertools.pairwise(voices)) == 1


def test_a_plan_is_made_once_and_the_same_everywhere(tmp_path: Path) -> None:
    for where in (tmp_path / "a", tmp_path / "b"):
        where.mkdir()
    first, second = (plan_of(some_rows(200), tmp_path / name) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert first.shards == second.shards
    assert (first.directory / "rows.jsonl").read_bytes() == (
        second.directory / "rows.jsonl"
    ).read_bytes()
    before = (first.directory / "plan.json").stat().st_mtime_ns
    assert plan_of(some_rows(200), tmp_path / "a") == first
    assert (first.directory / "plan.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "different"),
    [
        (lambda where: plan_of(some_rows(201), where), "manifest"),
        (
            lambda where: plan_of(some_rows(200), where, model={"checkpoint": "n"}),
            "model.checkpoint",
        ),
        (lambda where: plan_of(some_rows(200), where, tokenizer="other"), "tokenizer"),
        (
            lambda where: plan_of(some_rows(200), where, voices={"ann": "v9", "bob": "v2"}),
            "voices.ann",
        ),
        (lambda where: plan_of(some_rows(200), where, voices={"ann": "v1"}), "voices.bob"),
        (
            lambda where: plan_of(some_rows(200), where, options={"watermark": False}),
            "options.watermark",
        ),
        (lambda where: plan_of(some_rows(200), where, shard_minutes=1.0), "shard_minutes"),
    ],
)
def test_another_corpus_in_the_same_directory_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], different: str
) -> None:
    plan_of(some_rows(200), tmp_path)
    with pytest.raises(ValueError, match=f"different are {different};"):
        change(tmp_path)


def test_a_voice_that_no_row_uses_changes_nothing(tmp_path: Path) -> None:
    plan = plan_of(some_rows(10), tmp_path)
    voices = {**IDENTITY["voices"], "carl": "v3"}
    assert plan_of(some_rows(10), tmp_path, voices=voices) == plan


def test_an_edited_plan_is_refused(tmp_path: Path) -> None:
    path = plan_of(some_rows(10), tmp_path).directory / "plan.json"
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(ValueError, match="it was edited"):
        read_plan(path.parent)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be used"):
        read_plan(path.parent)


def test_seeds_are_the_rows_own_or_of_corpus_and_id() -> None:
    assert row_seed(1, {"id": "a", "seed": 5}) == 5
    seeds = {row_seed(seed, {"id": name}) for seed in (1, 2, 11) for name in ("a", "b", "1")}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert row_seed(7, {"id": "row-000"}) == 4585902167761237771  # never to change


def test_a_plan_waits_for_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    code = (
        "import sys; from pathlib import Path; from csm_jax.corpus.files import Locks\n"
        "locks = Locks(Path(sys.argv[1])); locks.take([0]); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "corpus" / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="another process is at work"):
            plan_of(some_rows(10), tmp_path)
        other.communicate()
    with Locks(tmp_path / "corpus" / "lock") as locks:
        locks.take([0])
    assert plan_of(some_rows(10), tmp_path).rows == 10


_MEASURED = r"""
import json, re, sys, time
from pathlib import Path
from csm_jax.corpus.plan import make_plan
identity = {"model": "m", "tokenizer": "t", "voices": {}, "options": {}}
started = time.perf_counter()
plan = make_plan(Path(sys.argv[1]), Path(sys.argv[2]), identity=identity, launch={}, seed=0, shard_minutes=60)
# Not getrusage, whose peak is also that of the process that started this one.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps([time.perf_counter() - started, peak / 1024, plan.rows]))
"""


def measure(tmp_path: Path, count: int) -> tuple[float, float]:
    manifest = tmp_path / "m.jsonl"
    with manifest.open("w") as file:
        for i in range(count):
            words = "word " * (3 + i * 7919 % 28)
            file.write(f'{{"id": "utt-{i:08d}", "text": "{words}end.", "speaker": {i % 4}}}\n')
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(manifest), str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    seconds, megabytes, rows = json.loads(done.stdout)
    assert rows == count
    print(f"{count:,} rows planned in {seconds:.1f} s, peak {megabytes:.0f} MB")
    return seconds, megabytes


def test_planning_costs_little_per_row(tmp_path: Path) -> None:
    seconds, megabytes = measure(tmp_path, 20_000)
    assert seconds < 4  # 0.3 on an idle machine
    assert megabytes < 200


@pytest.mark.slow
def test_a_million_rows_are_planned_in_20_s_and_500_mb(tmp_path: Path) -> None:
    seconds, megabytes = measure(tmp_path, 1_000_000)
    assert seconds <= 20
    assert megabytes <= 500
