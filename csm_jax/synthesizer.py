"""Speech for many requests: the engine with text and voices before it, and codec and watermark behind it.

    Request -> prompt, voice -> Engine -> codes -> DecodeStage -> audio -> watermark -> Result
                                   one `pump`: a chunk of each

`run` takes any number of requests and yields their results as they end; `stream` yields one request's
audio while it is made; `csm_jax.synthesizer_async` does both for many callers of one event loop. What a
row becomes depends on its own request, as far as `csm_jax.slots` says: every stage runs fixed programs.
A request's way through the stages, failures included, is one story: the file is as long as that.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np

from csm_jax import sharding
from csm_jax.engine import Engine, Job, Stats
from csm_jax.jobs import JobMaker
from csm_jax.request import FinishReason, Request
from csm_jax.runaway import Flags, is_silent
from csm_jax.slots import Programs, Slots
from csm_jax.stages import Decoded, DecodeStage
from csm_jax.synthesizer_settings import SynthesizerSettings
from csm_jax.watermark_key import DEFAULT_KEY, check_key

if TYPE_CHECKING:
    from csm_jax.array_typing import Params
    from csm_jax.codec import Codec
    from csm_jax.watermark.protocol import Watermarker, WatermarkStream

R = TypeVar("R")


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """What has become of one request.

    Attributes:
        id: As it was given.
        audio: float32 `[W]` at 24 kHz, watermarked unless that is off; empty if the model ended at
            once, if it was streamed, or if codes alone were asked for; None if it failed.
        codes: int32 `[n, C]`.
        finish_reason: Why it ended.
        flags: What the safety rules have found (`csm_jax.runaway`).
        redraws: How often it was drawn again with a new key.
        error: Why it failed.
    """

    id: Hashable
    audio: np.ndarray | None
    codes: np.ndarray
    finish_reason: FinishReason
    flags: tuple[str, ...] = ()
    redraws: int = 0
    error: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Piece:
    """The next audio of a streamed request: float32 `[W]` at 24 kHz."""

    id: Hashable
    audio: np.ndarray


@dataclass(eq=False)
class _Task:
    """A request on its way."""

    id: Hashable
    job: Job
    streamed: bool
    decode: bool
    engine_ticket: int
    marker: WatermarkStream | None = None
    codes: list[np.ndarray] = field(default_factory=list)
    audio: list[np.ndarray] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    flags: tuple[str, ...] = ()
    redraws: int = 0
    error: str | None = None


class SynthesisError(RuntimeError):
    """A streamed request failed; the audio before it is good."""


class Synthesizer:
    """Requests in, audio out, many at a time. It belongs to one thread."""

    def __init__(
        self,
        *,
        jobs: JobMaker,
        params: Params,
        codec: Codec,
        watermarker: Watermarker | None,
        settings: SynthesizerSettings,
        watermark_key: Sequence[int] = DEFAULT_KEY,
        mesh: jax.sharding.Mesh | None = None,
        programs: Programs | None = None,
    ):
        """Builds a synthesizer from its parts; `Generator.synthesizer` does it for a loaded model.

        Args:
            jobs: Makes prompts for the model of `params`.
            params: Weights on their devices.
            codec: Codes to audio.
            watermarker: None leaves the audio unmarked.
            settings: How to work.
            watermark_key: Five bytes.
            mesh: Of explicit axes, on which `params` are; None is one device.
            programs: See `csm_jax.slots.Slots`.

        Raises:
            ValueError: The settings do not fit the model or the mesh.
        """
        self.config, self.settings = jobs.config, settings
        self.sample_rate = codec.sample_rate
        self._jobs, self._codec = jobs, codec
        self._watermarker, self._key = watermarker, check_key(watermark_key)
        self._mesh, self._rules = mesh, sharding.current_rules()
        self._slots = Slots(self.config, params, settings.sizes, mesh=mesh, programs=programs)
        self._engine = Engine(
            self._slots,
            look_ahead=settings.look_ahead,
            stop_repetition=settings.stop_repetition,
        )
        self._whole, self._streamed = self._new_whole(), self._new_streamed()
        self._tickets = itertools.count()
        self._tasks: dict[int, _Task] = {}
        self._by_engine: dict[int, int] = {}
        # Outputs until they are read: those of a `run` or a `stream` in its own queue.
        self._unread: deque[Piece | Result] = deque()
        self._readers: dict[int, deque[Piece | Result]] = {}

    # --- many requests --------------------------------------------------------------------------

    def run(self, requests: Iterable[tuple[Hashable, Request]]) -> Iterator[Result]:
        """Yields the results of any number of requests in the order in which they end.

        Requests are taken as slots come free, so an endless iterator will do. One that is bad, or
        fails, has a result that says so; it never ends the others. Closing the iterator early gives up
        what it has started.

        Args:
            requests: Each with an id of the caller's, which its result carries.
        """
        source = iter(requests)
        arrived: deque[Piece | Result] = deque()
        ours: set[int] = set()
        try:
            exhausted = False
            while not exhausted or ours:
                # A few ahead, so that a slot never waits for a prompt to be made.
                most = self._engine.free + self.settings.slots // 2
                while not exhausted and self._engine.queued <= most:
                    try:
                        id, request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    try:
                        ticket = self.submit(request, id=id)
                    except (TypeError, ValueError, OSError, jax.errors.JaxRuntimeError) as error:
                        yield self._failed(id, error)
                    else:
                        ours.add(ticket)
                        self._readers[ticket] = arrived
                self._step()
                ours = {ticket for ticket in ours if ticket in self._tasks}
                while arrived:
                    output = arrived.popleft()
                    if isinstance(output, Result):
                        yield output
        finally:
            for ticket in ours:
                self.cancel(ticket)

    def stream(self, request: Request | Job) -> Iterator[np.ndarray]:
        """Yields one request's audio piece by piece, float32 at `sample_rate`, as it is made.

        Closing the iterator early gives the request up.

        Raises:
            TypeError, ValueError: A bad request, raised by this call and not by the first `next`.
            SynthesisError: It failed; pieces before that are good.
        """
        ticket = self.submit(request, streamed=True)
        arrived = self._readers[ticket] = deque()
        stream = self._stream(ticket, arrived)
        next(stream)  # closing a generator that was never begun would not cancel
        return stream

    def _stream(self, ticket: int, arrived: deque[Piece | Result]) -> Iterator[np.ndarray]:
        try:
            yield np.zeros(0, np.float32)  # to `stream`
            while arrived or ticket in self._tasks:
                if not arrived:
                    self._step()
                    continue
                output = arrived.popleft()
                if isinstance(output, Piece):
                    yield output.audio
                elif output.error is not None:
                    raise SynthesisError(output.error)
        finally:
            self.cancel(ticket)

    # --- one step at a time ---------------------------------------------------------------------

    def submit(
        self,
        request: Request | Job,
        *,
        id: Hashable = None,
        streamed: bool = False,
        decode: bool = True,
    ) -> int:
        """Takes a request and returns its ticket; `pump` makes it.

        Args:
            request: What to say, or what `JobMaker.job` made of it.
            id: What its outputs carry.
            streamed: Whether its audio comes in pieces; it is then never drawn again.
            decode: Whether audio is wanted, not codes alone.

        Raises:
            TypeError, ValueError: It is bad, or does not fit the slots.
        """
        job = request
        if isinstance(job, Request):
            job = self._jobs.job(job, segment_capacity=self._slots.sizes.segment_capacity)
        if not isinstance(job, Job):
            raise TypeError(f"request must be a Request, got {type(request).__name__}")
        marker = None
        if streamed and self._watermarker is not None:
            marker = self._watermarker.open_stream(self.sample_rate, self._key)
        task = _Task(id, job, streamed, decode, self._engine.submit(job), marker)
        ticket = next(self._tickets)
        self._tasks[ticket] = task
        self._by_engine[task.engine_ticket] = ticket
        return ticket

    def cancel(self, ticket: int) -> None:
        """Gives a request up, silently; nothing happens if it has ended."""
        task = self._tasks.pop(ticket, None)
        self._readers.pop(ticket, None)
        if task is not None:
            self._by_engine.pop(task.engine_ticket, None)
            self._engine.cancel(task.engine_ticket)
            self._whole.drop(ticket)
            self._streamed.drop(ticket)

    @property
    def busy(self) -> bool:
        """Whether requests are on their way."""
        return bool(self._tasks)

    @property
    def longest(self) -> int:
        """Frames of the longest request so far."""
        return self._engine.longest

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return self._engine.queued

    @property
    def stats(self) -> Stats:
        """Counts since the synthesizer was made."""
        return self._engine.stats

    def slot_use(self) -> float:
        """Returns the share of the slots' frames that were kept, so far."""
        return self.stats.slot_use

    @property
    def compilations(self) -> int:
        """Programs of the model compiled so far; `warm_up` compiles all there are."""
        return self._slots.compilations

    def warm_up(self) -> None:
        """Compiles every program, and runs codec and watermark once.

        Left out is the codec's encoder, which the first context of recordings compiles, for up to six
        sizes.

        Raises:
            RuntimeError: Requests are on their way; it would empty their slots.
            jax.errors.JaxRuntimeError: The device has too little memory.
        """
        if self._tasks:
            raise RuntimeError("requests are on their way: warm up before the first")
        self._engine.reset()  # what it knows of segments is gone with them
        self._slots.warm_up()
        codes = np.zeros((1, self.config.num_codebooks), np.int32)
        for stage in (self._whole, self._streamed):
            stage.push(-1, codes, last=True)
            stage.run(flush=True)
        if self._watermarker is not None:
            noise = np.random.default_rng(0).normal(0, 0.1, self.sample_rate).astype(np.float32)
            self._watermarker.embed_batch([noise], self.sample_rate, self._key)

    def pump(self, *, flush: bool = False) -> list[Piece | Result]:
        """Returns what is new after one more chunk; a request's `Result` is its last.

        What an open `run` or `stream` waits for is not among it.

        Args:
            flush: Decode what has ended at once, instead of waiting for utterances to share the
                codec's call with while others are made.
        """
        self._step(flush=flush)
        outputs = list(self._unread)
        self._unread.clear()
        return outputs

    def _step(self, *, flush: bool = False) -> None:
        """Makes one more chunk and puts what is new where it is read."""
        for ticket, output in self._pump(flush=flush):
            self._readers.get(ticket, self._unread).append(output)
            if isinstance(output, Result):
                self._readers.pop(ticket, None)

    def _pump(self, *, flush: bool) -> list[tuple[int, Piece | Result]]:
        outputs: list[tuple[int, Piece | Result]] = []
        for update in self._engine.collect():
            ticket = self._by_engine.get(update.ticket)
            if ticket is None:  # cancelled
                continue
            task = self._tasks[ticket]
            task.codes.append(update.codes)
            if update.finish_reason is not None:
                del self._by_engine[update.ticket]
                task.finish_reason, task.flags = update.finish_reason, update.flags
                task.error = update.error
            ended = task.finish_reason is not None
            if task.streamed:
                self._streamed.push(ticket, update.codes, last=ended)
            elif task.error is not None:
                outputs.append((ticket, self._finish(ticket, None)))
            elif ended and not self._drawn_again(ticket):
                if task.decode:
                    self._whole.push(ticket, np.concatenate(task.codes), last=True)
                else:
                    outputs.append((ticket, self._finish(ticket, np.zeros(0, np.float32))))
        # A stream's frames before the next chunk, behind which somebody would wait for them.
        self._run_stage(self._streamed, DecodeStage.start, outputs)
        self._engine.order()
        flush = flush or not self._engine.busy
        whole = functools.partial(DecodeStage.run, flush=flush)
        outputs += self._finished(self._run_stage(self._whole, whole, outputs) or [])
        streamed = functools.partial(DecodeStage.run, flush=True)
        outputs += self._pieces(self._run_stage(self._streamed, streamed, outputs) or [])
        return outputs

    # --- behind the engine ----------------------------------------------------------------------

    def _drawn_again(self, ticket: int) -> bool:
        """Starts a request again that ran away, if it may be, and returns whether it did."""
        task = self._tasks[ticket]
        capped = task.finish_reason == "length" and task.job.request.max_audio_length_ms is None
        if not (capped or task.flags) or task.redraws == self.settings.redraws:
            return False
        task.redraws += 1
        request = task.job.request
        seed = redraw_seed(request.seed, task.redraws)
        job = dataclasses.replace(task.job, request=dataclasses.replace(request, seed=seed))
        task.codes, task.audio, task.finish_reason, task.flags = [], [], None, ()
        task.engine_ticket = self._engine.submit(job)
        self._by_engine[task.engine_ticket] = ticket
        return True

    def _run_stage(
        self,
        stage: DecodeStage[int],
        call: Callable[[DecodeStage[int]], R],
        outputs: list[tuple[int, Piece | Result]],
    ) -> R | None:
        """Returns what a call of a stage gives; None if there is nothing to do, or it fails."""
        if not stage.busy:
            return None
        try:
            return call(stage)
        except (RuntimeError, ValueError) as error:  # of JAX, or of another codec
            # What was on its way through the codec is lost with its state; the rest goes on.
            for ticket in stage.unfinished():
                if ticket in self._tasks:
                    self._fail(ticket, f"the device failed in the codec: {error}")
                    outputs.append((ticket, self._finish(ticket, None)))
            if stage is self._whole:
                self._whole = self._new_whole()
            else:
                self._streamed = self._new_streamed()
            return None

    def _finished(self, decoded: Sequence[Decoded[int]]) -> list[tuple[int, Result]]:
        """Returns the results of whole utterances whose audio has come."""
        outputs: list[tuple[int, Result]] = []
        whole: list[tuple[int, np.ndarray]] = []
        for part in decoded:
            task = self._tasks.get(part.key)
            if task is None:
                continue
            task.audio.append(part.audio)
            if not part.last:
                continue
            audio = np.concatenate(task.audio)
            if is_silent(audio, self.sample_rate):
                task.flags = (*task.flags, Flags.SILENCE)
                self.stats.flagged[Flags.SILENCE] += 1
            if not self._drawn_again(part.key):
                whole.append((part.key, audio))
        for ticket, audio in self._marked(whole):
            outputs.append((ticket, self._finish(ticket, audio)))
        return outputs

    def _marked(self, whole: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray | None]]:
        if self._watermarker is None or not whole:
            return [*whole]
        embed = self._watermarker.embed_batch
        try:
            marked = embed([audio for _, audio in whole], self.sample_rate, self._key)
            return [(ticket, audio) for (ticket, _), audio in zip(whole, marked, strict=True)]
        except (RuntimeError, ValueError):  # one of them; the others are good
            results: list[tuple[int, np.ndarray | None]] = []
            for ticket, audio in whole:
                try:
                    results.append((ticket, embed([audio], self.sample_rate, self._key)[0]))
                except (RuntimeError, ValueError) as error:
                    self._fail(ticket, str(error))
                    results.append((ticket, None))
            return results

    def _pieces(self, decoded: Sequence[Decoded[int]]) -> list[tuple[int, Piece | Result]]:
        outputs: list[tuple[int, Piece | Result]] = []
        for part in decoded:
            task = self._tasks.get(part.key)
            if task is None:
                continue
            audio = part.audio
            if task.marker is not None:
                try:
                    audio = task.marker.push(audio)
                    if part.last:
                        audio = np.concatenate([audio, task.marker.flush()])
                except (RuntimeError, ValueError) as error:
                    self._fail(part.key, str(error))
                    self._streamed.drop(part.key)
                    outputs.append((part.key, self._finish(part.key, None)))
                    continue
            if len(audio):
                outputs.append((part.key, Piece(id=task.id, audio=audio)))
            if part.last:
                outputs.append((part.key, self._finish(part.key, np.zeros(0, np.float32))))
        return outputs

    def _fail(self, ticket: int, error: str) -> None:
        task = self._tasks[ticket]
        task.finish_reason, task.error = "error", error
        self._engine.cancel(task.engine_ticket)

    def _finish(self, ticket: int, audio: np.ndarray | None) -> Result:
        task = self._tasks.pop(ticket)
        self._by_engine.pop(task.engine_ticket, None)
        return Result(
            id=task.id,
            audio=None if task.error is not None else audio,
            codes=np.concatenate(task.codes),
            finish_reason=task.finish_reason or "error",
            flags=task.flags,
            redraws=task.redraws,
            error=task.error,
        )

    def _failed(self, id: Hashable, error: Exception) -> Result:
        return Result(
            id=id,
            audio=None,
            codes=np.zeros((0, self.config.num_codebooks), np.int32),
            finish_reason="error",
            error=str(error) or type(error).__name__,
        )

    def _new_whole(self) -> DecodeStage[int]:
        return self._new_stage(self.settings.codec_rows, self.settings.codec_frames)

    def _new_streamed(self) -> DecodeStage[int]:
        return self._new_stage(self.settings.slots, self.settings.chunk_frames)

    def _new_stage(self, rows: int, frames: int) -> DecodeStage[int]:
        with sharding.on(self._mesh, self._rules):
            return DecodeStage(self._codec.open_rows(rows, frames))


def redraw_seed(seed: int, attempt: int) -> int:
    """Returns the seed with which a request is drawn again: a hash of its own seed and the attempt."""
    digest = hashlib.blake2b(f"{seed}:{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
