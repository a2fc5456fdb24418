"""The networks in torch; what is around them is tested in test_watermark.py."""

import numpy as np
import pytest
import torch

from csm_jax.bridge import silentcipher as networks_module
from csm_jax.bridge.watermark import TorchWatermarker
from csm_jax.watermark import JaxWatermarker
from tests.support import silentcipher as support

RATE = support.SMALL["SR"]
KEY = (1, 35, 69, 103, 255)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("silentcipher") / "random"
    return support.write_random(path, hparams=support.SMALL, width=support.SMALL_WIDTH)


@pytest.fixture(scope="module")
def torch_marker(directory):
    return TorchWatermarker.from_dir(directory)


@pytest.fixture(scope="module")
def jax_marker(directory):
    return JaxWatermarker.from_dir(directory)


@pytest.mark.parametrize("samples", [1, 700, 4000])
def test_marks_are_jaxs(torch_marker, jax_marker, samples):
    x = support.noise(samples)
    y = torch_marker.embed(x, RATE, KEY)
    np.testing.assert_allclose(y, jax_marker.embed(x, RATE, KEY), atol=1e-6)
    assert np.abs(y - x).max() > 1e-5


def test_streams_are_jaxs(torch_marker, jax_marker):
    x = support.noise(12_000)
    outputs = []
    for marker in (torch_marker, jax_marker):
        stream = marker.open_stream(24000, KEY)
        outputs.append(np.concatenate([stream.push(x), stream.flush()]))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-6)


def test_scores_are_jaxs(torch_marker, jax_marker):
    audios = [support.noise(n * 256) for n in (30, 4, 70)]
    for ours, theirs in zip(
        torch_marker._networks.read(audios), jax_marker._networks.read(audios), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_chunks_have_no_seams(torch_marker, monkeypatch):
    x = support.noise(4000)
    expected = torch_marker.embed(x, RATE, KEY)
    monkeypatch.setattr(networks_module, "_CHUNK_FRAMES", 3)
    np.testing.assert_allclose(torch_marker.embed(x, RATE, KEY), expected, atol=1e-6)


def test_nothing_keeps_gradients(torch_marker):
    torch_marker.embed(support.noise(700), RATE, KEY)
    assert torch.is_grad_enabled()
    assert not any(layer.weight.requires_grad for layer in torch_marker._networks._reader)
