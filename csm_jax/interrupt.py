"""Ctrl-C, as the command line handles it."""

from __future__ import annotations

from types import FrameType


class Interrupt:
    """Ctrl-C that cannot get lost.

    Python drops an exception raised inside a destructor or a callback of a C library, and JAX runs
    both all the time: so the key press is also remembered, and looked at after every chunk.
    """

    def __init__(self) -> None:
        self.pending = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handles the signal.

        Raises:
            KeyboardInterrupt: Always.
        """
        self.pending = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if the key was pressed at any time."""
        if self.pending:
            raise KeyboardInterrupt
