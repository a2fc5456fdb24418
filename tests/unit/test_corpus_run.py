"""Speaking a plan: what is committed, what fails, what is done again, and who may do it."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_jax.corpus.plan import Plan
from csm_jax.corpus.requests import RequestMaker
from csm_jax.corpus.run import Progress
from csm_jax.corpus.tasks import shards_of_task, task_of
from csm_jax.corpus.verify import verify
from tests.support.corpus import (
    FakeSynthesizer,
    Result,
    as_row,
    contents,
    plan_of,
    some_rows,
    speak,
)

ROOT = Path(__file__).resolve().parents[2]


def commits(plan: Plan) -> list[dict[str, Any]]:
    return [
        json.loads(path.read_bytes()) for path in sorted(plan.shard_dir.glob("shard-*[0-9].json"))
    ]


def test_a_shard_is_a_tar_without_times_or_owners(tmp_path: Path) -> None:
    plan = plan_of([{"id": "a.b", "text": "Hello there.", "lang": "en", "voice": "ann"}], tmp_path)
    outcome = speak(plan)
    assert (outcome.rows, outcome.failed, outcome.shards) == (1, 0, 1)
    with tarfile.open(plan.shard_dir / "shard-00000.tar") as tar:
        members = tar.getmembers()
        text = tar.extractfile("a%2Eb.json")
        assert text is not None
        told = json.loads(text.read())
    assert [m.name for m in members] == ["a%2Eb.flac", "a%2Eb.codes.npy", "a%2Eb.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    seed = told.pop("seed")
    assert 0 <= seed < 2**64
    assert told == {
        "id": "a.b",
        "line": 1,
        "text": "Hello there.",
        "speaker": 0,
        "voice": "ann",
        "extra": {"lang": "en"},
        "sample_rate": 24_000,
        "seconds": 0.16,
        "samples": 3840,
        "frames": 2,
        "finish_reason": "eos",
        "flags": [],
        "redraws": 0,
        "corpus": plan.fingerprint,
        "model": {"checkpoint": "m"},
        "watermark": True,
    }


def test_rows_stand_in_the_plans_order_whatever_order_they_come_in(tmp_path: Path) -> None:
    plan = plan_of(some_rows(60), tmp_path, shard_minutes=0.3)
    speak(plan, FakeSynthesizer(slots=16))
    for shard, commit in zip(plan.shards, commits(plan), strict=True):
        assert [row["id"] for row in commit["rows"]] == [row["id"] for row in plan.read_rows(shard)]
    assert verify(plan).ok


def test_the_bytes_do_not_depend_on_slots_or_executor(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, two = (plan_of(some_rows(60), tmp_path / name) for name in "ab")
    speak(one, FakeSynthesizer(slots=1))
    for task in range(3):
        speak(two, FakeSynthesizer(slots=9), shards=shards_of_task(task, 3, len(two.shards)))
    assert {k: v for k, v in contents(one.directory).items() if k != "plan.json"} == {
        k: v for k, v in contents(two.directory).items() if k != "plan.json"
    }


def test_failed_rows_are_listed_and_stop_nothing(tmp_path: Path) -> None:
    rows = [*some_rows(10), {"id": "x", "text": "fail"}, {"id": "y", "text": "nothing"}]
    plan = plan_of(rows, tmp_path, shard_minutes=60)
    outcome = speak(plan)
    assert (outcome.rows, outcome.failed, outcome.flagged) == (10, 2, 1)
    lines = (plan.shard_dir / "shard-00000.errors.jsonl").read_text().splitlines()
    assert {found["id"]: found["error"] for found in map(json.loads, lines)} == {
        "x": "it would not",
        "y": "the model ended at once, without audio; another seed may speak",
    }
    (commit,) = commits(plan)
    assert commit["count"] == 10
    assert commit["failed"] == 2
    assert commit["finish_reasons"] == {"eos": 10}
    assert commit["flagged"] == ["row-003"]
    assert verify(plan).failed == 2


class Odd(FakeSynthesizer):
    """Gives NaN, samples out of range, and cancelled rows."""

    def speak(self, row_id: Hashable, row: dict[str, Any]) -> Result:
        result = super().speak(row_id, row)
        audio = {
            "nan": np.full(1920, np.nan, np.float32),
            "loud": np.full(1920, 30_000, np.float32),
            "clip": np.full(1920, 1.5, np.float32),
        }.get(row["text"], result.audio)
        reason = "cancelled" if row["text"] == "stop" else "eos"
        return Result(id=row_id, audio=audio, codes=result.codes, finish_reason=reason)


def test_audio_that_is_none_is_a_failed_row(tmp_path: Path) -> None:
    plan = plan_of(
        [{"text": text} for text in ("nan", "loud", "clip", "stop")], tmp_path, shard_minutes=60
    )
    assert speak(plan, Odd()).failed == 3
    (commit,) = commits(plan)
    assert sorted(error[:20] for error in commit["errors"]) == [
        "it was cancelled",
        "the audio has a peak",
        "the audio holds 1,92",
    ]
    assert verify(plan).ok


def test_a_row_that_cannot_be_prepared_fails_alone(tmp_path: Path) -> None:
    def prepare(row: dict[str, Any]) -> Any:
        if row["id"] == "row-004":
            raise FileNotFoundError("no audio file at x.wav")
        return as_row(row)

    from csm_jax.corpus.run import run_shards

    plan = plan_of(some_rows(9), tmp_path)
    outcome = run_shards(plan, range(len(plan.shards)), FakeSynthesizer, prepare)
    assert (outcome.rows, outcome.failed) == (8, 1)
    assert {"no audio file at x.wav": 1} in [commit["errors"] for commit in commits(plan)]


def test_a_corpus_of_failures_alone_ends(tmp_path: Path) -> None:
    def prepare(row: dict[str, Any]) -> Any:
        raise ValueError("no")

    from csm_jax.corpus.run import run_shards

    plan = plan_of(some_rows(40), tmp_path)
    assert run_shards(plan, range(len(plan.shards)), FakeSynthesizer, prepare).failed == 40
    assert verify(plan).ok


# --- going on ----------------------------------------------------------------------------------


class Stops(FakeSynthesizer):
    def __init__(self, after: int, error: BaseException):
        super().__init__()
        self.after, self.error = after, error

    def speak(self, row_id: Hashable, row: dict[str, Any]) -> Result:
        if len(self.spoken) > self.after:
            raise self.error
        return super().speak(row_id, row)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device lost")])
def test_what_is_committed_stays_and_is_not_done_again(tmp_path: Path, error: Any) -> None:
    plan = plan_of(some_rows(60), tmp_path)
    with pytest.raises(type(error)):
        speak(plan, Stops(30, error))
    before = commits(plan)
    assert 0 < len(before) < len(plan.shards)
    assert not list(plan.shard_dir.glob(".*"))
    done = {row["id"] for commit in before for row in commit["rows"]}
    again = FakeSynthesizer()
    outcome = speak(plan, again)
    assert outcome.committed_before == len(before)
    assert done.isdisjoint(again.spoken)
    assert len(again.spoken) == 60 - len(done)
    assert verify(plan).ok
    third = FakeSynthesizer()
    assert speak(plan, third).rows == 60
    assert third.spoken == []


def test_leftovers_go_and_a_shard_whose_tar_is_gone_is_done_again(tmp_path: Path) -> None:
    plan = plan_of(some_rows(40), tmp_path)
    speak(plan)
    whole = contents(plan.directory)
    names = [shard.name for shard in plan.shards]
    (plan.shard_dir / f"{names[0]}.json").unlink()
    (plan.shard_dir / f".{names[0]}.tar.abc123.part").write_bytes(b"half")
    (plan.shard_dir / f"{names[0]}.errors.jsonl").write_bytes(b"stale")
    (plan.shard_dir / f"{names[1]}.tar").unlink()
    (plan.shard_dir / f"{names[2]}.tar").write_bytes(b"short")
    again = FakeSynthesizer()
    assert speak(plan, again).committed_before == len(names) - 3
    assert len(again.spoken) == sum(shard.rows for shard in plan.shards[:3])
    assert contents(plan.directory) == whole


def test_a_damaged_or_foreign_commit_is_refused(tmp_path: Path) -> None:
    plan = plan_of(some_rows(20), tmp_path)
    speak(plan)
    path = plan.shard_dir / "shard-00001.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"shard-00001\.json is damaged"):
        speak(plan)
    path.write_text(text.replace(plan.fingerprint, "0" * 64))
    with pytest.raises(ValueError, match="another corpus"):
        speak(plan)


def test_failed_rows_are_tried_again_only_when_asked(tmp_path: Path) -> None:
    plan = plan_of([*some_rows(20), {"id": "x", "text": "fail"}], tmp_path)
    speak(plan)

    class Better(FakeSynthesizer):
        def speak(self, row_id: Hashable, row: dict[str, Any]) -> Result:
            return super().speak(row_id, {**row, "text": row["text"].replace("fail", "well")})

    assert speak(plan, Better()).failed == 1
    better = Better()
    assert speak(plan, better, retry_failed=True).failed == 0
    assert "x" in better.spoken
    assert len(better.spoken) < 10
    assert not list(plan.shard_dir.glob("*.errors.jsonl"))
    assert verify(plan).ok


# --- the stream of rows ------------------------------------------------------------------------


def test_slots_stay_full_across_the_ends_of_shards(tmp_path: Path) -> None:
    plan = plan_of(some_rows(60), tmp_path, shard_minutes=0.3)
    held = []

    class Watched(FakeSynthesizer):
        def run(self, requests: Iterable[tuple[Hashable, Any]]) -> Iterator[Result]:
            def counted() -> Iterator[tuple[Hashable, Any]]:
                for taken in requests:
                    held.append(len(held) - len(self.spoken))
                    yield taken

            return super().run(counted())

    speak(plan, Watched(slots=4))
    assert len(plan.shards) > 4
    assert all(count == 3 for count in held[4:-4])


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_no_more_shards_are_begun_than_allowed(tmp_path: Path, in_flight: int) -> None:
    plan = plan_of(some_rows(60), tmp_path)
    open_now: set[int] = set()
    left = {shard.index: shard.rows for shard in plan.shards}
    most = 0

    class Straggles(FakeSynthesizer):
        """Keeps the first row it holds until the others are done."""

        def run(self, requests: Iterable[tuple[Hashable, Any]]) -> Iterator[Result]:
            nonlocal most
            held: list[Any] = []
            todo = iter(requests)
            while True:
                while len(held) < 8 and (taken := next(todo, None)) is not None:
                    held.append(taken)
                    open_now.add(taken[0][0])
                    most = max(most, len(open_now))
                if not held:
                    return
                row_id, row = held.pop()
                left[row_id[0]] -= 1
                if not left[row_id[0]]:
                    open_now.remove(row_id[0])
                yield self.speak(row_id, row)

    outcome = speak(plan, Straggles(), shards_in_flight=in_flight)
    assert outcome.rows == 60
    assert most == in_flight


def test_a_synthesizer_that_forgets_or_repeats_rows_is_an_error(tmp_path: Path) -> None:
    class Forgets(FakeSynthesizer):
        def run(self, requests: Iterable[tuple[Hashable, Any]]) -> Iterator[Result]:
            return (r for r in super().run(requests) if r.id != (1, 0))

    class Repeats(FakeSynthesizer):
        def run(self, requests: Iterable[tuple[Hashable, Any]]) -> Iterator[Result]:
            for result in super().run(requests):
                yield result
                yield result

    plan = plan_of(some_rows(40), tmp_path)
    with pytest.raises(RuntimeError, match=r"without an answer for rows of {'shard-00001': 1"):
        speak(plan, Forgets())
    with pytest.raises(RuntimeError, match="answered twice"):
        speak(plan, Repeats())
    speak(plan)
    assert verify(plan).ok


def test_progress_adds_up(tmp_path: Path) -> None:
    plan = plan_of([*some_rows(30), {"text": "fail"}], tmp_path)
    seen: list[tuple[int, float]] = []
    last: list[Progress] = []

    def watch(state: Progress) -> None:
        seen.append((state.done_rows, state.done_planned_s))
        last[:] = [state]

    outcome = speak(plan, on_progress=watch)
    assert [done for done, _ in seen] == list(range(1, 32))
    assert seen[-1][1] == pytest.approx(plan.seconds)
    assert last[0].seconds == pytest.approx(outcome.seconds)
    assert last[0].done_shards == last[0].shards == len(plan.shards)
    assert (last[0].failed, last[0].flagged, last[0].slot_use) == (1, 3, 0.9)


def test_nothing_is_loaded_when_nothing_is_left(tmp_path: Path) -> None:
    from csm_jax.corpus.run import run_shards

    plan = plan_of(some_rows(5), tmp_path)
    speak(plan)

    def never() -> FakeSynthesizer:
        raise AssertionError("loaded")

    assert run_shards(plan, [0], never, as_row).shards == 1
    with pytest.raises(ValueError, match="counted from 0"):
        run_shards(plan, [99], never, as_row)


# --- several processes -------------------------------------------------------------------------


def start(plan: Plan, delay_s: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.corpus", str(plan.directory), str(delay_s)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


def wait_for_a_commit(plan: Plan) -> None:
    for _ in range(600):
        if list(plan.shard_dir.glob("shard-*[0-9].json")):
            return
        time.sleep(0.02)
    raise AssertionError("nothing is committed")


def test_two_processes_share_a_directory_but_no_shard(tmp_path: Path) -> None:
    plan = plan_of(some_rows(60), tmp_path)
    other = start(plan, 0.05)
    try:
        wait_for_a_commit(plan)
        before = contents(plan.shard_dir)
        with pytest.raises(BlockingIOError, match="another process is at work on shards of"):
            speak(plan)
        assert before.items() <= contents(plan.shard_dir).items()
    finally:
        other.kill()
        other.communicate()
    assert speak(plan).rows == 60
    assert verify(plan).ok


def test_where_there_are_no_locks_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    plan = plan_of(some_rows(5), tmp_path)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert speak(plan).rows == 5
    assert "has no locks" in caplog.text


def test_ctrl_c_leaves_what_is_committed_and_no_part(tmp_path: Path) -> None:
    plan = plan_of(some_rows(60), tmp_path)
    other = start(plan, 0.02)
    try:
        wait_for_a_commit(plan)
        other.send_signal(signal.SIGINT)
        _, err = other.communicate(timeout=30)
    finally:
        other.kill()
        other.communicate()
    assert other.returncode == -signal.SIGINT
    assert err.rstrip().endswith(b"KeyboardInterrupt")
    assert not list(plan.shard_dir.glob(".*"))
    done = commits(plan)
    assert 0 < len(done) < len(plan.shards)
    assert speak(plan).committed_before == len(done)
    assert verify(plan).ok


def test_importing_it_needs_no_jax() -> None:
    code = "import sys, tests.support.corpus; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_thread_is_left(tmp_path: Path) -> None:
    speak(plan_of(some_rows(5), tmp_path))
    assert not [t.name for t in threading.enumerate() if t.name.startswith("corpus")]


# --- tasks -------------------------------------------------------------------------------------


def slurm(**numbers: int) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("environment", "tasks", "expected"),
    [
        (slurm(ID=3, MIN=0, MAX=9, STEP=1, COUNT=10), None, (3, 10)),
        (slurm(ID=3, MIN=1, MAX=10, STEP=1, COUNT=10), None, (2, 10)),
        (slurm(ID=8, MIN=0, MAX=8, STEP=4, COUNT=3), None, (2, 3)),
        (slurm(ID=7, MIN=3, MAX=7, STEP=1, COUNT=2), 10, (7, 10)),
        ({"JOB_COMPLETION_INDEX": "4"}, 5, (4, 5)),
    ],
)
def test_tasks(environment: dict[str, str], tasks: int | None, expected: tuple[int, int]) -> None:
    assert task_of(environment, tasks) == expected


@pytest.mark.parametrize(
    ("environment", "tasks", "complaint"),
    [
        ({}, None, "runs in an array job"),
        (slurm(ID=7, MIN=3, MAX=7, STEP=1, COUNT=2), None, "have gaps"),
        (slurm(ID=7), None, "SLURM_ARRAY_TASK_MIN must be a whole number"),
        ({"JOB_COMPLETION_INDEX": "4"}, None, "give --tasks N"),
        ({"JOB_COMPLETION_INDEX": "5"}, 5, "is not one of --tasks 5"),
        ({"JOB_COMPLETION_INDEX": "x"}, 5, "must be a whole number"),
    ],
)
def test_bad_tasks(environment: dict[str, str], tasks: int | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        task_of(environment, tasks)


def test_tasks_share_all_shards_between_them() -> None:
    for tasks in (1, 3, 10, 40):
        shares = [shards_of_task(task, tasks, 17) for task in range(tasks)]
        assert sorted(shard for share in shares for shard in share) == list(range(17))


# --- requests ----------------------------------------------------------------------------------


def test_requests_are_made_of_rows(tmp_path: Path) -> None:
    from csm_jax.audio import write_audio

    write_audio(tmp_path / "ann.wav", np.full(4800, 0.1, np.float32), 24_000)
    make = RequestMaker(base=tmp_path, seed=3, voices={}, defaults={"temperature": 0.5, "topk": 10})
    row = {
        "id": "a",
        "line": 1,
        "text": "Hello.",
        "speaker": 2,
        "topk": 7,
        "context": [{"audio": "ann.wav", "text": "Hers.", "speaker": 4}],
    }
    request, heard = make(row)
    assert (request.text, request.speaker) == ("Hello.", 2)
    assert (request.temperature, request.topk) == (0.5, 7)
    assert (request.context[0].speaker, request.context[0].text) == (4, "Hers.")
    assert len(request.context[0].audio) == 4800
    assert len(heard) == 1
    assert len(heard[0]) == 64
    row["context"][0]["audio"] = "gone.wav"  # type: ignore[index]
    with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
        make(row)
