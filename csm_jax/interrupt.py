"""Ctrl-C, as the command line handles it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 130
"""The shell's code for a process ended by Ctrl-C (128 + SIGINT)."""


class Interrupt:
    """Ctrl-C that acts at once and cannot get lost.

    Python runs a signal's handler between two of its own instructions: only after a long call into a
    library, such as compiling, and sometimes inside a callback of one, where an exception is
    printed and dropped. So, once installed, a thread of its own hears the key and ends the process
    there and then, except while there are files to tidy up (`tidying`, `writing`): then the key raises
    `KeyboardInterrupt` or just waits, is remembered in any case, and a second one ends the process.
    """

    def __init__(self) -> None:
        self.pending = False
        self._installed = False
        self._tidying = self._writing = 0
        self._lock = threading.RLock()

    def install(self) -> None:
        """Takes over this process's Ctrl-C; main thread only."""
        signal.signal(signal.SIGINT, self)
        self._installed = True
        report = sys.unraisablehook

        def quiet(unraisable: sys.UnraisableHookArgs) -> None:
            if not (self.pending and issubclass(unraisable.exc_type, KeyboardInterrupt)):
                report(unraisable)

        sys.unraisablehook = quiet
        if os.name == "posix":  # elsewhere the handler alone has to do
            heard, tell = os.pipe()
            os.set_blocking(tell, False)
            signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handles the signal, in the main thread.

        Raises:
            KeyboardInterrupt: Unless it ends the process, or waits.
        """
        again, self.pending = self.pending, True
        if self._installed and (again or not self._tidying):
            self.stop()
        if not self._writing:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if the key was pressed at any time."""
        if self.pending:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def tidying(self) -> Iterator[None]:
        """While it lasts, Ctrl-C raises: something has to be undone before the process ends."""
        with self._lock:  # never while the other thread is ending the process
            self._tidying += 1
        try:
            yield
        finally:
            self._tidying -= 1

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While it lasts, Ctrl-C waits for `check`: a file is written, which takes no time."""
        with self.tidying():
            self._writing += 1
            try:
                yield
            finally:
                self._writing -= 1

    def stop(self) -> None:
        """Says that the run was interrupted, and ends the process.

        Not through the interpreter's shutdown: it takes apart the runtime under a computation that is
        still running on another thread, which crashes now and then.
        """
        with self._lock:
            # Below Python's streams, whose locks the main thread may hold. A terminal shows ^C first.
            os.write(2, b"\ncsm-jax: interrupted\n" if os.isatty(2) else b"csm-jax: interrupted\n")
            os._exit(EXIT_INTERRUPTED)

    def _listen(self, heard: int) -> None:
        presses = 0
        while byte := os.read(heard, 1):
            presses += byte[0] == signal.SIGINT
            with self._lock:
                # A first one that the main thread has heard as well is its own.
                if presses > 1 or (presses and not (self.pending or self._tidying)):
                    self.stop()
