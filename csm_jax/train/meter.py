"""How fast a run goes: frames, model FLOPs and memory between two lines of its log."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np

from csm_jax import sharding
from csm_jax.config import FRAME_RATE, CSMConfig
from csm_jax.data.batch import Batch
from csm_jax.train.cost import peak_flops, step_flops
from csm_jax.train.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step is: frames of audio read, model FLOPs, share of positions that are no padding."""

    frames: int
    flops: float
    fill: float


class Meter:
    """Throughput since it was last read."""

    def __init__(self, config: CSMConfig, settings: RunSettings) -> None:
        self.first_s: float | None = None
        self._config, self._settings = config, settings
        self._peak = peak_flops(jax.devices()[0])
        self.restart()

    def restart(self) -> None:
        """Begins to count anew."""
        self._begun = self._paused = time.perf_counter()
        self._frames, self._flops, self._fill = 0, 0.0, 1.0

    def pause(self) -> None:
        """Stops the clock: what comes is no training."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Lets it go on."""
        self._begun += time.perf_counter() - self._paused

    def weigh(self, batch: Batch, *, fill: float) -> Work:
        """Returns the work of a step, given one process's batch."""
        hosts, s = jax.process_count(), self._settings
        sound = np.asarray(batch.mask)[..., 0]
        positions = int((np.asarray(batch.segments) > 0).sum()) * hosts
        rows = math.prod(batch.segments.shape[:-1]) * hosts
        seen = rows * -(-batch.segments.shape[-1] // s.amortization_ratio)
        flops = step_flops(
            self._config,
            positions=positions,
            decoder_frames=min(seen, positions),
            trained=s.method,
            max_length=s.max_length,
        )
        return Work(frames=int(sound.sum()) * hosts, flops=flops, fill=fill)

    def add(self, work: Work) -> None:
        """Counts a step that is done."""
        self._frames += work.frames
        self._flops += work.flops
        self._fill = work.fill

    def read(self) -> dict[str, float | None]:
        """Returns the figures since the last reading, and begins anew."""
        seconds = max(time.perf_counter() - self._begun, 1e-9)
        mesh = sharding.current_mesh()
        devices = 1 if mesh is None else mesh.size
        mfu = None if self._peak is None else self._flops / seconds / (self._peak * devices)
        found = {
            "frames_per_s": self._frames / seconds,
            "audio_s_per_s": self._frames / FRAME_RATE / seconds,
            "mfu": mfu,
            "fill": self._fill,
            "peak_memory_bytes": peak_memory(),
        }
        self.restart()
        return found


def peak_memory() -> int:
    """Returns the most bytes used so far: of the first device, or of the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
