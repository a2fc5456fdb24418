"""Two processes that share a mesh make what one makes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "mesh_process.py"


@contextlib.contextmanager
def started(count: int, out: Path, **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Yields the processes of one mesh; none outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as stack:
        processes = []
        for i in range(count):
            words = [str(count), str(i), port, str(out / f"{count}-{i}.npz")]
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | environment,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    for count in (2, 1):
        with started(count, tmp_path) as processes:
            for process in processes:
                output, _ = process.communicate(timeout=600)
                assert process.returncode == 0, output[-4000:]
    one = np.load(tmp_path / "1-0.npz")
    assert len(one.files) == 20 + 2
    assert np.abs(one["row 0"]).max() > 0
    for name in ("2-0.npz", "2-1.npz"):
        two = np.load(tmp_path / name)
        assert sorted(two.files) == sorted(one.files)
        for key in one.files:
            tolerance = 1e-5 if key.startswith("row") else 0
            np.testing.assert_allclose(two[key], one[key], rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.slow
def test_a_killed_process_takes_the_others_with_it(tmp_path: Path) -> None:
    """What `docs/sharding.md` says: the processes of a mesh live and die together."""
    with started(2, tmp_path, WAIT_FOR_EVER="1") as (survivor, victim):
        for process in (survivor, victim):
            assert process.stdout is not None
            while (line := process.stdout.readline()) != "done\n":
                assert line, f"ended with {process.wait()} before it was done"
        victim.kill()
        killed = time.monotonic()
        output, _ = survivor.communicate(timeout=120)
        print(f"{time.monotonic() - killed:.1f} s; {survivor.returncode}; {output[-1000:]}")
        assert survivor.returncode != 0
