"""Continuous batching: requests come and go in the slots of a batch that never stops for them.

Between two chunks of frames, slots whose requests have ended are given to the next ones in the queue.
With look-ahead the device is told to make chunk n+1 before the codes of chunk n are read, so it never
waits for the host; what a row made beyond its end is dropped. Without, a row that has ended makes nothing
in vain, and the caller still works on chunk n's codes while chunk n+1 is made.

    submit -> queue -> [voice's segment] -> prefill -> insert -> chunks -> updates
                                                 slot  ^------------'

An engine knows prompts and codes, neither text nor audio (`csm_jax.synthesizer` does). It belongs to one
thread. What a device failure hits fails with a reason; rows that only lost their state start again, and
what they have given already is not given twice. One state machine, so one file, long as it is.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.generate import Status, check_prompt
from csm_jax.request import FinishReason, Request, check_settings, ranks_of, row_settings
from csm_jax.runaway import Flags, RepetitionDetector
from csm_jax.sampling import rank_sizes
from csm_jax.segments import SegmentTable
from csm_jax.slots import Frames, SlotSizes, VoicePrompt, check_voice

logger = logging.getLogger(__name__)

# A request may be passed by later ones while no segment is free for its voice, but not for ever.
_MOST_PASSED = 64


@runtime_checkable  # the tests check annotations at run time
class Device(Protocol):
    """What the engine drives: `csm_jax.slots.Slots`, or a simulation of one."""

    sizes: SlotSizes
    config: CSMConfig

    @property
    def lost(self) -> bool: ...
    def reset(self) -> None: ...
    def prefill_size(self, length: int) -> int: ...
    def prefill(self, prompts: Sequence[Frames], segments: Sequence[int]) -> Any: ...
    def insert(self, prefix: Any, settings: Any, slots: Sequence[int]) -> None: ...
    def advance(self, longest: int, ranks: int) -> Any: ...
    def free(self, slots: Sequence[int]) -> None: ...
    def share(self, voice: VoicePrompt, segment: int) -> bool: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """One utterance as the engine takes it.

    Attributes:
        request: Seed, settings and frame cap.
        prompt: Its own positions.
        voice_key: Names the voice that comes before them, None for none.
        voice: That voice's positions.
    """

    request: Request
    prompt: Frames
    voice_key: str | None = None
    voice: VoicePrompt | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Update:
    """What has become of one request since the last update.

    Attributes:
        ticket: Whose; `Engine.submit` gave it.
        codes: New frames, int32 `[n, C]`.
        finish_reason: Set in a request's last update.
        flags: What a safety rule has found (`csm_jax.runaway`).
        error: Why it failed, where the reason is "error".
    """

    ticket: int
    codes: np.ndarray
    finish_reason: FinishReason | None = None
    flags: tuple[str, ...] = ()
    error: str | None = None


@dataclass
class Stats:
    """Counts since the engine was made.

    Attributes:
        chunks: Calls of the device.
        slot_frames: Frames that all slots could have made in them.
        frames: Frames that were made for a request and kept.
        finished: Requests by finish reason.
        flagged: Requests by flag.
        restarted: Rows that were begun again after a failure that was not theirs.
    """

    chunks: int = 0
    slot_frames: int = 0
    frames: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    flagged: Counter[str] = field(default_factory=Counter)
    restarted: int = 0

    @property
    def slot_use(self) -> float:
        """Share of the slots' frames that were kept."""
        return self.frames / self.slot_frames if self.slot_frames else 0.0


@dataclass(eq=False)
class _Row:
    """A request on its way."""

    ticket: int
    job: Job
    max_frames: int
    ranks: int
    slot: int = -1
    segment: int = -1
    ordered: int = 0  # frames the device was told to make
    emitted: int = 0  # frames given to the caller
    repeated: int = 0  # frames still to come that the caller has from before a failure
    passed: int = 0  # times a later request was started before this one
    ended: bool = False

    @property
    def longest(self) -> int:
        return len(self.job.prompt[0]) + min(self.ordered, self.max_frames)


class Engine:
    """A queue of requests and the slots they are made in."""

    def __init__(self, device: Device, *, look_ahead: bool, stop_repetition: bool):
        """Builds an engine with an empty queue.

        Args:
            device: The slots; `warm_up` them first, and nothing compiles later.
            look_ahead: Order each chunk before the last one's codes are read: for devices that work
                beside the host.
            stop_repetition: End rows that say the same again and again (`csm_jax.runaway`).
        """
        self.stats = Stats()
        self.longest = 0  # frames of the longest row so far
        self._device, self._look_ahead = device, look_ahead
        self._detector = RepetitionDetector(device.sizes.slots) if stop_repetition else None
        self._tickets = itertools.count()
        self._queue: deque[_Row] = deque()
        self._rows: dict[int, _Row] = {}  # by slot
        self._by_ticket: dict[int, _Row] = {}
        self._free = list(range(device.sizes.slots))  # a heap: the lowest free slot comes first
        self._stopped: set[int] = set()  # slots that still run for requests that were given up
        self._segments = SegmentTable(device.sizes.segments)
        self._pending: deque[tuple[Any, list[_Row]]] = deque()
        self._updates: list[Update] = []

    # --- the caller's side ----------------------------------------------------------------------

    def submit(self, job: Job) -> int:
        """Puts a job in the queue and returns its ticket.

        Raises:
            ValueError: The prompt is bad, or does not fit the slots with its frame cap.
        """
        config, sizes = self._device.config, self._device.sizes
        check_settings(job.request)
        check_prompt(*job.prompt, config=config)
        max_frames = job.request.max_frames
        own = len(job.prompt[0]) + max_frames
        before = 0
        if job.voice is not None:
            check_voice(job.voice, config=config)
            before = len(job.voice)
            if before > sizes.segment_capacity:
                raise ValueError(
                    f"the voice takes {before:,} positions, but shared segments hold "
                    f"{sizes.segment_capacity:,}"
                )
        limit = min(sizes.capacity, config.backbone.max_seq_len - before)
        if own > limit:
            raise ValueError(
                f"the prompt's {len(job.prompt[0]):,} positions and max_frames={max_frames:,} do not "
                f"fit the {limit:,} positions of a slot"
            )
        needed = ranks_of([job.request], codebook_size=config.codebook_size)
        compiled = rank_sizes(codebook_size=config.codebook_size)
        row = _Row(
            next(self._tickets), job, max_frames, next(size for size in compiled if size >= needed)
        )
        self._by_ticket[row.ticket] = row
        self._queue.append(row)
        return row.ticket

    def cancel(self, ticket: int) -> None:
        """Gives a request up; its last update says "cancelled". Nothing happens if it has ended."""
        row = self._by_ticket.get(ticket)
        if row is None:
            return
        if row.slot < 0:
            self._queue.remove(row)
        else:
            self._stopped.add(row.slot)
        self._end(row, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._queue or self._rows or self._pending or self._updates)

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def free(self) -> int:
        """Slots that nobody is in."""
        return len(self._free)

    def step(self) -> list[Update]:
        """Returns what is new, having fetched one chunk, filled free slots, and ordered another."""
        updates = self.collect()
        self.order()
        return updates

    def collect(self) -> list[Update]:
        """Returns what is new, waiting for the oldest chunk that is ordered and not read.

        With look-ahead another is ordered before.
        """
        if not self._look_ahead:
            self._collect()
        else:
            self._admit()
            if not self._order() or len(self._pending) > 1:
                self._collect()
        updates, self._updates = self._updates, []
        return updates

    def order(self) -> None:
        """Fills free slots and orders the next chunk; with look-ahead, `collect` has done so.

        What the caller has given to the device since `collect` comes before that chunk.
        """
        if not self._look_ahead:
            self._admit()
            self._order()

    def reset(self) -> None:
        """Empties slots and segments, between requests.

        Raises:
            RuntimeError: Requests are on their way.
        """
        if self._by_ticket:
            raise RuntimeError("requests are on their way: their slots cannot be emptied")
        self._pending.clear()
        self._stopped.clear()
        self._updates.clear()
        self._segments = SegmentTable(self._device.sizes.segments)
        self._device.reset()

    # --- into the slots -------------------------------------------------------------------------

    def _admit(self) -> None:
        if self._device.lost and not self._recover():
            return
        groups: dict[int, dict[_Row, None]] = {}
        for row in self._startable():
            size = self._device.prefill_size(len(row.job.prompt[0]))
            groups.setdefault(size, {})[row] = None
        for size, group in sorted(groups.items()):
            rows = list(group)
            most = self._device.sizes.prefill_group(size)
            for start in range(0, len(rows), most):
                self._start(rows[start : start + most])

    def _startable(self) -> Iterator[_Row]:
        """Yields queued rows for which there is a slot, with their voice in its segment."""
        passed: list[_Row] = []
        while self._free and self._queue:
            row = self._queue.popleft()
            try:
                placed = self._place_voice(row)
            except _Failed as failure:
                self._end(row, "error", error=str(failure))
                continue
            if placed:
                for other in passed:
                    other.passed += 1
                row.slot = heapq.heappop(self._free)
                self._rows[row.slot] = row
                yield row
                continue
            passed.append(row)
            if row.passed >= _MOST_PASSED or len(passed) > 2 * self._device.sizes.slots:
                break
        self._queue.extendleft(reversed(passed))

    def _place_voice(self, row: _Row) -> bool:
        job = row.job
        if job.voice_key is None or job.voice is None:
            return True
        segment = self._segments.find(job.voice_key)
        if segment is None:
            segment = self._segments.unused()
            if segment is None:
                return False
            self._segments.put(segment, None)
            try:
                finite = self._device.share(job.voice, segment)
            except jax.errors.JaxRuntimeError as error:
                self._fail_device()
                raise _Failed(_reason("reading the voice", error)) from error
            if not finite:
                raise _Failed("the model's values for this voice were not finite")
            self._segments.put(segment, job.voice_key)
        self._segments.use(segment)
        row.segment = segment
        return True

    def _start(self, rows: list[_Row]) -> None:
        # A failure may have ended some, or sent them back to the queue and here again.
        rows = [row for row in dict.fromkeys(rows) if self._rows.get(row.slot) is row]
        if not rows:
            return
        stage = "reading the prompt"
        try:
            prefix = self._device.prefill(
                [row.job.prompt for row in rows], [row.segment for row in rows]
            )
            stage = "starting the row"
            settings = row_settings(
                [row.job.request for row in rows], segments=[row.segment for row in rows]
            )
            self._device.insert(prefix, settings, [row.slot for row in rows])
        except jax.errors.JaxRuntimeError as error:
            for row in rows:
                self._end(row, "error", error=_reason(stage, error))
            self._fail_device()
            return
        for row in rows:
            self._stopped.discard(row.slot)
            if self._detector is not None:
                self._detector.reset(row.slot)

    # --- chunks ---------------------------------------------------------------------------------

    def _order(self) -> bool:
        """Orders a chunk if a row may still make frames, and returns whether it did."""
        rows = list(self._rows.values())
        if not any(row.ordered < row.max_frames for row in rows):
            return False
        try:
            if self._stopped:
                self._device.free(sorted(self._stopped))
                self._stopped.clear()
            frames = self._device.sizes.chunk_frames
            for row in rows:
                row.ordered += frames
            report = self._device.advance(
                max(row.longest for row in rows), max(row.ranks for row in rows)
            )
        except jax.errors.JaxRuntimeError as error:
            self._fail_rows(_reason("making frames", error))
            return False
        self._pending.append((report, rows))
        return True

    def _collect(self) -> None:
        """Reads the oldest chunk that is ordered and not read."""
        if not self._pending:
            return
        report, rows = self._pending[0]
        try:
            codes, counts, status = report.wait()
            self._pending.popleft()  # not before: a wait that Ctrl-C ends can be begun again
        except jax.errors.JaxRuntimeError as error:
            self._fail_rows(_reason("making frames", error))
            return
        rows = [row for row in rows if not row.ended]
        slots = np.array([row.slot for row in rows], np.int32)
        self.stats.chunks += 1
        self.stats.slot_frames += codes.shape[0] * codes.shape[1]
        if not rows:
            return
        stuck = (
            self._detector.push(slots, codes[slots], counts[slots])
            if self._detector is not None
            else np.zeros(len(rows), bool)
        )
        for row, repeats in zip(rows, stuck.tolist(), strict=True):
            made, end = int(counts[row.slot]), int(status[row.slot])
            old = min(made, row.repeated)
            row.repeated -= old
            row.emitted += made - old
            self.longest = max(self.longest, row.emitted)
            self.stats.frames += made - old
            news = codes[row.slot, old:made]
            if end == Status.ERROR:
                self._end(row, "error", news, error=_not_finite(row.emitted))
            elif end == Status.EOS:
                self._end(row, "eos", news)
            elif repeats:
                if end == Status.RUNNING:
                    self._stopped.add(row.slot)
                self._end(row, "length", news, flags=(Flags.REPETITION,))
            elif end == Status.LENGTH:
                self._end(row, "length", news)
            elif len(news):
                self._updates.append(Update(ticket=row.ticket, codes=news))

    # --- the end --------------------------------------------------------------------------------

    def _end(
        self,
        row: _Row,
        reason: FinishReason,
        codes: np.ndarray | None = None,
        *,
        flags: tuple[str, ...] = (),
        error: str | None = None,
    ) -> None:
        row.ended = True
        self._leave(row)
        del self._by_ticket[row.ticket]
        self.stats.finished[reason] += 1
        self.stats.flagged.update(flags)
        if codes is None:
            codes = np.zeros((0, self._device.config.num_codebooks), np.int32)
        self._updates.append(
            Update(ticket=row.ticket, codes=codes, finish_reason=reason, flags=flags, error=error)
        )

    def _leave(self, row: _Row) -> None:
        if row.segment >= 0:
            self._segments.release(row.segment)
        if row.slot >= 0:
            del self._rows[row.slot]
            heapq.heappush(self._free, row.slot)
        # The slot's number stays with an ended row: chunks that were ordered before name it.
        row.segment = -1

    def _fail_rows(self, error: str) -> None:
        """Fails every row in a slot: a chunk they share could not be made."""
        self._pending.clear()
        for row in list(self._rows.values()):
            self._end(row, "error", error=error)
        self._recover()

    def _fail_device(self) -> None:
        if self._device.lost:
            self._recover()

    def _recover(self) -> bool:
        """Makes new slots, sends their rows back to the queue's front, and returns whether it could."""
        self._pending.clear()
        self._stopped.clear()
        rows = sorted(self._rows.values(), key=lambda row: row.ticket, reverse=True)
        for row in rows:
            self._leave(row)
            row.slot, row.ordered, row.repeated = -1, 0, row.emitted
            self._queue.appendleft(row)
        self.stats.restarted += len(rows)
        self._segments = SegmentTable(self._device.sizes.segments)
        try:
            self._device.reset()
        except jax.errors.JaxRuntimeError as error:
            for row in list(self._queue):
                self._end(row, "error", error=_reason("making new slots", error))
            self._queue.clear()
            return False
        logger.warning("the device failed; %d rows were started again", len(rows))
        return True


class _Failed(Exception):
    """A row cannot be started."""


def _reason(stage: str, error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    if "RESOURCE_EXHAUSTED" in first:
        return f"the device ran out of memory while {stage}: {first}"
    return f"the device failed while {stage}: {first}"


def _not_finite(frames: int) -> str:
    return (
        f"the model's scores were not finite at frame {frames}: check the weights, or use float32"
    )
