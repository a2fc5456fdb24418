"""Set up before anything imports jax: devices, the compilation cache, and types as tests."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# On the CPU, whatever the machine has, unless the accelerator's tests are asked for by their marker.
# Read from the command line: a conftest below this one may import jax before pytest has parsed it.
# pytest-xdist's workers inherit the result.
if not re.search(r"(?:^| )-m[ =]?(?!.*\bnot (cuda|tpu)\b).*\b(cuda|tpu)\b", " ".join(sys.argv)):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices for the sharding tests. Everything else runs on the first one, at the same speed.
# Programs compiled in one part, not in many that several threads share: the workers are that many already,
# and most of the tests' time is compilation (a fifth less of it so).
for flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",
):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
# Shared by pytest-xdist's workers and by the processes that tests start. With a bound on its size comes a
# lock: without one, a program is read while another process writes it. A directory of your own keeps its
# settings: JAX reads only those entries under a bound that were written under one.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / "build" / "test-compilations")
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2 << 30)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Threads of torch that wait for work keep the others from the cores. Among several workers, one is enough
# for what the tests compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the tests may reach for the network.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "agg")

from jaxtyping import install_import_hook  # noqa: E402

import tests.support.typecheck  # noqa: E402, F401  (the hook looks it up by its dotted name)

# Every annotated shape and type of the package is checked at each call.
_hook = install_import_hook("csm_jax", "tests.support.typecheck.check")
_hook.__enter__()

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory like any other, with random weights: its speech is noise."""
    from filelock import FileLock

    from tests.support.model_directory import build

    if "PYTEST_XDIST_WORKER" not in os.environ:
        return build(tmp_path_factory.mktemp("random") / "model")
    # The first worker builds it for all.
    model = tmp_path_factory.getbasetemp().parent / "random-model"
    with FileLock(model.with_suffix(".lock")):
        if not model.exists():
            build(model.with_suffix(".part")).rename(model)
    return model
