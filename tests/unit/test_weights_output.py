"""Placing finished files: nothing comes between the renames."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from csm_jax.weights.output import _uninterrupted


def test_ctrl_c_waits_for_the_renames_whatever_threads_there_are() -> None:
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    before, done = signal.getsignal(signal.SIGINT), []

    def commit() -> None:
        with _uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            done.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            commit()
    finally:
        ended.set()
        other.join()
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is before
