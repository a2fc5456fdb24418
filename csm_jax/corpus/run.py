"""Speaks the shards of a plan that are not committed, one stream of rows through all of them.

    rows ─prepare (threads)─▶ synthesizer ─▶ encode (threads) ─▶ commit (one thread)

Rows of the next shard follow those of the last without a gap, so that slots stay full across a
shard's end. A shard is committed when its last row is done, in whatever order rows come.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from csm_jax.config import SAMPLE_RATE
from csm_jax.corpus.files import Locks
from csm_jax.corpus.manifest import Row
from csm_jax.corpus.plan import LOCK, Plan, ShardPlan, row_seed
from csm_jax.corpus.shard import (
    Failed,
    Spoken,
    commit,
    encode_row,
    files_by_shard,
    is_whole,
    read_commit,
    withdraw,
)

logger = logging.getLogger(__name__)

_PREPARED_AHEAD = 64
_THREADS = 4

Prepare = Callable[[Row], tuple[Any, Sequence[str]]]
"""Makes a row a request, with the SHA-256 of the recordings in it; ValueError or OSError if it cannot."""


@runtime_checkable  # the tests check annotations at run time
class Synthesizer(Protocol):
    """What speaks; `csm_jax.synthesizer.Synthesizer` is one."""

    def run(self, requests: Iterable[tuple[Hashable, Any]]) -> Iterator[Any]:
        """Yields results in order of completion, taking requests only a few ahead."""
        ...

    def slot_use(self) -> float:
        """Returns the share of slot-frames that were valid, so far."""
        ...


@dataclass(kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        shards: To be spoken by this run.
        rows: In them.
        planned_s: Estimated audio of them.
        done_shards: Committed by now.
        done_rows: Spoken or failed by now.
        failed: Of them.
        flagged: Of them.
        done_planned_s: Estimated audio of the rows that are done.
        seconds: Audio spoken.
        slot_use: Of the synthesizer.
    """

    shards: int
    rows: int
    planned_s: float
    done_shards: int = 0
    done_rows: int = 0
    failed: int = 0
    flagged: int = 0
    done_planned_s: float = 0.0
    seconds: float = 0.0
    slot_use: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run leaves behind, with what earlier ones did.

    Attributes:
        shards: The executor's shards.
        committed_before: Of them, those that were committed when it began.
        rows: Spoken in all these shards.
        failed: Rows that failed in them.
        flagged: Rows that are flagged in them.
        seconds: Audio in them.
    """

    shards: int
    committed_before: int
    rows: int
    failed: int
    flagged: int
    seconds: float


def run_shards(
    plan: Plan,
    shards: Sequence[int],
    synthesizer: Callable[[], Synthesizer],
    prepare: Prepare,
    *,
    shards_in_flight: int = 2,
    retry_failed: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Returns what is committed of these shards, after speaking those that are not.

    This is what an executor calls in each of its processes: which shards, it decides. Two processes
    may share a directory, not a shard.

    Args:
        plan: What to speak.
        shards: Their numbers.
        synthesizer: Loads what speaks; called only if there is something to do.
        prepare: Makes rows requests.
        shards_in_flight: Most shards begun and not committed. When the last row of one outlasts all of
            the next, the slots run empty at 2; with many slots take more.
        retry_failed: Speak shards again in which rows failed.
        on_progress: Called after every row; may raise to stop. What is committed stays.

    Raises:
        BlockingIOError: Another process is at work on one of these shards.
        OSError: A shard could not be written.
        RuntimeError: The synthesizer did not answer for a row.
    """
    if shards_in_flight < 1:
        raise ValueError(f"shards_in_flight must be at least 1, got {shards_in_flight}")
    if wrong := [number for number in shards if not 0 <= number < len(plan.shards)]:
        raise ValueError(f"there are {len(plan.shards)} shards, counted from 0; not {wrong[:10]}")
    chosen = [plan.shards[number] for number in sorted(set(shards))]
    with Locks(plan.directory / LOCK) as locks:
        locks.take([shard.index for shard in chosen])
        if not locks.supported:
            logger.warning(
                "the file system of %s has no locks: see to it that no two processes speak one shard",
                plan.directory,
            )
        there = files_by_shard(plan.shard_dir)
        found: dict[int, Mapping[str, Any]] = {}
        for shard in chosen:
            kept = _kept(plan, shard, there.get(shard.name, ()), retry_failed)
            if kept is not None:
                found[shard.index] = _summary(kept)
        before = len(found)
        missing = [shard for shard in chosen if shard.index not in found]
        if missing:
            with _Run(plan, missing, prepare, shards_in_flight, on_progress) as run:
                run.go(synthesizer())
            found |= run.committed
    return Outcome(
        shards=len(chosen),
        committed_before=before,
        rows=sum(each["count"] for each in found.values()),
        failed=sum(each["failed"] for each in found.values()),
        flagged=sum(each["flagged"] for each in found.values()),
        seconds=sum(each["seconds"] for each in found.values()),
    )


def _kept(
    plan: Plan, shard: ShardPlan, names: Collection[str], retry_failed: bool
) -> Mapping[str, Any] | None:
    # What an earlier run committed; whatever else is there of the shard is removed.
    path = plan.shard_dir / shard.name
    found = read_commit(path, plan.fingerprint)
    if found is not None and is_whole(path, found) and not (retry_failed and found["failed"]):
        return found
    withdraw(path, names)
    return None


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "count": found["count"],
        "failed": found["failed"],
        "flagged": len(found["flagged"]),
        "seconds": found["seconds"],
    }


@dataclass(eq=False, kw_only=True)
class _Open:
    """A shard whose rows are being spoken."""

    plan: ShardPlan
    rows: list[Row]
    started: float
    results: dict[int, Future[Spoken | Failed] | Failed] = field(default_factory=dict)
    heard: dict[int, Sequence[str]] = field(default_factory=dict)


class _Run:
    def __init__(
        self,
        plan: Plan,
        shards: Sequence[ShardPlan],
        prepare: Prepare,
        shards_in_flight: int,
        on_progress: Callable[[Progress], None],
    ):
        self.committed: dict[int, Mapping[str, Any]] = {}
        self._plan, self._prepare, self._on_progress = plan, prepare, on_progress
        self._queue = deque(shards)
        self._in_flight = shards_in_flight
        self._open: dict[int, _Open] = {}
        self._commits: deque[Future[Mapping[str, Any]]] = deque()
        self._threads = ThreadPoolExecutor(_THREADS, "corpus")
        self._writer = ThreadPoolExecutor(1, "corpus-writer")
        self._last_commit = time.time()
        self._slot_use: Callable[[], float] = lambda: 0.0
        self._provenance = {
            "corpus": plan.fingerprint,
            "model": plan.identity["model"],
            "watermark": plan.identity["options"].get("watermark"),
        }
        self._progress = Progress(
            shards=len(shards),
            rows=sum(shard.rows for shard in shards),
            planned_s=sum(shard.seconds for shard in shards),
        )

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error: object) -> None:
        # Shards that are complete are committed still; rows that wait are dropped.
        self._writer.shutdown(wait=True)
        self._threads.shutdown(wait=True, cancel_futures=True)

    def go(self, synthesizer: Synthesizer) -> None:
        """Speaks all shards."""
        self._slot_use = synthesizer.slot_use
        self._last_commit = time.time()
        while self._queue or self._open:
            results = synthesizer.run(self._feed())
            try:
                for result in results:
                    self._take(result)
            finally:
                close = getattr(results, "close", None)
                if close is not None:
                    close()
            if self._open:
                lost = {
                    shard.plan.name: len(shard.rows) - len(shard.results)
                    for shard in self._open.values()
                }
                raise RuntimeError(
                    f"the synthesizer stopped without an answer for rows of {lost}; what is committed "
                    "stays, run again to go on"
                )
        self._settle(0)

    def _feed(self) -> Iterator[tuple[tuple[int, int], Any]]:
        # Ends, for the slots to run empty, rather than begin a shard too many.
        while self._queue and len(self._open) < self._in_flight:
            self._settle(1)
            shard = self._queue.popleft()
            opened = _Open(plan=shard, rows=self._plan.read_rows(shard), started=time.time())
            self._open[shard.index] = opened
            for at, made in enumerate(_ahead(self._threads, self._prepare, opened.rows)):
                row = opened.rows[at]
                try:
                    request, heard = made.result()
                except (ValueError, TypeError, OSError) as error:
                    self._progress.failed += 1
                    failed = Failed(id=row["id"], line=row["line"], error=_said(error))
                    self._note(opened, at, failed)
                    continue
                opened.heard[at] = heard
                yield (shard.index, at), request

    def _take(self, result: Any) -> None:
        index, at = result.id
        shard = self._open.get(index)
        if shard is None or at in shard.results:
            raise RuntimeError(f"the synthesizer answered twice for row {at} of shard {index}")
        row = shard.rows[at]
        self._progress.seconds += 0 if result.audio is None else len(result.audio) / SAMPLE_RATE
        self._progress.failed += result.audio is None or not len(result.audio)
        self._progress.flagged += bool(result.flags)
        self._note(
            shard,
            at,
            self._threads.submit(
                encode_row,
                row,
                result,
                seed=row_seed(self._plan.seed, row),
                heard=shard.heard.pop(at),
                provenance=self._provenance,
            ),
        )

    def _note(self, shard: _Open, at: int, result: Future[Spoken | Failed] | Failed) -> None:
        shard.results[at] = result
        progress = self._progress
        progress.done_rows += 1
        progress.done_planned_s += shard.plan.seconds / len(shard.rows)
        progress.slot_use = self._slot_use()
        if len(shard.results) == len(shard.rows):
            del self._open[shard.plan.index]
            self._commits.append(self._writer.submit(self._commit, shard, progress.slot_use))
        while self._commits and self._commits[0].done():
            self._settle(len(self._commits) - 1)
        self._on_progress(progress)

    def _settle(self, most: int) -> None:
        # Waits until at most so many commits are under way.
        while len(self._commits) > most:
            self._commits.popleft().result()
            self._progress.done_shards += 1

    def _commit(self, shard: _Open, slot_use: float) -> Mapping[str, Any]:
        rows = []
        for at in range(len(shard.rows)):
            result = shard.results.pop(at)
            rows.append(result.result() if isinstance(result, Future) else result)
        now = time.time()
        found = commit(
            self._plan.shard_dir / shard.plan.name,
            rows,
            fingerprint=self._plan.fingerprint,
            run={
                "started": shard.started,
                "finished": now,
                # Shards overlap: this one's share of the time is what passed since the last.
                "busy_s": now - max(shard.started, self._last_commit),
                "slot_use": slot_use,
                "host": socket.gethostname(),
                "process": os.getpid(),
            },
        )
        self._last_commit = now
        self.committed[shard.plan.index] = _summary(found)
        return found


def _ahead(
    threads: ThreadPoolExecutor, function: Callable[[Row], Any], rows: Sequence[Row]
) -> Iterator[Future[Any]]:
    # In order, some ahead of their use, never all.
    todo = iter(rows)
    begun = deque(threads.submit(function, row) for row in itertools.islice(todo, _PREPARED_AHEAD))
    while begun:
        yield begun.popleft()
        for row in itertools.islice(todo, 1):
            begun.append(threads.submit(function, row))


def _said(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__
