"""Tiny random models against both references, layer by layer, in float32 and bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from csm_jax.sampling import frame_keys, gumbel, request_keys

from . import cases, inputs
from .cases import CODE_CASES, VALUE_CASES, CodeCase, ValueCase
from .conftest import MIXED_NORM, REFERENCES, Models

pytestmark = [pytest.mark.usefixtures("one_thread"), MIXED_NORM]

each_value = pytest.mark.parametrize("case", VALUE_CASES, ids=lambda c: c.name)
each_code = pytest.mark.parametrize("case", CODE_CASES, ids=lambda c: c.name)
each_reference = pytest.mark.parametrize("reference", REFERENCES)


@each_value
def test_references_agree_in_float32(tiny_models: Models, case: ValueCase) -> None:
    # Neither shares code with the other, so a mistake in one of them shows here, not as ours.
    theirs = [tiny_models.outputs(case, name, "float32") for name in REFERENCES]
    cases.check_float32(case, *theirs)


@each_code
def test_references_agree_on_codes(tiny_models: Models, case: CodeCase) -> None:
    theirs = [tiny_models.codes(case, name, "float32") for name in REFERENCES]
    cases.check_codes_identical(
        tiny_models.config,
        case.prompts(tiny_models.config),
        *theirs,
        tiny_models.get("transformers", "float32"),
    )


@each_reference
@each_value
def test_float32(tiny_models: Models, case: ValueCase, reference: str) -> None:
    theirs = tiny_models.outputs(case, reference, "float32")
    cases.check_float32(case, tiny_models.outputs(case, "cpu", "float32"), theirs)


@each_value
def test_bfloat16(tiny_models: Models, case: ValueCase) -> None:
    cases.check_bfloat16(
        case,
        tiny_models.outputs(case, "cpu", "bfloat16"),
        [tiny_models.outputs(case, name, "bfloat16") for name in REFERENCES],
        tiny_models.outputs(case, "sesame", "rounded"),
    )


@each_reference
@each_code
def test_codes_float32(tiny_models: Models, case: CodeCase, reference: str) -> None:
    cases.check_codes_identical(
        tiny_models.config,
        case.prompts(tiny_models.config),
        tiny_models.codes(case, "cpu", "float32"),
        tiny_models.codes(case, reference, "float32"),
        tiny_models.get(reference, "float32"),
    )


@each_code
def test_codes_bfloat16(tiny_models: Models, case: CodeCase) -> None:
    cases.check_codes_of_equal_merit(
        case,
        tiny_models.config,
        tiny_models.codes(case, "cpu", "bfloat16"),
        [tiny_models.get(name, "bfloat16") for name in REFERENCES],
        tiny_models.get("sesame", "rounded"),
    )


@pytest.mark.parametrize(("temperature", "topk"), [(0.9, 50), (1.3, 200)])
def test_sampled_codes_with_the_same_noise(
    tiny_models: Models, temperature: float, topk: int
) -> None:
    """Sesame's sampler is fed the noise that our seed gives: argmax(p / q) with q = exp(-gumbel)."""
    from .reference.sesame import sample_topk

    config, seed = tiny_models.config, 7
    ours, theirs = (tiny_models.get(name, "float32") for name in ("cpu", "sesame"))

    def exponential(logits: torch.Tensor, frame: int, codebook: int) -> torch.Tensor:
        keys = frame_keys(request_keys([seed]), jnp.array([frame]))
        noise = gumbel(keys, codebook, num_codes=config.audio_vocab_size)
        return torch.from_numpy(np.exp(-np.asarray(noise)))

    choose = sample_topk(
        topk=topk,
        temperature=temperature,
        exponential=exponential,
        codebook_size=config.codebook_size,
    )
    prompt = inputs.random_prompt(config, text=5, audio=4, seed=32)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = theirs.generate_one(prompt, 6, choose)
    greedy = theirs.generate_one(prompt, 6, theirs.greedy())
    assert not np.array_equal(expected, greedy), "the noise changed nothing: nothing is tested"
    (codes,) = ours.sample([prompt], 6, temperature=temperature, topk=topk, seed=seed)
    np.testing.assert_array_equal(codes, expected)


def test_transformers_generate_in_a_padded_batch(tiny_models: Models) -> None:
    """transformers pads a batch on the left and masks it; we pad on the right, per-row lengths."""
    config = tiny_models.config
    prompts = [inputs.random_text(config, length, seed=40 + length) for length in (3, 11, 6, 17)]
    theirs = tiny_models.get("transformers", "float32").generate_text(prompts, 6)
    ours = tiny_models.get("cpu", "float32").generate(prompts, 6)
    np.testing.assert_array_equal(np.stack(ours), theirs)


def test_reserved_codes_are_never_chosen(tiny_models: Models) -> None:
    """With heads that prefer a reserved code everywhere, ours draws none and equals the reference."""
    from .ours import Ours
    from .reference.sesame import SesameReference, greedy

    config = tiny_models.config
    weights = dict(tiny_models.weights("float32"))
    reserved, best = config.audio_vocab_size - 1, 5
    for name in ("codebook0_head.weight", "audio_head"):
        head = weights[name].clone()
        vocab = head.shape.index(config.audio_vocab_size)
        # Twice the logits of a code that is often the best one.
        head.select(vocab, reserved).copy_(2 * head.select(vocab, best))
        weights[name] = head
    prompt = inputs.random_text(config, 9, seed=50)
    sesame = SesameReference(config, weights)
    unmasked = sesame.generate_one(prompt, 4, greedy())
    assert (unmasked == reserved).any(), "no reserved code was tempting: nothing is tested"
    masked = sesame.generate_one(prompt, 4, greedy(codebook_size=config.codebook_size))
    (codes,) = Ours(config, weights, device=jax.devices("cpu")[0]).generate([prompt], 4)
    assert codes.max() < config.codebook_size
    np.testing.assert_array_equal(codes, masked)
