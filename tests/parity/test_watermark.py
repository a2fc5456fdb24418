"""The watermark against the silentcipher package on the same random, or readable, weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from csm_jax.bridge.watermark import TorchWatermarker
from csm_jax.watermark import JaxWatermarker
from csm_jax.watermark.interface import gain_of
from tests.support import silentcipher as support

KEY = (1, 35, 69, 103, 255)
SMALL_RATE, HOP = support.SMALL["SR"], support.SMALL["HOP_LENGTH"]

# Of samples around ±1: the mark is 36 dB below them, so a network that were off by 1e-4 of its
# output's scale would be off by 2e-6 here. Measured: 1.1e-7, one rounding.
SAMPLES_ATOL = 1e-6
# Of the largest score, after ten layers of Winograd convolutions. Measured: 4.3e-6; torch's own
# direct convolutions in other chunks differ by 2.4e-6.
SCORES_RTOL = 2e-5


@pytest.fixture(autouse=True)
def one_thread():
    # Threads of torch that wait for work keep JAX's from the cores: these tests took five times as
    # long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return support.write_random(tmp_path_factory.mktemp("silentcipher") / "published")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("silentcipher") / "small"
    return support.write_random(path, hparams=support.SMALL, width=support.SMALL_WIDTH)


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    return support.write_readable(tmp_path_factory.mktemp("silentcipher") / "readable")


def package_marks(model, x, rate):
    marked, _ = model.encode_wav(x, rate, list(KEY), message_sdr=36, calc_sdr=False)
    return np.asarray(marked)


def package_scores(model, x, shift):
    with torch.no_grad():
        carrier, _ = model.stft.transform(torch.from_numpy(x[shift:])[None])
        return model.dec_m[0](carrier[:, None])[0, 0].numpy().T


def at_level(x):
    return x * np.float32(gain_of(float(np.square(x, dtype=np.float64).mean())))


def assert_scores(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=SCORES_RTOL * np.abs(theirs).max())


# --- the published sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [JaxWatermarker, TorchWatermarker])
def test_marks_are_the_packages(published, make):
    model, ours = support.package_model(published, support.HPARAMS), make.from_dir(published)
    for samples in (3000, 8192, 15000):
        x = support.noise(samples)
        y, expected = ours.embed(x, 44100, KEY), package_marks(model, x, 44100)
        assert y.shape == x.shape == expected.shape
        np.testing.assert_allclose(y, expected, rtol=0, atol=SAMPLES_ATOL)
        assert np.abs(y - x).max() > 1e-3


@pytest.mark.parametrize("make", [JaxWatermarker, TorchWatermarker])
def test_scores_are_the_packages(published, make):
    x = at_level(support.noise(3000))
    ours = make.from_dir(published)
    (scores,) = ours._networks.read([ours._framed(x)])
    assert_scores(scores, package_scores(support.package_model(published, support.HPARAMS), x, 0))


@pytest.mark.slow
def test_ten_seconds_are_the_packages(published):
    x = support.noise(441_000)
    model, ours = (
        support.package_model(published, support.HPARAMS),
        JaxWatermarker.from_dir(published),
    )
    np.testing.assert_allclose(
        ours.embed(x, 44100, KEY), package_marks(model, x, 44100), rtol=0, atol=SAMPLES_ATOL
    )
    (scores,) = ours._networks.read([ours._framed(at_level(x))])
    assert_scores(scores, package_scores(model, at_level(x), 0))


# --- small sizes: the whole search, the message ------------------------------------------------


@pytest.mark.parametrize("samples", [1, 255, 2048, 20_000])
def test_small_marks_are_the_packages(small, samples):
    model = support.package_model(small, support.SMALL, width=support.SMALL_WIDTH)
    x = support.noise(samples)
    y = JaxWatermarker.from_dir(small).embed(x, SMALL_RATE, KEY)
    np.testing.assert_allclose(y, package_marks(model, x, SMALL_RATE), rtol=0, atol=SAMPLES_ATOL)


def test_every_phase_of_the_search_is_the_packages(small):
    model = support.package_model(small, support.SMALL, width=support.SMALL_WIDTH)
    ours = JaxWatermarker.from_dir(small)
    x = at_level(support.noise(support.SMALL_PERIOD + 300))
    shifts = range(0, HOP, 10)  # those the package tries
    scores = ours._networks.read([ours._framed(x[shift:]) for shift in shifts])
    for shift, mine in zip(shifts, scores, strict=True):
        assert_scores(mine, package_scores(model, x, shift))


@pytest.mark.parametrize("cut", [0, HOP // 2, 1234])
def test_each_reads_the_others_marks(readable, cut):
    model = support.package_model(readable, support.SMALL, width=support.SMALL_WIDTH)
    ours = JaxWatermarker.from_dir(readable)
    x = support.tones(2 * support.SMALL_PERIOD + 2000, SMALL_RATE)
    mine, theirs = ours.embed(x, SMALL_RATE, KEY), package_marks(model, x, SMALL_RATE)
    read, expected = (
        model.decode_wav(marked[cut:], SMALL_RATE, phase_shift_decoding=True)
        for marked in (mine, theirs)
    )
    assert read == expected
    # Between frames, the package's search settles for the first phase at which its periods agree,
    # whatever they say; ours goes on.
    assert (read["messages"] == [list(KEY)]) == (cut != HOP // 2)
    assert ours.detect(theirs[cut:], SMALL_RATE) == KEY
    assert ours.verify(theirs[cut:], SMALL_RATE, KEY)


def test_the_package_reads_a_stream(readable):
    model = support.package_model(readable, support.SMALL, width=support.SMALL_WIDTH)
    x = support.tones(3 * support.SMALL_PERIOD, SMALL_RATE)
    stream = JaxWatermarker.from_dir(readable).open_stream(SMALL_RATE, KEY)
    marked = np.concatenate(
        [*(stream.push(x[i : i + 640]) for i in range(0, x.size, 640)), stream.flush()]
    )
    assert marked.shape == x.shape
    assert model.decode_wav(marked, SMALL_RATE, phase_shift_decoding=False)["messages"] == [
        list(KEY)
    ]


# --- the torch bridge --------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [24_000, 44_100])
def test_published_streams_are_the_bridges(published, rate):
    x = support.noise(rate)
    outputs = []
    for make in (JaxWatermarker, TorchWatermarker):
        stream = make.from_dir(published).open_stream(rate, KEY)
        outputs.append(np.concatenate([stream.push(x), stream.flush()]))
    assert np.abs(outputs[0] - x).max() > 1e-3
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=SAMPLES_ATOL)
