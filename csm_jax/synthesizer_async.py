"""One `Synthesizer` for many callers of an asyncio event loop: the heart of a server.

    tasks of the loop ── inbox ──> the thread that owns the synthesizer: prompts, chunks, codec, watermark
         ^──── one queue per call <────────────┘ what is new, once per chunk

    async with AsyncSynthesizer(synthesizer, max_waiting=64) as shared:
        result = await shared.generate(request)
        async for audio in shared.stream(request):
            ...

A task that is cancelled, or leaves a stream early, gives its request up: the slot is free from the next
chunk on, and nobody else notices. The thread blocks on its inbox while there is nothing to do.

A stream's audio waits for a slow caller in a queue of its own without a limit, because the audio of one
request has one: its frame cap, 8 MiB for 90 s. So a slow caller slows nobody down.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np

from csm_jax.request import Request
from csm_jax.synthesizer import Piece, Result, SynthesisError, Synthesizer

logger = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """So many requests wait that this one is refused; a server answers 429 or 503.

    Attributes:
        waiting: How many.
    """

    def __init__(self, waiting: int) -> None:
        super().__init__(
            f"{waiting:,} requests wait for a slot already (max_waiting): try again later"
        )
        self.waiting = waiting


class SynthesizerClosed(RuntimeError):
    """The synthesizer is closed, or its thread has failed: the cause says how."""


@dataclass(eq=False)
class _Call:
    """A request between the loop and the thread; the thread has `ticket`, the loop `outputs`."""

    request: Request
    streamed: bool
    outputs: asyncio.Queue[Piece | Result | Exception] = field(default_factory=asyncio.Queue)
    ticket: int = -1

    async def next(self) -> Piece | Result:
        """Returns what comes next; a `Result` is the last."""
        output = await self.outputs.get()
        if isinstance(output, Exception):
            raise output
        return output


_Outputs = list[tuple[_Call, Piece | Result | Exception]]


class _LoopClosed(Exception):
    """Nobody is left to work for."""


class AsyncSynthesizer:
    """Shares a `Synthesizer` between the tasks of one event loop."""

    def __init__(self, synthesizer: Synthesizer, *, max_waiting: int = 256) -> None:
        """Takes the synthesizer over; nobody else may use it until this is closed.

        `async with` starts its thread. Contexts of JAX that belong to a thread, such as
        `jax.default_device`, do not reach it; the synthesizer brings its mesh.

        Args:
            synthesizer: Best warmed up (`Synthesizer.warm_up`), so that no request waits for a
                compiler, and with few `codec_rows`: what has ended is decoded after every chunk, and a
                call of the codec takes the same time for one utterance as for all its rows.
            max_waiting: Most requests beyond those that the slots can hold.

        Raises:
            ValueError: `max_waiting` is negative, or requests are on their way in the synthesizer.
        """
        if max_waiting < 0:
            raise ValueError(f"max_waiting must not be negative, got {max_waiting}")
        if synthesizer.busy:
            raise ValueError(
                "requests are on their way in this synthesizer: let them end, or cancel them, first"
            )
        self._synthesizer = synthesizer
        self._slots, self._max_waiting = synthesizer.settings.slots, max_waiting
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # The loop's.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls: set[_Call] = set()
        self._closing = False
        self._failure: BaseException | None = None
        self._stopped = asyncio.Event()
        # The thread's: calls in the order in which they came, and those in the synthesizer.
        self._line: dict[_Call, None] = {}
        self._running: set[_Call] = set()
        self._leaving = False

    # --- for callers ----------------------------------------------------------------------------

    async def __aenter__(self) -> AsyncSynthesizer:
        """Starts the thread.

        Raises:
            RuntimeError: It was entered before.
        """
        if self._thread is not None:
            raise RuntimeError("an AsyncSynthesizer can be entered once; make another")
        self._loop = asyncio.get_running_loop()
        # A daemon, for programs that end without closing it; `close` waits for it.
        self._thread = threading.Thread(
            target=self._work, args=(self._loop,), name="csm-jax-synthesizer", daemon=True
        )
        self._thread.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Closes: finishes what runs, or gives it up if the block has raised."""
        await self.close(cancel=kind is not None)

    @property
    def waiting(self) -> int:
        """Requests beyond those that the slots can hold."""
        return max(0, len(self._calls) - self._slots)

    async def generate(self, request: Request) -> Result:
        """Returns what has become of a request; its `id` is None.

        As in `Synthesizer.run`, what fails on its way has a result that says so.

        Raises:
            TypeError, ValueError: The request is bad.
            QueueFull: Too many wait already.
            SynthesizerClosed: It was closed, or has failed.
        """
        call = self._submit(request, streamed=False)
        try:
            while not isinstance(output := await call.next(), Result):
                pass  # only streams have pieces
        finally:
            self._leave(call)
        return dataclasses.replace(output, id=None)

    async def stream(self, request: Request) -> AsyncGenerator[np.ndarray, None]:
        """Yields a request's audio piece by piece, float32 at 24 kHz, as it is made.

        Raises:
            TypeError, ValueError: The request is bad.
            QueueFull: Too many wait already.
            SynthesisError: It failed; pieces before that are good.
            SynthesizerClosed: It was closed, or has failed.
        """
        call = self._submit(request, streamed=True)
        try:
            while isinstance(output := await call.next(), Piece):
                yield output.audio
            if output.error is not None:
                raise SynthesisError(output.error)
        finally:
            self._leave(call)

    async def close(self, *, cancel: bool = False) -> None:
        """Takes no more requests, and returns when the thread has ended; may be called again.

        Args:
            cancel: Give up what runs or waits, whose callers get `SynthesizerClosed`, instead of
                finishing it.
        """
        if self._thread is None:
            self._closing = True
            return
        self._check_loop()
        self._closing = True
        self._inbox.put(self._give_up if cancel else self._stop)
        try:
            await self._stopped.wait()
        except asyncio.CancelledError:
            # The loop may be closed right after this, so the thread must be gone: a chunk at most.
            self._inbox.put(self._give_up)
            raise
        finally:
            self._thread.join()

    # --- on the loop ----------------------------------------------------------------------------

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "an AsyncSynthesizer belongs to the event loop in which `async with` entered it"
            )

    def _submit(self, request: Request, *, streamed: bool) -> _Call:
        if self._closing:
            raise self._closed()
        if self._thread is None:
            raise RuntimeError("enter the AsyncSynthesizer first: `async with ... as shared:`")
        self._check_loop()
        if len(self._calls) >= self._slots + self._max_waiting:
            raise QueueFull(self.waiting)
        call = _Call(request, streamed)
        self._calls.add(call)
        self._inbox.put(lambda: self._line.setdefault(call))
        return call

    def _leave(self, call: _Call) -> None:
        """Gives a call up unless it has ended."""
        if call in self._calls:
            self._calls.remove(call)
            self._inbox.put(lambda: self._cancel(call))

    def _deliver(self, outputs: _Outputs) -> None:
        for call, output in outputs:
            if call not in self._calls:  # it was given up meanwhile
                continue
            if not isinstance(output, Piece):
                self._calls.remove(call)
            call.outputs.put_nowait(output)

    def _end(self, failure: BaseException | None) -> None:
        """The thread's last word."""
        self._closing, self._failure = True, failure
        self._deliver([(call, self._closed()) for call in list(self._calls)])
        self._stopped.set()

    def _closed(self) -> SynthesizerClosed:
        if self._failure is None:
            return SynthesizerClosed("the synthesizer is closed")
        error = SynthesizerClosed(f"the synthesizer's thread has failed: {self._failure!r}")
        error.__cause__ = self._failure
        return error

    # --- in the thread --------------------------------------------------------------------------

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        failure: BaseException | None = None
        try:
            while not self._leaving or self._line or self._running:
                self._read_inbox()
                outputs = self._fill()
                if self._running:
                    # At once, even if few utterances share the call of the codec: somebody waits.
                    outputs += self._taken(self._synthesizer.pump(flush=True))
                if outputs:
                    _post(loop, self._deliver, outputs)
        except _LoopClosed:
            logger.warning("an AsyncSynthesizer was not closed before its event loop")
            self._give_up()
            return
        except BaseException as error:
            failure = error
            logger.exception("the synthesizer's thread has failed")
        with contextlib.suppress(_LoopClosed):
            _post(loop, self._end, failure)

    def _read_inbox(self) -> None:
        """Does what the loop has asked for; waits for something while there is nothing else to do."""
        if not (self._line or self._running):
            self._inbox.get()()
        try:
            while True:
                self._inbox.get_nowait()()
        except Empty:
            pass

    def _fill(self) -> _Outputs:
        """Gives calls to the synthesizer, a few ahead of its slots, and returns what is bad."""
        refused: _Outputs = []
        while self._line and self._synthesizer.queued <= self._slots // 2:
            call = next(iter(self._line))
            del self._line[call]
            try:
                call.ticket = self._synthesizer.submit(
                    call.request, id=call, streamed=call.streamed
                )
            except Exception as error:  # this request's, whatever it is
                refused.append((call, error))
            else:
                self._running.add(call)
        return refused

    def _taken(self, outputs: list[Piece | Result]) -> _Outputs:
        """Returns outputs with their calls."""
        taken: _Outputs = [(out.id, out) for out in outputs if isinstance(out.id, _Call)]
        self._running -= {call for call, output in taken if isinstance(output, Result)}
        return taken

    def _cancel(self, call: _Call) -> None:
        self._line.pop(call, None)
        if call in self._running:
            self._running.remove(call)
            self._synthesizer.cancel(call.ticket)

    def _stop(self) -> None:
        self._leaving = True

    def _give_up(self) -> None:
        self._leaving = True
        for call in [*self._line, *self._running]:
            self._cancel(call)


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """Has the loop call a function.

    Raises:
        _LoopClosed: It never will.
    """
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
        raise _LoopClosed from None
