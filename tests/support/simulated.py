"""A device that computes nothing: rows of given lengths end at them, and a clock says when.

Time is that of two workers, the host and the device. The device does what it is told in order, each piece
taking its `Costs`; the host waits where it reads a report, and takes its own time for what it does with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.engine import Job
from csm_jax.generate import PREFILL_BUCKETS, RowSettings, Status, bucket
from csm_jax.request import Request
from csm_jax.slots import Frames, SlotSizes, VoicePrompt


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of simulated time.

    Attributes:
        frame_s: Device: a frame of all slots.
        prefill_s: Device: a group of prompts, inserted.
        chunk_host_s: Host: what it does once the codes of a chunk are read.
        start_host_s: Host: what it does to start a group of prompts.
    """

    frame_s: float = 0.005
    prefill_s: float = 0.0025
    chunk_host_s: float = 0.002
    start_host_s: float = 0.002


def job(length: int, *, config: CSMConfig, max_frames: int, prompt: int = 32) -> Job:
    """Returns a job whose row ends after `length` frames, unless its cap comes before.

    The length stands where a real prompt has the text: in its ids.
    """
    frames = np.zeros((prompt, config.num_codebooks + 1), np.int32)
    frames[:, -1] = length
    mask = np.zeros(frames.shape, bool)
    mask[:, -1] = True
    # In the middle of the cap's last frame, where rounding does not reach.
    request = Request(text="", speaker=0, max_audio_length_ms=80 * max_frames + 40)
    return Job(request=request, prompt=(frames, mask))


class SimulatedSlots:
    """A `csm_jax.engine.Device`.

    Attributes:
        now: The host's clock.
        ready: When the device has done all it was told.
        prefills: Groups of prompts it has read.
        spent: Real seconds that went into simulating, to be taken off the engine's own.
    """

    lost = False

    def __init__(self, config: CSMConfig, sizes: SlotSizes, costs: Costs, *, seed: int = 0) -> None:
        self.config, self.sizes, self.costs = config, sizes, costs
        self.now = self.ready = self.spent = 0.0
        self.prefills = 0
        self._rng = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        slots = self.sizes.slots
        self._made, self._length, self._cap = (np.zeros(slots, np.int64) for _ in range(3))
        self._status = np.full(slots, Status.EMPTY, np.int32)

    def prefill_size(self, length: int) -> int:
        return bucket(length, PREFILL_BUCKETS, limit=self.config.backbone.max_seq_len)

    def prefill(self, prompts: Sequence[Frames], segments: Sequence[int]) -> list[int]:
        self.prefills += 1
        self._work(self.costs.prefill_s)
        return [int(frames[-1, -1]) for frames, _ in prompts]

    def insert(self, prefix: list[int], settings: RowSettings, slots: Sequence[int]) -> None:
        begun = time.perf_counter()
        self.now += self.costs.start_host_s
        rows = np.asarray(slots)
        if (self._status[rows] == Status.RUNNING).any():
            raise RuntimeError(f"a row still runs in one of the slots {slots}")
        self._made[rows], self._length[rows] = 0, prefix
        self._cap[rows] = np.asarray(settings.max_frames)[: len(rows)]
        self._status[rows] = Status.RUNNING
        self.spent += time.perf_counter() - begun

    def advance(self, longest: int, ranks: int) -> SimulatedReport:
        begun = time.perf_counter()
        frames = self.sizes.chunk_frames
        self._work(frames * self.costs.frame_s)
        running = self._status == Status.RUNNING
        left = np.minimum(self._length, self._cap) - self._made
        counts = np.where(running, np.minimum(left, frames), 0).astype(np.int32)
        self._made += counts
        self._status[running & (self._made == self._cap)] = Status.LENGTH
        # The frame that ends a row is one the model must make, too.
        self._status[running & (self._made == self._length) & (counts < frames)] = Status.EOS
        codes = np.ones((self.sizes.slots, frames, self.config.num_codebooks), np.int32)
        codes[:, :, 0] = self._rng.integers(1, self.config.codebook_size, codes.shape[:2])
        report = SimulatedReport(self, self.ready, codes, counts, self._status.copy())
        self.spent += time.perf_counter() - begun
        return report

    def free(self, slots: Sequence[int]) -> None:
        self._status[list(slots)] = Status.EMPTY

    def share(self, voice: VoicePrompt, segment: int) -> bool:
        raise NotImplementedError("no voices here")

    def _work(self, seconds: float) -> None:
        self.ready = max(self.ready, self.now) + seconds


@dataclass(frozen=True, eq=False)
class SimulatedReport:
    """What a chunk made."""

    slots: SimulatedSlots
    ready: float
    codes: np.ndarray
    counts: np.ndarray
    status: np.ndarray

    def wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the arrays, having waited for them."""
        self.slots.now = max(self.slots.now, self.ready) + self.slots.costs.chunk_host_s
        return self.codes, self.counts, self.status
