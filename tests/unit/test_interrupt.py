"""Ctrl-C in real processes, held where the signal is to meet them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from csm_jax.interrupt import Interrupt

ROOT = Path(__file__).resolve().parents[2]

_START = "import time\nfrom csm_jax.interrupt import Interrupt\ni = Interrupt()\ni.install()\n"
# One call into C that looks at no signals and lets other threads run, as compiling does: minutes.
_BUSY = "import hashlib\nprint('now', flush=True)\nhashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
# An exception inside a destructor is printed and dropped.
_LOST = (
    "class A:\n    def __del__(self):\n        print('now', flush=True)\n        time.sleep(20)\n"
    "a = A()\nwith i.tidying():\n    del a\n    print('after', i.pending, flush=True)\n"
)


def run(code: str, *, presses: int = 1) -> tuple[int, str, str, float]:
    """Returns status, rest of stdout, stderr and seconds after the keys, pressed once `now` is said."""
    process = subprocess.Popen(
        [sys.executable, "-c", _START + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        time.sleep(0.2)
        started = time.monotonic()
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err, time.monotonic() - started
    finally:
        process.kill()
        process.communicate()


def test_it_does_not_wait_for_a_library() -> None:
    status, _, err, seconds = run(_BUSY)
    assert (status, err) == (130, "csm-jax: interrupted\n")
    assert seconds < 10  # 0.2 on an idle machine


def test_a_lost_one_is_silent_and_remembered() -> None:
    status, out, err, _ = run(_LOST + "i.check()")
    assert status == -signal.SIGINT  # an uncaught KeyboardInterrupt
    assert out == "after True\n"
    assert "Exception ignored" not in err
    assert err.rstrip().endswith("KeyboardInterrupt")  # of check()


def test_other_errors_in_destructors_are_still_reported() -> None:
    code = _LOST.replace("time.sleep(20)", "raise ValueError('mine')")
    _, _, err, _ = run(code + "time.sleep(20)")
    assert "ValueError: mine" in err


def test_a_second_one_ends_at_once() -> None:
    status, _, err, seconds = run(
        "with i.tidying():\n    " + _BUSY.replace("\n", "\n    "), presses=2
    )
    assert (status, err) == (130, "csm-jax: interrupted\n")
    assert seconds < 10


def test_it_waits_for_a_file_to_be_written(tmp_path: Path) -> None:
    code = (
        "with i.writing():\n    print('now', flush=True)\n    time.sleep(1)\n    print('written')\n"
    )
    status, out, _, _ = run(code + "i.check()")
    assert (status, out) == (-signal.SIGINT, "written\n")


def test_without_being_installed_it_raises() -> None:
    interrupt = Interrupt()
    interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()
    with interrupt.writing(), contextlib.ExitStack() as stack:
        stack.callback(interrupt, signal.SIGINT, None)
