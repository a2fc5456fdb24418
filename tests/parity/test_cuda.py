"""The case table on an NVIDIA GPU: ours there, the references on the CPU of the same machine."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from csm_jax.config import tiny

from . import cases
from .cases import CODE_CASES, VALUE_CASES, CodeCase, ValueCase
from .conftest import MIXED_NORM, Models

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("one_thread"), MIXED_NORM]

# torchtune is not everywhere that CUDA is; transformers alone is an oracle too.
REFERENCES = ["transformers"] + ["sesame"] * (importlib.util.find_spec("torchtune") is not None)

each_value = pytest.mark.parametrize("case", VALUE_CASES, ids=lambda c: c.name)
each_code = pytest.mark.parametrize("case", CODE_CASES, ids=lambda c: c.name)
each_reference = pytest.mark.parametrize("reference", REFERENCES)


@pytest.fixture(scope="module")
def models() -> Models:
    """The tiny model, ours on the GPU."""
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"jax has no GPU here: {error}")
    return Models(tiny(), seed=1)


@each_reference
@each_value
def test_float32(models: Models, case: ValueCase, reference: str) -> None:
    theirs = models.outputs(case, reference, "float32")
    cases.check_float32(case, models.outputs(case, "gpu", "float32"), theirs)


@each_value
def test_bfloat16(models: Models, case: ValueCase) -> None:
    cases.check_bfloat16(
        case,
        models.outputs(case, "gpu", "bfloat16"),
        [models.outputs(case, name, "bfloat16") for name in REFERENCES],
        models.outputs(case, REFERENCES[0], "rounded"),
    )


@each_reference
@each_code
def test_codes_float32(models: Models, case: CodeCase, reference: str) -> None:
    cases.check_codes_identical(
        models.config,
        case.prompts(models.config),
        models.codes(case, "gpu", "float32"),
        models.codes(case, reference, "float32"),
        models.get(reference, "float32"),
    )


@each_code
def test_codes_bfloat16(models: Models, case: CodeCase) -> None:
    cases.check_codes_of_equal_merit(
        case,
        models.config,
        models.codes(case, "gpu", "bfloat16"),
        [models.get(name, "bfloat16") for name in REFERENCES],
        models.get(REFERENCES[0], "rounded"),
    )
