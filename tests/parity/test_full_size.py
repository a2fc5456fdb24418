"""The case table at CSM-1B's size: 1.55 billion random float32 weights, against both references.

All implementations share the memory of the weights (6.2 GB), except for the rows of q and k that are
reordered and our audio heads, which are transposed: about 8 GB in all, plus activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from csm_jax.config import csm_1b

from . import cases
from .cases import CODE_CASES, VALUE_CASES, CodeCase, ValueCase
from .conftest import REFERENCES, Models

pytestmark = pytest.mark.slow

NEEDED_GIB = 12


def _available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


@pytest.fixture(scope="module")
def full_size() -> Iterator[Models]:
    """CSM-1B in every implementation, freed after this module."""
    available = _available_gib()
    if available < NEEDED_GIB:
        pytest.skip(f"{available:.1f} GiB of memory available, {NEEDED_GIB} GiB needed")
    models = Models(csm_1b(), seed=2)
    yield models
    models.free()


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("case", VALUE_CASES, ids=lambda c: c.name)
def test_float32(full_size: Models, case: ValueCase, reference: str) -> None:
    theirs = full_size.outputs(case, reference, "float32")
    ours = full_size.outputs(case, "cpu", "float32")
    cases.check_float32(case, ours, theirs, full_size=True)


@pytest.mark.parametrize("case", CODE_CASES, ids=lambda c: c.name)
def test_codes_float32(full_size: Models, case: CodeCase) -> None:
    """Identical to Sesame's loop, one prompt at a time, for 32 frames and in a mixed batch."""
    cases.check_codes_identical(
        full_size.config,
        case.prompts(full_size.config),
        full_size.codes(case, "cpu", "float32"),
        full_size.codes(case, "sesame", "float32"),
        full_size.get("sesame", "float32"),
    )
