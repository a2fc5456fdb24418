"""Whatever stops a run, and wherever: nothing committed is wrong, and going on makes the same bytes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csm_jax.corpus import files
from csm_jax.corpus.plan import Plan, read_plan
from csm_jax.corpus.verify import verify
from tests.support.corpus import contents, plan_of, some_rows, speak

ROOT = Path(__file__).resolve().parents[2]

_CALLS = ("open", "write", "fsync", "replace", "close")


class FaultyOs:
    """`os`, of which the n-th call that changes files fails, and with a full disk all after it."""

    def __init__(self, at: int | None, code: int, sticks: bool):
        self.at, self.code, self.sticks = at, code, sticks
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in _CALLS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            count = len(self.calls) - 1
            if name == "close":  # closes and may report an earlier error, but never fails to close
                real(*args, **kwargs)
            # A full disk stays full, and still lets files be named, synced and closed.
            later = self.sticks and self.at is not None and count > self.at
            if count == self.at or (later and name in ("open", "write")):
                raise OSError(self.code, os.strerror(self.code))
            if name == "write" and self.at is None:  # a short write is none of an error
                return real(args[0], args[1][: max(1, len(args[1]) // 2)])
            return None if name == "close" else real(*args, **kwargs)

        return call


def corpus(where: Path) -> Plan:
    rows = [*some_rows(6), {"id": "x", "text": "fail"}]
    return plan_of(rows, where, shard_minutes=0.15)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[dict[str, bytes], int, int]:
    """What an uninterrupted run leaves, and how many calls planning and running take."""
    (tmp_path / "whole").mkdir()
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        planning = FaultyOs(None, 0, False)
        patched.setattr(files, "os", planning)
        plan = corpus(tmp_path / "whole")
        running = FaultyOs(None, 0, False)
        patched.setattr(files, "os", running)
        speak(plan)
    assert {"open", "write", "fsync", "replace"} <= set(running.calls)
    return contents(plan.shard_dir), len(planning.calls), len(running.calls)


def committed_shards_verify(plan: Plan) -> None:
    found = verify(plan)
    assert [*found.corrupt, *found.extra, *found.duplicate] == []


def test_files_are_synced_before_they_are_named_and_directories_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = corpus(tmp_path)
    watched = FaultyOs(None, 0, False)
    with monkeypatch.context() as patched:
        patched.setattr(files, "os", watched)
        speak(plan)
    steps = [name for name in watched.calls if name in ("fsync", "replace")]
    # Per shard the tar, the errors where there are any, then the commit by itself.
    plain = ["fsync", "replace", "fsync", "fsync", "replace", "fsync"]
    failed = ["fsync", "fsync", "replace", "replace", "fsync", "fsync", "replace", "fsync"]
    whole = plain * (len(plan.shards) - 1)
    expected = [whole[: 6 * n] + failed + whole[6 * n :] for n in range(len(plan.shards))]
    assert steps in expected


def error_of(call: Callable[[], Any]) -> OSError | None:
    try:
        call()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_call_leaves_nothing_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[dict[str, bytes], int, int],
    code: int,
) -> None:
    expected, _, calls = whole
    stopped = 0
    # The counted run writes half of everything at a time, so this ends before its count.
    for at in range(calls):
        where = tmp_path / f"at-{at}"
        where.mkdir()
        plan = corpus(where)
        with monkeypatch.context() as patched:
            faulty = FaultyOs(at, code, sticks=code == errno.ENOSPC)
            patched.setattr(files, "os", faulty)
            error = error_of(lambda plan=plan: speak(plan))
        if error is not None:
            stopped += 1
            assert error.errno == code
            assert str(where) in str(error) or faulty.calls[at] in ("open", "close")
        committed_shards_verify(plan)
        if faulty.calls[at : at + 1] != ["close"]:
            assert not list(plan.shard_dir.glob(".*"))
        speak(plan)
        assert verify(plan).ok
        assert contents(plan.shard_dir) == expected
        if len(faulty.calls) <= at:
            break
    assert stopped > 15


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_while_planning_leaves_no_plan_or_a_good_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[dict[str, bytes], int, int],
    code: int,
) -> None:
    expected, calls, _ = whole
    for at in range(calls):
        where = tmp_path / f"at-{at}"
        where.mkdir()
        with monkeypatch.context() as patched:
            faulty = FaultyOs(at, code, sticks=code == errno.ENOSPC)
            patched.setattr(files, "os", faulty)
            error = error_of(lambda where=where: corpus(where))
        assert error is None or error.errno == code
        if (where / "corpus" / "plan.json").exists():
            read_plan(where / "corpus")
        plan = corpus(where)
        names = {path.name for path in plan.directory.iterdir()}
        assert names == {"lock", "plan.json", "rejected.jsonl", "rows.jsonl", "shards"}
        speak(plan)
        assert contents(plan.shard_dir) == expected


# --- killed ------------------------------------------------------------------------------------


def start(plan: Plan) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.corpus", str(plan.directory), "0.002"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()  # it is about to begin
    return process


def kill_again_and_again(where: Path, *, kills: int, rows: int) -> None:
    for name in ("whole", "killed"):
        (where / name).mkdir()
    whole = plan_of(some_rows(rows), where / "whole", shard_minutes=0.2)
    speak(whole)
    expected = contents(whole.shard_dir)

    dice = random.Random(7)
    plan = plan_of(some_rows(rows), where / "killed", shard_minutes=0.2)
    killed = completed = kept = leftovers = 0
    while killed < kills or not completed:
        process = start(plan)
        wait_until = time.monotonic() + dice.uniform(0, 0.2)
        while time.monotonic() < wait_until and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        _, err = process.communicate()
        assert process.returncode in (0, -9), err.decode()
        found = verify(plan)
        assert [*found.corrupt, *found.extra, *found.duplicate] == []
        if process.returncode:
            killed += 1
            kept += len(plan.shards) - len(found.missing)
            leftovers += len(found.unfinished)
            continue
        assert found.ok
        assert found.rows == rows
        assert contents(plan.shard_dir) == expected  # and nothing else is there
        completed += 1
        for path in plan.shard_dir.iterdir():
            path.unlink()
    assert kept
    assert completed < killed
    print(
        f"{killed} kills, {completed} corpora completed, each identical; {kept} commits of killed "
        f"runs stayed, {leftovers} files without one went"
    )


def test_killed_at_20_instants(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, kills=20, rows=200)


@pytest.mark.slow
def test_killed_at_200_instants(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, kills=200, rows=200)
