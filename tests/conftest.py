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
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "test-jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
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
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory like any other, with random weights: what `make demo` speaks with."""
    from tests.support.demo import build

    return build(tmp_path_factory.mktemp("demo") / "model")
