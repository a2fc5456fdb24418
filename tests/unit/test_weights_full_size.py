"""A full-size conversion holds a small part of the file in memory (figures are printed with -s)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from csm_jax.config import csm_1b
from csm_jax.weights.safetensors_io import Output, SafetensorsSource, write_safetensors
from csm_jax.weights.tables import TensorSpec
from tests.support.checkpoints import sesame_shapes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("full") / "sesame"
    directory.mkdir()
    rng = np.random.default_rng(0)
    outputs = [
        Output(
            name,
            TensorSpec("float32", shape),
            lambda shape=shape: [rng.standard_normal(shape, dtype=np.float32)],
        )
        for name, shape in sesame_shapes(csm_1b()).items()
    ]
    # No config.json: tensors of this size are recognised.
    write_safetensors(
        directory / "model.safetensors", outputs, metadata={}, progress=lambda count: None
    )
    return directory


def measured(code: str, *arguments: object) -> tuple[int, float]:
    """Returns (peak resident bytes, seconds) of a Python process."""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code + REPORT, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(result.stdout.split()[-2]) * 1024, time.monotonic() - start


# Not getrusage: its peak includes the moment before exec, when the child is this process's copy.
REPORT = "; print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
CONVERT = "import convert_weights; assert convert_weights.main() == 0"
LOAD = "import sys; from csm_jax import weights; weights.load_checkpoint(sys.argv[1])"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "dtype", "limit"),
    [
        # Two chunks and the largest rearranged tensor, audio_head (260 MB), twice; plus jax itself.
        ("transformers", "float32", 0.25),
        ("csm-mlx", "bfloat16", 0.25),
        # orbax takes the whole tree at once, and writes through buffers.
        ("orbax", "float32", 1.25),
    ],
)
def test_conversion_stays_small(full_size, tmp_path, to, dtype, limit):
    file = full_size / "model.safetensors"
    size = file.stat().st_size
    assert size > 6.2e9
    peak, seconds = measured(CONVERT, full_size, tmp_path / "a", "--to", to, "--dtype", dtype)
    print(
        f"\nsesame -> {to} {dtype}: {size / 1e9:.2f} GB, peak {peak / size:.2f} x, {seconds:.1f} s"
    )
    assert peak <= limit * size
    if dtype == "float32":
        peak, seconds = measured(CONVERT, tmp_path / "a", tmp_path / "b", "--to", "sesame")
        print(f"{to} -> sesame: peak {peak / size:.2f} x, {seconds:.1f} s")
        assert peak <= 0.5 * size
        back = tmp_path / "b" / "model.safetensors"
        one, two = SafetensorsSource([file], where="a"), SafetensorsSource([back], where="b")
        assert one._checksums == two._checksums


@pytest.mark.slow
def test_loading_holds_the_model_once(full_size):
    size = (full_size / "model.safetensors").stat().st_size
    peak, seconds = measured(LOAD, full_size)
    print(f"\nload_checkpoint: peak {peak / size:.2f} x, {seconds:.1f} s")
    assert peak <= 1.3 * size
