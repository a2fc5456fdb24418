"""The pieces of the networks: spectra, Winograd's convolution, chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from csm_jax.watermark import files, stft, winograd
from csm_jax.watermark.interface import MarkJob
from csm_jax.watermark.network import JaxNetworks, Tiling
from tests.support import silentcipher as support

HOP = support.SMALL["HOP_LENGTH"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("silentcipher") / "random"
    # Their 257 bins and 128 of the band are no multiples of a tile.
    support.write_random(directory, hparams=support.SMALL, width=support.SMALL_WIDTH)
    return files.load(directory)


@pytest.fixture(scope="module")
def networks(loaded):
    return JaxNetworks(*loaded)


def job(sizes, frames, *, seed=0):
    rng = np.random.default_rng(seed)
    return MarkJob(
        framed=support.noise((frames + 1) * sizes.hop, seed=seed),
        symbols=rng.integers(0, 5, frames).astype(np.int32),
        gain=1.5,
        first_new=0,
        past_power=0.0,
        power_frames=frames,
    )


# --- spectra -----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 511, 512, 700, 4000])
def test_spectra_are_torchs(samples):
    x = support.noise(samples)
    filled = stft.fill(x, 2 * HOP)
    assert filled.size % (2 * HOP) == 0
    assert 0 < filled.size - samples <= 2 * HOP
    framed = stft.mirror(filled, HOP, start=True, end=True)
    ours = np.asarray(stft.spectrum(jnp.asarray(framed[None]), hop=HOP))[0]
    window = torch.hann_window(2 * HOP)
    theirs = torch.stft(
        torch.from_numpy(filled), 2 * HOP, HOP, window=window, return_complex=True
    ).numpy()
    np.testing.assert_allclose(ours, theirs.T, atol=1e-5 * np.abs(theirs).max())
    back = stft.overlap_add(np.asarray(stft.frames_of(jnp.asarray(ours[None])))[0])
    expected = torch.istft(torch.from_numpy(theirs), 2 * HOP, HOP, window=window).numpy()
    np.testing.assert_allclose(back, expected, atol=1e-6)


# --- Winograd ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "bins", "inputs"), [(3, 7, 2), (6, 9, 5), (21, 2, 1)])
def test_convolution_is_the_direct_one(frames, bins, inputs):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, inputs, 3, 3)).astype(np.float32)
    x = rng.standard_normal((2, inputs, bins, frames)).astype(np.float32)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).double(), torch.from_numpy(weight).double(), padding=1
    ).numpy()
    padded = np.zeros((2, frames + 2, winograd.padded_bins(bins), inputs), np.float32)
    padded[:, 1:-1, 1 : bins + 1] = x.transpose(0, 3, 2, 1)
    y = winograd.convolve(jnp.asarray(padded), jnp.asarray(winograd.transform_weight(weight)))
    # The exact result, to a few roundings of its largest terms.
    np.testing.assert_allclose(y[:, :, :bins].transpose(0, 3, 2, 1), expected, atol=2e-5)


# --- chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 21, 22, 44])
def test_how_audio_is_cut_changes_nothing(loaded, networks, frames):
    sizes, _ = loaded
    asked = job(sizes, frames)
    (narrow,) = networks.mark([asked])
    (wide,) = JaxNetworks(*loaded, tiling=Tiling(chunk_frames=21, read_rows=4)).mark([asked])
    assert narrow.samples.shape == wide.samples.shape == ((frames - 1) * sizes.hop,)
    np.testing.assert_allclose(narrow.samples, wide.samples, atol=2e-6)
    assert narrow.new_power == pytest.approx(wide.new_power, rel=1e-5)


def test_what_lies_beyond_the_last_frame_is_nothing(loaded, networks, monkeypatch):
    # The chunks are filled up with samples that would be heard if anything listened.
    sizes, _ = loaded
    asked = job(sizes, 7)
    (expected,) = networks.mark([asked])
    (scores,) = networks.read([asked.framed])
    cut = networks._cut

    def loud(framed):
        chunks = cut(framed)
        start, samples = chunks[-1]
        samples = samples.copy()
        # The last frame's own samples stay.
        samples[:, (7 - int(start) + 1) * sizes.hop :] = 100.0
        return [*chunks[:-1], (start, samples)]

    monkeypatch.setattr(networks, "_cut", loud)
    (marked,) = networks.mark([asked])
    np.testing.assert_array_equal(marked.samples, expected.samples)
    assert marked.new_power == expected.new_power
    np.testing.assert_array_equal(networks.read([asked.framed])[0], scores)


def test_jobs_do_not_meet(loaded, networks):
    sizes, _ = loaded
    jobs = [job(sizes, frames, seed=frames) for frames in (5, 30, 1, 12)]
    together = networks.mark(jobs)
    for asked, result in zip(jobs, together, strict=True):
        (alone,) = networks.mark([asked])
        np.testing.assert_array_equal(result.samples, alone.samples)
        assert result.new_power == alone.new_power


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_do_not_meet(loaded, networks, rows):
    sizes, _ = loaded
    audios = [job(sizes, frames, seed=frames).framed for frames in (23, 30, 2, 24, 25)]
    reader = JaxNetworks(*loaded, tiling=Tiling(chunk_frames=3, read_rows=rows))
    for audio, scores in zip(audios, reader.read(audios), strict=True):
        (alone,) = networks.read([audio])
        assert scores.shape == (audio.size // sizes.hop - 1, 5)
        np.testing.assert_allclose(scores, alone, atol=2e-5 * np.abs(alone).max())


def test_only_new_frames_add_power(loaded, networks):
    sizes, _ = loaded
    asked = job(sizes, 8)
    framed = asked.framed[None]
    powers = np.square(np.abs(stft.spectrum(jnp.asarray(framed), hop=sizes.hop)))[0].mean(axis=1)
    (marked,) = networks.mark([dataclasses.replace(asked, first_new=5, past_power=3.0)])
    assert marked.new_power == pytest.approx(powers[5:].sum(), rel=1e-5)
    # The mark is as loud as the whole utterance's mean asks for.
    (all_new,) = networks.mark([asked])
    past = powers[:5].sum()
    (again,) = networks.mark([dataclasses.replace(asked, first_new=5, past_power=float(past))])
    np.testing.assert_allclose(again.samples, all_new.samples, atol=1e-6)


def test_no_length_compiles_anything_anew(loaded, networks):
    sizes, _ = loaded
    networks.mark([job(sizes, 4)])
    networks.read([job(sizes, 4).framed])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "compile" in event else None
    )
    try:
        for frames in (1, 5, 50, 211):
            networks.mark([job(sizes, frames)])
            networks.read([job(sizes, frames).framed])
        assert compiled == []
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(17))
        assert compiled  # the listener does listen
    finally:
        jax.monitoring.clear_event_listeners()
