"""Which voice is in which shared segment, and who uses it: the host's side of `csm_jax.kvcache.SharedKV`."""

from __future__ import annotations

import itertools


class SegmentTable:
    """Which voice is in which segment, and how many rows use it."""

    def __init__(self, count: int) -> None:
        self._keys: list[str | None] = [None] * count
        self._users = [0] * count
        self._last_use = [0] * count
        self._clock = itertools.count(1)

    def find(self, key: str) -> int | None:
        """Returns the segment a voice is in."""
        return self._keys.index(key) if key in self._keys else None

    def unused(self) -> int | None:
        """Returns the segment nobody has used for the longest time."""
        idle = [i for i, users in enumerate(self._users) if not users]
        return min(idle, key=self._last_use.__getitem__, default=None)

    def put(self, segment: int, key: str | None) -> None:
        """Notes which voice is in a segment, None for no whole one."""
        self._keys[segment] = key

    def use(self, segment: int) -> None:
        """Counts one row more that uses a segment."""
        self._users[segment] += 1
        self._last_use[segment] = next(self._clock)

    def release(self, segment: int) -> None:
        """Counts one row less."""
        self._users[segment] -= 1
