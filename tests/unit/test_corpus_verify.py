"""Verifying: every way a corpus can be damaged is found, and a whole one is not accused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csm_jax.corpus.files import sha256_of
from csm_jax.corpus.plan import Plan
from csm_jax.corpus.verify import Findings, verify
from tests.support.corpus import plan_of, some_rows, speak


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    made = plan_of([*some_rows(30), {"id": "x", "text": "fail"}], tmp_path, shard_minutes=0.3)
    speak(made)
    return made


def change_commit(plan: Plan, change: Callable[[dict[str, Any]], Any], shard: int = 1) -> None:
    path = plan.shard_dir / f"{plan.shards[shard].name}.json"
    found = json.loads(path.read_bytes())
    change(found)
    path.write_text(json.dumps(found))


def change_tar(
    plan: Plan, change: Callable[[list[tuple[str, bytes]]], Any], *, resign: bool = False
) -> None:
    """Writes the tar of shard 1 anew; `resign` also makes its hash that of the commit."""
    path = plan.shard_dir / f"{plan.shards[1].name}.tar"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if resign:
        change_commit(plan, lambda found: found["files"][path.name].update(sha256=sha256_of(path)))


def test_a_whole_corpus_is_fine(plan: Plan) -> None:
    found = verify(plan)
    assert found.ok
    assert found == Findings(rows=30, failed=1, seconds=found.seconds)
    assert found.seconds > 5


def test_missing_unfinished_and_extra(plan: Plan) -> None:
    directory = plan.shard_dir
    (directory / "shard-00001.json").unlink()
    (directory / ".shard-00000.tar.123abc.part").touch()
    for name in ("shard-99999.tar", "shard-00000.tar.bak", "notes.txt"):
        (directory / name).touch()
    found = verify(plan)
    assert found.missing == ["shard-00001"]
    assert found.unfinished == [".shard-00000.tar.123abc.part", "shard-00001.tar"]
    assert sorted(found.extra) == ["notes.txt", "shard-00000.tar.bak", "shard-99999.tar"]
    assert not found.corrupt
    assert not found.ok


def test_one_file_too_many_is_not_fine(plan: Plan) -> None:
    (plan.shard_dir / "shard-99999.tar").touch()
    found = verify(plan)
    assert found.extra == ["shard-99999.tar"]
    assert not found.ok


def test_unfinished_files_alone_are_fine(plan: Plan) -> None:
    (plan.shard_dir / ".shard-00000.tar.123abc.part").touch()
    assert verify(plan).ok


@pytest.mark.parametrize("at", [0, 0.3, 0.6, 0.99])
def test_any_changed_byte_is_found(plan: Plan, at: float) -> None:
    path = plan.shard_dir / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)
    assert "shard-00001: shard-00001.tar does not have the SHA-256" in verify(plan).corrupt[0]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda p: (p.shard_dir / "shard-00001.tar").unlink(), "shard-00001.tar is missing"),
        (lambda p: (p.shard_dir / "shard-00001.tar").write_bytes(b""), "SHA-256"),
        (lambda p: (p.shard_dir / "shard-00001.json").write_text("{"), "is damaged"),
        (lambda p: (p.shard_dir / "shard-00001.json").write_text("{}"), "it is no commit"),
        (lambda p: change_commit(p, lambda c: c.update(fingerprint="x")), "another corpus"),
        (lambda p: change_commit(p, lambda c: c["rows"].pop()), "rows are missing"),
        (lambda p: change_commit(p, lambda c: c.update(count=0)), "counts 0 rows"),
        (lambda p: change_commit(p, lambda c: c["rows"][0].update(id="z")), "not of the plan: z"),
        (lambda p: change_commit(p, lambda c: c["rows"][0].update(samples=1)), "samples at 24000"),
        (lambda p: change_commit(p, lambda c: c["rows"][0].update(seconds=1.5)), "not 1.5"),
        (lambda p: change_commit(p, lambda c: c.update(failed=5)), "tells of 5 failed rows"),
        (lambda p: change_commit(p, lambda c: c["rows"][0].pop("sha256")), "sha256"),
    ],
)
def test_damage(plan: Plan, damage: Callable[[Plan], Any], complaint: str) -> None:
    damage(plan)
    found = verify(plan)
    assert not found.ok
    assert complaint in "\n".join(found.corrupt)
    assert all(line.startswith("shard-00001: ") for line in found.corrupt)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.pop(), "ends before"),
        (lambda m: m.insert(0, m.pop()), "belongs"),
        (lambda m: m.append(m[0]), "which is not in its commit"),
        (lambda m: m.__setitem__(0, (m[0][0], m[0][1][:-1])), "does not have the SHA-256"),
    ],
)
def test_members_that_a_new_hash_of_the_tar_does_not_hide(
    plan: Plan, change: Callable[[Any], Any], complaint: str
) -> None:
    change_tar(plan, change, resign=True)
    (line,) = verify(plan).corrupt
    assert complaint in line


def test_audio_that_cannot_be_decoded(plan: Plan) -> None:
    import hashlib

    bad = b"fLaC" + bytes(100)
    change_tar(plan, lambda m: m.__setitem__(0, (m[0][0], bad)), resign=True)
    change_commit(
        plan, lambda c: c["rows"][0]["sha256"].update({".flac": hashlib.sha256(bad).hexdigest()})
    )
    (line,) = verify(plan).corrupt
    assert "cannot be decoded" in line


def test_a_row_that_is_there_twice(plan: Plan) -> None:
    def twice(commit: dict[str, Any]) -> None:
        commit["rows"].append(commit["rows"][0])
        commit["count"] += 1

    def again(members: list[tuple[str, bytes]]) -> None:
        members.extend(members[:3])

    change_commit(plan, twice)
    change_tar(plan, again, resign=True)
    found = verify(plan)
    assert len(found.duplicate) == 1
    assert not found.corrupt
    assert not found.ok


def test_a_row_both_spoken_and_failed(plan: Plan) -> None:
    errors = next(plan.shard_dir.glob("*.errors.jsonl"))
    index = int(errors.name[6:11])
    told = json.loads(errors.read_bytes())
    spoken = plan.read_rows(plan.shards[index])[0]["id"]
    errors.write_text(json.dumps({**told, "id": spoken}) + "\n")
    change_commit(
        plan, lambda c: c["files"][errors.name].update(sha256=sha256_of(errors)), shard=index
    )
    text = "\n".join(verify(plan).corrupt)
    assert "rows are missing: x" in text
    assert f"rows are spoken and failed: {spoken}" in text


def test_changed_rows_of_the_plan(plan: Plan) -> None:
    path = plan.directory / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b"row-001", b"row-999"))
    assert verify(plan).corrupt == ["rows.jsonl is not the one that was planned"]
