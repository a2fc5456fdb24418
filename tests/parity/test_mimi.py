"""Our Mimi against moshi's and transformers', with the same random weights in all three."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from csm_jax.mimi import model
from csm_jax.mimi.codec import JaxMimi
from csm_jax.mimi.config import MimiConfig, mimi, tiny_mimi
from tests.support.mimi import moshi_model, random_params, transformers_model

FEATURES = 1e-4
"""Encoder output, relative to its largest value: float32 sums in another order through the whole
encoder (measured: 3e-6)."""
SAME_CODES = 0.999
SI_SDR = 60.0
"""dB of the decoded audio (measured: above 100)."""
TIE = 1e-5
"""Two codes whose distances differ by this share of the distance are a tie in float32."""


class Reference(NamedTuple):
    """One of the reference implementations: numpy in the axes of this project, in and out."""

    features: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]


def moshi_reference(config: MimiConfig, params: Any) -> Reference:
    """Returns moshi's MimiModel."""
    net = moshi_model(config, params)

    def wave(audio: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(audio)[None, None]

    return Reference(
        lambda audio: net._encode_to_unquantized_latent(wave(audio))[0].T.numpy(),
        lambda audio: net.encode(wave(audio))[0].T.numpy(),
        lambda codes: net.decode(torch.from_numpy(codes.astype(np.int64)).T[None])[0, 0].numpy(),
    )


def transformers_reference(config: MimiConfig, params: Any) -> Reference:
    """Returns transformers' MimiModel."""
    net = transformers_model(config, params)

    return Reference(
        lambda audio: net.encoder(torch.from_numpy(audio)[None, None]).latents[0].T.numpy(),
        lambda audio: net.encode(torch.from_numpy(audio)[None, None]).audio_codes[0].T.numpy(),
        lambda codes: (
            net.decode(torch.from_numpy(codes.astype(np.int64)).T[None]).audio_values[0, 0].numpy()
        ),
    )


class Case(NamedTuple):
    """One set of weights, and both references with it."""

    config: MimiConfig
    codec: JaxMimi
    params: Any
    references: dict[str, Reference]


SIZES = {
    "tiny": lambda: tiny_mimi(),
    "short context": lambda: dataclasses.replace(tiny_mimi(), context=18),
    "full": lambda: mimi(),
}


@pytest.fixture(
    scope="module",
    params=["tiny", "short context", pytest.param("full", marks=pytest.mark.slow)],
)
def case(request) -> Case:
    config = SIZES[request.param]()
    params = random_params(config, seed=1)
    references = {
        "moshi": moshi_reference(config, params),
        "transformers": transformers_reference(config, params),
    }
    return Case(config, JaxMimi(config, params), params, references)


@pytest.fixture(scope="module")
def audio(case) -> np.ndarray:
    rng = np.random.default_rng(0)
    samples = 40 * case.config.samples_per_frame  # 80 positions; 3.2 s
    time = np.arange(samples) / case.config.sample_rate
    tone = np.sin(2 * np.pi * 180 * time * (1 + 0.1 * np.sin(3 * time)))
    return (0.3 * tone + rng.normal(0, 0.1, samples)).astype(np.float32)


def our_features(case: Case, audio: np.ndarray) -> np.ndarray:
    features, _ = jax.jit(model.encode_features, static_argnames="config")(
        case.codec._params,
        model.init_encode_state(case.config, batch=1),
        audio[None],
        jnp.array([len(audio) // case.config.samples_per_frame]),
        config=case.config,
    )
    return np.asarray(features[0])


@pytest.mark.parametrize("name", ["moshi", "transformers"])
@torch.no_grad()
def test_encoder_output(case, audio, name):
    expected = case.references[name].features(audio)
    ours = our_features(case, audio)
    assert ours.shape == expected.shape
    assert expected.std() > 0.01
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"{name}, {case.config.embed_dim} wide: encoder output differs by {error:.1e}")
    assert error <= FEATURES


@pytest.mark.parametrize("name", ["moshi", "transformers"])
@torch.no_grad()
def test_codes(case, audio, name):
    expected = case.references[name].encode(audio)
    ours = case.codec.encode(audio)
    assert len(np.unique(expected)) > 50
    assert (ours == expected).mean() >= SAME_CODES
    features = our_features(case, audio).astype(np.float64)
    for frame in np.flatnonzero((ours != expected).any(axis=1)):
        for part in (slice(0, 1), slice(1, None)):
            differ = np.flatnonzero(ours[frame, part] != expected[frame, part])
            if len(differ):  # those after the first follow from it
                left = distances(case, features[frame], ours[frame], part, differ[0])
                a, b = left[ours[frame, part][differ[0]]], left[expected[frame, part][differ[0]]]
                assert abs(a - b) <= TIE * max(a, b), (frame, part, differ[0])


def distances(
    case: Case, features: np.ndarray, codes: np.ndarray, part: slice, book: int
) -> np.ndarray:
    """Returns the distance to every vector of one codebook, given the codes before, in float64."""
    weights = case.codec._params["quantizer"]["semantic" if part.start == 0 else "acoustic"]
    tables = np.asarray(weights["table"], np.float64)
    residual = np.asarray(weights["input_proj"], np.float64) @ features
    for earlier in range(book):
        residual = residual - tables[earlier, codes[part][earlier]]
    return np.linalg.norm(tables[book] - residual, axis=1)


@pytest.mark.parametrize("name", ["moshi", "transformers"])
@torch.no_grad()
def test_decoded_audio(case, name):
    rng = np.random.default_rng(5)
    codes = rng.integers(0, case.config.codebook_size, (40, 32), dtype=np.int32)
    expected = case.references[name].decode(codes).astype(np.float64)
    ours = case.codec.decode(codes).astype(np.float64)
    assert ours.shape == expected.shape
    assert expected.std() > 0.01
    level = si_sdr(ours, expected)
    print(f"{name}, {case.config.embed_dim} wide: decoded audio at {level:.0f} dB")
    assert level >= SI_SDR


@torch.no_grad()
def test_fewer_codebooks(case):
    rng = np.random.default_rng(6)
    codes = rng.integers(0, case.config.codebook_size, (6, 8), dtype=np.int32)
    few = JaxMimi(case.config, case.params, num_codebooks=8)
    expected = case.references["moshi"].decode(codes).astype(np.float64)
    assert si_sdr(few.decode(codes).astype(np.float64), expected) >= SI_SDR


def si_sdr(estimate: np.ndarray, target: np.ndarray) -> float:
    """Returns the scale-invariant signal-to-distortion ratio in dB."""
    scaled = target * (estimate @ target) / (target @ target)
    return float(10 * np.log10((scaled @ scaled) / np.square(estimate - scaled).sum()))
