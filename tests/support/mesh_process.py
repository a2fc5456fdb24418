"""One of several processes that share a mesh: `python mesh_process.py PROCESSES PROCESS PORT OUT`.

Each runs the same engine loop on the same jobs and writes the codes it got, and the codec's samples.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

DEVICES = 8


def main(processes: int, process: int, port: str, out: str) -> None:
    """Makes the codes of all jobs, and writes them."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    import jax

    # Before anything asks for a device.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", processes, process, heartbeat_timeout_seconds=30
    )
    import numpy as np

    from csm_jax.mimi.codec import JaxMimi
    from csm_jax.mimi.config import tiny_mimi
    from csm_jax.mimi.params import init_params
    from tests.support.mesh import SHAPES, jobs_of, mesh_of, slots_of, speak, split_config

    config = split_config()
    mesh = mesh_of(SHAPES["4x2"])
    slots = slots_of(config, mesh)
    # Rows are spread over the processes, and still each of them reads all rows.
    assert slots._state.cache.k[0].is_fully_addressable == (processes == 1)
    jobs = jobs_of(config)
    codes = speak(slots, jobs, look_ahead=True)
    compiled = slots.compilations
    for again, first in zip(speak(slots, jobs, look_ahead=False), codes, strict=True):
        np.testing.assert_array_equal(again, first)
    assert slots.compilations == compiled

    sizes = tiny_mimi()
    codec = JaxMimi(sizes, init_params(sizes, jax.random.key(0)), num_codebooks=2)
    with jax.set_mesh(mesh):
        rows = codec.open_rows(8, 2)
    wait = rows.begin({0: np.ones((2, 2), np.int32), 5: np.full((1, 2), 3, np.int32)}, [0, 5])
    samples = {f"row {row}": audio for row, audio in wait().items()}
    np.savez(out, *codes, **samples)
    print("done", flush=True)
    if os.environ.get("WAIT_FOR_EVER"):
        while True:
            speak(slots, jobs, look_ahead=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
