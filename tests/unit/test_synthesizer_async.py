"""AsyncSynthesizer: many callers, each as if alone, however they and the loop end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from csm_jax.request import Request
from csm_jax.synthesizer import Result, SynthesisError, Synthesizer
from csm_jax.synthesizer_async import AsyncSynthesizer, QueueFull, SynthesizerClosed
from tests.support.synthesizer import CONFIG, make, mixed, plain_codec, request, solo

MIXED = mixed(40)
LONG = request(9, frames=100)


@pytest.fixture(scope="module")
def alone() -> list[np.ndarray]:
    """The codes of the mixed requests one by one."""
    return [result.codes for result in solo(MIXED)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread outlives a test."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def on_loop(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs it, and fails if the loop was told of anything that nobody caught."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
        async with asyncio.timeout(120):
            await main()

    asyncio.run(watched())
    assert not complaints


async def heard(stream: AsyncIterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([piece async for piece in stream])


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


def assert_idle(synthesizer: Synthesizer) -> None:
    assert not synthesizer.busy
    assert synthesizer.queued == 0
    assert len(synthesizer._engine._free) == synthesizer.settings.slots


def count_chunks(synthesizer: Synthesizer, seen: list[int]) -> None:
    """Notes after every chunk how many slots are free."""
    pump = synthesizer.pump

    def counted(**options: Any) -> Any:
        try:
            return pump(**options)
        finally:
            seen.append(len(synthesizer._engine._free))

    synthesizer.pump = counted  # pyright: ignore


# --- many callers -------------------------------------------------------------------------------


def test_hundreds_of_requests_of_many_tasks_are_each_as_if_alone(alone: list[np.ndarray]) -> None:
    """Whole ones and streams, quick and slow readers, and some that go away at any time."""
    synthesizer = make()
    ended = {"whole": 0, "stream": 0, "left": 0, "cancelled": 0}

    async def caller(shared: AsyncSynthesizer, task: int) -> None:
        rng = np.random.default_rng(task)
        for n in range(task, 224, 32):
            asked, codes = MIXED[n % 40], alone[n % 40]
            audio = plain_codec().decode(codes)
            match int(rng.integers(5)):
                case 0 | 1:
                    result = await shared.generate(asked)
                    np.testing.assert_array_equal(result.codes, codes)
                    assert result.audio is not None
                    np.testing.assert_array_equal(result.audio, audio)
                    assert (result.id, result.finish_reason) == (None, "length")
                    ended["whole"] += 1
                case 2:
                    pieces = []
                    async for piece in shared.stream(asked):
                        pieces.append(piece)
                        await asyncio.sleep(float(rng.random()) * 0.01)
                    np.testing.assert_array_equal(np.concatenate(pieces), audio)
                    ended["stream"] += 1
                case 3:
                    size = int(rng.integers(0, 3))
                    pieces = []
                    async with aclosing(shared.stream(asked)) as stream:
                        async for piece in stream:
                            pieces.append(piece)
                            if len(pieces) > size:
                                break
                    joined = np.concatenate(pieces)
                    np.testing.assert_array_equal(joined, audio[: len(joined)])
                    ended["left"] += 1
                case _:
                    doomed = asyncio.create_task(shared.generate(asked))
                    await asyncio.sleep(float(rng.random()) * 0.2)
                    doomed.cancel()
                    done = (await asyncio.gather(doomed, return_exceptions=True))[0]
                    if isinstance(done, Result):
                        np.testing.assert_array_equal(done.codes, codes)
                    else:
                        assert isinstance(done, asyncio.CancelledError)
                        ended["cancelled"] += 1

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer) as shared:
            await asyncio.gather(*(caller(shared, task) for task in range(32)))
            assert shared.waiting == 0

    on_loop(main)
    assert_idle(synthesizer)
    assert min(ended.values()) > 10
    # It rests while nothing is asked, and can be shared again.
    on_loop(main)


def test_a_slow_reader_delays_nobody(alone: list[np.ndarray]) -> None:
    synthesizer = make(slots=4)

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer) as shared:
            slow = shared.stream(LONG)
            first = await anext(slow)
            for n in range(6):
                np.testing.assert_array_equal((await shared.generate(MIXED[n])).codes, alone[n])
            await until(lambda: not synthesizer.busy)  # all of it is made, and waits
            rest = await heard(slow)
            [want] = solo([LONG])
            np.testing.assert_array_equal(
                np.concatenate([first, rest]), plain_codec().decode(want.codes)
            )

    on_loop(main)


def test_it_blocks_while_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = AsyncSynthesizer(make())
    read, reads = shared._read_inbox, 0

    def counted() -> None:
        nonlocal reads
        reads += 1
        read()

    monkeypatch.setattr(shared, "_read_inbox", counted)

    async def main() -> None:
        async with shared:
            await shared.generate(MIXED[0])
            await asyncio.sleep(0.05)
            before = reads
            await asyncio.sleep(0.2)
            assert reads == before

    on_loop(main)


# --- refused ------------------------------------------------------------------------------------


def test_a_bad_request_is_its_caller_s(alone: list[np.ndarray]) -> None:
    synthesizer = make()

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer) as shared:
            done = await asyncio.gather(
                shared.generate(MIXED[0]),
                shared.generate(request(1, speaker=-1)),
                heard(shared.stream(request(1, text=" "))),
                shared.generate(request(1, frames=127)),
                heard(shared.stream(MIXED[1])),
                return_exceptions=True,
            )
            for error, message in zip(
                done[1:4], ("speaker", "text", "positions of a slot"), strict=True
            ):
                with pytest.raises(ValueError, match=message):
                    raise error  # pyright: ignore
            assert isinstance(done[0], Result)
            np.testing.assert_array_equal(done[0].codes, alone[0])
            np.testing.assert_array_equal(done[4], plain_codec().decode(alone[1]))  # pyright: ignore

    on_loop(main)
    assert_idle(synthesizer)


def test_a_full_line_refuses_and_says_how_many_wait() -> None:
    synthesizer = make()

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer, max_waiting=3) as shared:
            tasks = [asyncio.create_task(shared.generate(LONG)) for _ in range(7)]
            await asyncio.sleep(0)
            assert shared.waiting == 3
            for refused in (shared.generate(LONG), heard(shared.stream(LONG))):
                with pytest.raises(QueueFull, match="3 requests wait") as caught:
                    await refused
                assert caught.value.waiting == 3
            tasks[6].cancel()
            await asyncio.sleep(0)
            assert shared.waiting == 2
            tasks[6] = asyncio.create_task(shared.generate(MIXED[0]))
            await asyncio.gather(*tasks)
            assert shared.waiting == 0

    on_loop(main)
    assert_idle(synthesizer)
    with pytest.raises(ValueError, match="max_waiting"):
        AsyncSynthesizer(synthesizer, max_waiting=-1)


def test_it_must_be_entered_once_and_in_its_own_loop() -> None:
    synthesizer = make()

    async def main() -> None:
        shared = AsyncSynthesizer(synthesizer)
        with pytest.raises(RuntimeError, match="enter"):
            await shared.generate(MIXED[0])
        async with shared:
            with pytest.raises(RuntimeError, match="once"):
                await shared.__aenter__()
            with pytest.raises(RuntimeError, match="event loop"):
                await asyncio.to_thread(asyncio.run, shared.generate(MIXED[0]))
        with pytest.raises(SynthesizerClosed, match="closed"):
            await shared.generate(MIXED[0])
        with pytest.raises(SynthesizerClosed, match="closed"):
            await heard(shared.stream(MIXED[0]))

    on_loop(main)
    ticket = synthesizer.submit(MIXED[0])
    with pytest.raises(ValueError, match="on their way"):
        AsyncSynthesizer(synthesizer)
    synthesizer.cancel(ticket)


# --- given up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "aclose", "break", "cancelled stream"])
def test_a_request_given_up_frees_its_slot_and_disturbs_nobody(
    how: str, alone: list[np.ndarray]
) -> None:
    synthesizer = make()
    seen: list[int] = []
    count_chunks(synthesizer, seen)

    async def leave(shared: AsyncSynthesizer) -> None:
        if how == "cancel":
            task = asyncio.create_task(shared.generate(LONG))
            await until(lambda: bool(seen) and seen[-1] == 1)
            task.cancel()
        elif how == "aclose":
            stream = shared.stream(LONG)
            await anext(stream)
            await stream.aclose()
        elif how == "break":
            async for _ in shared.stream(LONG):
                break
            await asyncio.sleep(0)  # the loop closes what is dropped
            await asyncio.sleep(0)
        else:
            task = asyncio.create_task(heard(shared.stream(LONG)))
            await until(lambda: bool(seen) and seen[-1] == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def main() -> None:
        neighbours = [request(n, frames=110) for n in (1, 2)]
        async with AsyncSynthesizer(synthesizer) as shared:
            running = [asyncio.create_task(shared.generate(each)) for each in neighbours]
            await until(lambda: bool(seen) and seen[-1] == 2)
            await leave(shared)
            left = len(seen)
            await until(lambda: len(seen) >= left + 2 or all(task.done() for task in running))
            assert not any(task.done() for task in running)
            assert seen[left + 1] == 2
            await shared.generate(MIXED[0])  # the slot works for the next
            results = await asyncio.gather(*running)
        for one, result in zip(solo(neighbours), results, strict=True):
            np.testing.assert_array_equal(result.codes, one.codes)

    on_loop(main)
    assert_idle(synthesizer)
    assert synthesizer.stats.finished == {"length": 3, "cancelled": 1}


def test_a_request_given_up_while_it_waits_is_never_made() -> None:
    synthesizer = make()

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer) as shared:
            tasks = [asyncio.create_task(shared.generate(LONG)) for _ in range(20)]
            await until(lambda: synthesizer.busy)
            for task in tasks[2:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    on_loop(main)
    assert_idle(synthesizer)
    assert synthesizer.stats.finished["length"] == 2
    assert synthesizer.stats.frames < 8 * 100


# --- closing ------------------------------------------------------------------------------------


def test_leaving_the_block_finishes_what_runs(alone: list[np.ndarray]) -> None:
    synthesizer = make()

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer) as shared:
            tasks = [asyncio.create_task(shared.generate(each)) for each in MIXED[:12]]
            stream = shared.stream(LONG)
            first = await anext(stream)
        for result, codes in zip(await asyncio.gather(*tasks), alone, strict=False):
            np.testing.assert_array_equal(result.codes, codes)
        # What was made of the stream can still be heard.
        rest = await heard(stream)
        [want] = solo([LONG])
        np.testing.assert_array_equal(
            np.concatenate([first, rest]), plain_codec().decode(want.codes)
        )
        await shared.close()  # and again is nothing
        await shared.close(cancel=True)

    on_loop(main)
    assert_idle(synthesizer)


def test_an_exception_in_the_block_gives_up_what_runs() -> None:
    synthesizer = make()

    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []

        async def block() -> None:
            async with AsyncSynthesizer(synthesizer) as shared:
                tasks.extend(asyncio.create_task(shared.generate(LONG)) for _ in range(9))
                tasks.append(asyncio.create_task(heard(shared.stream(LONG))))
                await until(lambda: synthesizer.busy)
                raise KeyError("the block")

        with pytest.raises(KeyError, match="the block"):
            await block()
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(done, SynthesizerClosed)

    on_loop(main)
    assert_idle(synthesizer)
    assert synthesizer.stats.finished["length"] == 0


def test_closing_turns_from_finishing_to_giving_up_when_told_again() -> None:
    synthesizer = make()

    async def main() -> None:
        shared = AsyncSynthesizer(synthesizer)
        await AsyncSynthesizer(synthesizer).close()  # never entered
        async with shared:
            task = asyncio.create_task(shared.generate(LONG))
            await until(lambda: synthesizer.busy)
            closing = asyncio.create_task(shared.close())
            await asyncio.sleep(0)
            with pytest.raises(SynthesizerClosed):
                await shared.generate(MIXED[0])
            await shared.close(cancel=True)
            await closing
            with pytest.raises(SynthesizerClosed):
                await task

    on_loop(main)
    assert_idle(synthesizer)
    assert synthesizer.stats.finished["length"] == 0


def test_a_close_that_is_cancelled_leaves_no_thread() -> None:
    synthesizer = make()

    async def main() -> None:
        shared = AsyncSynthesizer(synthesizer)

        async def block() -> None:
            async with shared:
                nobody = shared.stream(LONG)
                await anext(nobody)

        task = asyncio.create_task(block())
        await until(lambda: shared._closing)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert shared._thread is not None
        assert not shared._thread.is_alive()

    on_loop(main)
    assert_idle(synthesizer)
    assert synthesizer.stats.finished["length"] == 0  # a chunk at most was waited for


def test_a_loop_that_ends_first_stops_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    synthesizer = make()
    loop = asyncio.new_event_loop()
    shared = AsyncSynthesizer(synthesizer)

    async def begin() -> None:
        await shared.__aenter__()
        shared._submit(LONG, streamed=True)

    loop.run_until_complete(begin())
    loop.close()
    assert shared._thread is not None
    shared._thread.join(60)
    assert not shared._thread.is_alive()
    assert "not closed before its event loop" in caplog.text
    assert_idle(synthesizer)


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_a_bug_in_the_thread_reaches_every_caller(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    synthesizer = make()
    pump, chunks = synthesizer.pump, 0

    def broken(**options: Any) -> Any:
        nonlocal chunks
        chunks += 1
        if chunks == 5:
            raise kind("planted")
        return pump(**options)

    synthesizer.pump = broken  # pyright: ignore

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer) as shared:
            calls: list[Awaitable[Any]] = [shared.generate(LONG) for _ in range(12)]
            calls += [heard(shared.stream(LONG)) for _ in range(3)]
            done = await asyncio.gather(*calls, return_exceptions=True)
            for error in done:
                assert isinstance(error, SynthesizerClosed)
                assert "planted" in str(error)
                assert isinstance(error.__cause__, kind)
            assert len({id(error) for error in done}) == len(done)
            with pytest.raises(SynthesizerClosed, match="planted"):
                await shared.generate(MIXED[0])

    on_loop(main)
    assert "thread has failed" in caplog.text


def test_a_bug_while_one_request_is_taken_is_its_caller_s(
    monkeypatch: pytest.MonkeyPatch, alone: list[np.ndarray]
) -> None:
    synthesizer = make()
    submit = synthesizer.submit

    def broken(asked: Request, **options: Any) -> int:
        if asked is MIXED[1]:
            raise ZeroDivisionError
        return submit(asked, **options)

    monkeypatch.setattr(synthesizer, "submit", broken)

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer) as shared:
            with pytest.raises(ZeroDivisionError):
                await shared.generate(MIXED[1])
            np.testing.assert_array_equal((await shared.generate(MIXED[0])).codes, alone[0])

    on_loop(main)


def test_what_fails_on_its_way_is_a_result_or_ends_its_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synthesizer = make()
    push = synthesizer._engine.collect

    def collect() -> Any:
        updates = push()
        for update in updates:
            object.__setattr__(update, "error", "planted")
            object.__setattr__(update, "finish_reason", "error")
        return updates

    monkeypatch.setattr(synthesizer._engine, "collect", collect)

    async def main() -> None:
        async with AsyncSynthesizer(synthesizer) as shared:
            result = await shared.generate(request(1, frames=2))
            assert (result.audio, result.error) == (None, "planted")
            assert result.codes.shape[1] == CONFIG.num_codebooks
            with pytest.raises(SynthesisError, match="planted"):
                await heard(shared.stream(request(1, frames=2)))

    on_loop(main)
