"""Codec and watermark behind an engine on a mesh give one device's audio."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from csm_jax.jobs import JobMaker
from csm_jax.mimi.codec import JaxMimi
from csm_jax.mimi.config import tiny_mimi
from csm_jax.mimi.params import init_params
from csm_jax.model import param_shardings
from csm_jax.prompt import TextTokenizer
from csm_jax.request import Request
from csm_jax.synthesizer import Synthesizer
from csm_jax.synthesizer_settings import SynthesizerSettings
from csm_jax.voices import Voice
from tests.support.mesh import SHAPES, SIZES, mesh_of, split_config
from tests.support.model import params_of
from tests.support.synthesizer import Marker, voice
from tests.support.tokenizer import build_tokenizer

CONFIG = dataclasses.replace(
    split_config(), text_vocab_size=512, audio_vocab_size=260, codebook_size=256
)
SETTINGS = SynthesizerSettings(
    slots=8,
    capacity=SIZES.capacity,
    chunk_frames=2,
    prefill_rows=4,
    look_ahead=True,
    voice_segments=1,
    voice_capacity=SIZES.segment_capacity,
    codec_rows=8,
    codec_frames=2,
    stop_repetition=False,
)

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8"
)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """What both synthesizers share."""
    mimi = tiny_mimi()
    weights = init_params(mimi, jax.random.key(0))
    codec = JaxMimi(mimi, weights, num_codebooks=CONFIG.num_codebooks)
    tokenizer = TextTokenizer(build_tokenizer(vocab_size=CONFIG.text_vocab_size))
    return {
        "jobs": JobMaker(CONFIG, tokenizer, codec),
        "codec": codec,
        "watermarker": Marker(),
        "settings": SETTINGS,
    }


@pytest.fixture(scope="module")
def one(parts: dict[str, Any]) -> Synthesizer:
    return Synthesizer(params=params_of(CONFIG), **parts)


@pytest.fixture(scope="module")
def many(parts: dict[str, Any]) -> Synthesizer:
    mesh = mesh_of(SHAPES["4x2"])
    params = jax.device_put(params_of(CONFIG), param_shardings(CONFIG, mesh))
    return Synthesizer(params=params, mesh=mesh, **parts)


def request(seed: int, *, frames: int = 6, voice: Voice | None = None) -> Request:
    return Request(
        text="a",
        speaker=0,
        seed=seed,
        voice=voice,
        temperature=0.0 if seed % 2 else 1.5,
        max_audio_length_ms=80 * frames,
    )


def test_audio_is_that_of_one_device(one: Synthesizer, many: Synthesizer) -> None:
    known = voice(1, frames=8, codebooks=CONFIG.num_codebooks)
    requests = [
        request(seed, frames=1 + seed, voice=known if seed % 3 else None) for seed in range(9)
    ]
    alone = {result.id: result for result in one.run(enumerate(requests))}
    results = {result.id: result for result in many.run(enumerate(requests))}
    assert results.keys() == alone.keys() == set(range(9))
    for id, want in alone.items():
        got = results[id]
        assert got.error is None
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_allclose(got.audio, want.audio, rtol=0, atol=1e-5)
    assert max(len(result.audio) for result in results.values()) >= 4 * 1920
    assert max(result.audio.std() for result in results.values()) > 0.01
    # The rows of the codec are split, and each device holds all of its weights.
    rows = many._whole._rows
    ring = rows._state["transformer"]["layers"]["0"]["k"]
    assert ring.sharding.shard_shape(ring.shape)[0] == SETTINGS.codec_rows // 4


def test_a_stream_goes_on_outside_of_the_mesh(one: Synthesizer, many: Synthesizer) -> None:
    want = list(one.stream(request(3, frames=8)))
    with jax.set_mesh(mesh_of(SHAPES["4x2"])):
        stream = many.stream(request(3, frames=8))
        first = next(stream)
    got = [first, *stream]
    assert len(got) == len(want)
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), rtol=0, atol=1e-5)
