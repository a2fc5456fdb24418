"""Codes of many utterances to audio: the codec as a batch stage behind the engine.

Each utterance has a row of the codec while it is decoded, and the row then goes to the next one. A stage
is told what has come (`push`) and asked what is ready (`run`); a call that `run` starts is fetched by the
next `run`, so that the devices work on it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from csm_jax.codec import CodecRows

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Decoded(Generic[K]):
    """Audio of one utterance.

    Attributes:
        key: Whose.
        audio: The next samples, float32 `[W]`.
        last: Whether they end it.
    """

    key: K
    audio: np.ndarray
    last: bool


@dataclass(eq=False)
class _Utterance(Generic[K]):
    key: K
    row: int = -1
    begun: bool = False
    last: bool = False
    pieces: list[np.ndarray] = field(default_factory=list)
    frames: int = 0

    def take(self, most: int) -> np.ndarray:
        codes = np.concatenate(self.pieces)
        self.pieces = [codes[most:]]
        self.frames = len(self.pieces[0])
        return codes[:most]


class DecodeStage(Generic[K]):
    """Utterances that are being decoded."""

    def __init__(self, rows: CodecRows) -> None:
        self._rows = rows
        self._free = list(range(rows.rows))[::-1]
        self._utterances: dict[K, _Utterance[K]] = {}
        self._started: list[
            tuple[Callable[[], dict[int, np.ndarray]], list[tuple[K, int, bool]]]
        ] = []
        self._ready: list[Decoded[K]] = []

    @property
    def busy(self) -> bool:
        """Whether audio is still to come of what was pushed."""
        return bool(self._started or self._ready) or any(
            u.frames or u.last for u in self._utterances.values()
        )

    def unfinished(self) -> list[K]:
        """Returns the utterances whose audio has not all been given, also after a failure."""
        ready = [part.key for part in self._ready]
        started = [key for _, calls in self._started for key, _, _ in calls]
        return list(dict.fromkeys([*ready, *started, *self._utterances]))

    def push(self, key: K, codes: np.ndarray, *, last: bool) -> None:
        """Takes an utterance's next codes (int [n, C]; n may be 0), and whether they are its last."""
        utterance = self._utterances.setdefault(key, _Utterance(key))
        if len(codes):
            utterance.pieces.append(codes)
            utterance.frames += len(codes)
        utterance.last = last

    def drop(self, key: K) -> None:
        """Forgets an utterance: no more of its audio is given, and its row is free at once."""
        utterance = self._utterances.pop(key, None)
        if utterance is not None and utterance.row >= 0:
            self._free.append(utterance.row)
        self._started = [
            (wait, [call for call in calls if call[0] != key]) for wait, calls in self._started
        ]
        self._ready = [part for part in self._ready if part.key != key]

    def start(self) -> None:
        """Starts calls for all that has come; a later `run` waits for them.

        Raises:
            jax.errors.JaxRuntimeError: As `run`.
        """
        while self._start(full=False):
            pass

    def run(self, *, flush: bool) -> list[Decoded[K]]:
        """Returns the audio of the calls that were started before, and starts new ones.

        Args:
            flush: Start calls that are not full as well, and wait for all of them. Without it, a call
                is started when every row has frames for it.

        Raises:
            jax.errors.JaxRuntimeError: The device fails; the stage is of no more use but to say what
                is `unfinished`.
        """
        self._fetch()
        while self._start(full=not flush):
            pass
        if flush:
            self._fetch()
        ready, self._ready = self._ready, []
        return ready

    def _start(self, *, full: bool) -> bool:
        for utterance in self._utterances.values():
            if utterance.row < 0 and (utterance.frames or utterance.last) and self._free:
                utterance.row = self._free.pop()
        work = [u for u in self._utterances.values() if u.row >= 0 and (u.frames or u.last)]
        if not work or (full and len(work) < self._rows.rows):
            return False
        codes: dict[int, np.ndarray] = {}
        fresh: list[int] = []
        calls: list[tuple[K, int, bool]] = []
        for utterance in work:
            row = utterance.row
            if utterance.frames:
                codes[row] = utterance.take(self._rows.frames)
                if not utterance.begun:
                    fresh.append(row)
                    utterance.begun = True
            calls.append((utterance.key, row, utterance.last and not utterance.frames))
        self._started.append((self._rows.begin(codes, fresh) if codes else dict, calls))
        for key, row, ended in calls:
            if ended:
                del self._utterances[key]
                self._free.append(row)
        return True

    def _fetch(self) -> None:
        while self._started:
            wait, calls = self._started[0]
            audio = wait()
            self._ready += [
                Decoded(key, audio.get(row, _NOTHING), last) for key, row, last in calls
            ]
            del self._started[0]


_NOTHING = np.zeros(0, np.float32)
