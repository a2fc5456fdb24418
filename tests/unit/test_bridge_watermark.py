import argparse
import shutil

import numpy as np
import pytest
import torch

from csm_jax.bridge import silentcipher as networks_module
from csm_jax.bridge.watermark import TorchWatermarker, _Reading
from csm_jax.watermark_key import DEFAULT_KEY
from tests.support import silentcipher as support

RATE = support.SMALL["SR"]
PERIOD = support.SMALL_PERIOD  # samples per repetition of the message
HOP = support.SMALL["HOP_LENGTH"]
KEY = (1, 35, 69, 103, 255)


@pytest.fixture(scope="module")
def random_dir(tmp_path_factory):
    return support.write_random(tmp_path_factory.mktemp("silentcipher") / "random")


@pytest.fixture(scope="module")
def readable_dir(tmp_path_factory):
    return support.write_readable(tmp_path_factory.mktemp("silentcipher") / "readable")


@pytest.fixture(scope="module")
def marker(readable_dir):
    return TorchWatermarker.from_dir(readable_dir)


@pytest.fixture(scope="module")
def audio():
    return support.tones(3 * PERIOD + 1000, RATE)


@pytest.fixture(scope="module")
def marked(marker, audio):
    return marker.embed(audio, RATE, KEY)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(samples + 20)
    return (0.3 * np.convolve(x, np.ones(20) / 20, "same")[:samples]).astype(np.float32)


# --- the published sizes against the silentcipher package -------------------------------------


@pytest.fixture(scope="module")
def package_model(random_dir):
    server = support.package()
    hparams = argparse.Namespace(**support.HPARAMS, load_ckpt=str(random_dir))
    return server.Model(hparams)


@pytest.mark.parametrize("samples", [3000, 8192, 15000])
def test_embed_equals_the_package(random_dir, package_model, monkeypatch, samples):
    monkeypatch.setattr(networks_module, "_CHUNK_FRAMES", 3)  # seams inside even this short audio
    x = noise(samples)
    y = TorchWatermarker.from_dir(random_dir).embed(x, 44100, KEY)
    expected, _ = package_model.encode_wav(x, 44100, list(KEY), message_sdr=36, calc_sdr=False)
    expected = np.asarray(expected)
    assert y.shape == x.shape == expected.shape
    np.testing.assert_allclose(y, expected, atol=1e-6)
    assert np.abs(y - x).max() > 1e-3


def test_reading_equals_the_package(random_dir, package_model):
    x = noise(3000)
    ours = TorchWatermarker.from_dir(random_dir)
    power = float(np.mean(np.square(x, dtype=np.float64)))
    level = np.float32(np.sqrt(0.002837200844477648 / power))
    with torch.no_grad():
        carrier, _ = package_model.stft.transform(torch.from_numpy(x * level)[None])
        expected = package_model.dec_m[0](carrier[:, None])[0, 0].numpy()
        scores = ours._networks.read(ours._spectrum(ours._frame_samples(x * level)).abs()).numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


# --- whole utterances --------------------------------------------------------------------------


def test_the_mark_is_read_back(marker, audio, marked):
    assert marked.shape == audio.shape
    assert marked.dtype == np.float32
    assert marker.detect(marked, RATE) == KEY
    assert marker.verify(marked, RATE, KEY)
    assert not marker.verify(marked, RATE, DEFAULT_KEY)
    ratio = 10 * np.log10(np.mean(audio**2) / np.mean((marked - audio) ** 2))
    assert 33 < ratio < 42  # 36 dB below, spread over overlapping frames


def test_unmarked_audio_has_no_mark(marker, audio):
    assert marker.detect(audio, RATE) is None
    assert not marker.verify(audio, RATE, KEY)


@pytest.mark.parametrize("cut", [HOP, HOP // 2, 90, 1234, 2 * HOP + 100])
def test_a_cut_start_does_not_hide_the_mark(marker, marked, cut):
    assert marker.detect(marked[cut:], RATE) == KEY


def test_a_mark_between_frames_needs_the_search(marker, marked):
    cut = marked[HOP // 2 :]
    assert marker._read(cut, 0).key != KEY
    assert marker.verify(cut, RATE, KEY)


@pytest.mark.parametrize("phase", [3, 100, 147, 250])
def test_the_search_closes_in_on_the_clearest_phase(marker, audio, monkeypatch, phase):
    shifts = []

    def read(self, samples, shift):
        shifts.append(shift)
        distance = abs(shift - phase)
        return _Reading(None, 1.0, HOP - min(distance, HOP - distance))

    monkeypatch.setattr(TorchWatermarker, "_read", read)
    marker.detect(audio, RATE)
    distance = abs(shifts[-1] - phase)
    assert min(distance, HOP - distance) <= HOP // 32
    assert len(shifts) <= 12


def test_the_mark_survives_24_khz(marker):
    audio = support.tones(3 * 24000, 24000)
    marked = marker.embed(audio, 24000, DEFAULT_KEY)
    assert marked.shape == audio.shape
    assert marker.detect(marked, 24000) == DEFAULT_KEY


@pytest.mark.parametrize("samples", [1, 79, 80, 1921])
@pytest.mark.parametrize("rate", [RATE, 24000, 44100])
def test_embed_keeps_the_length(marker, samples, rate):
    y = marker.embed(noise(samples), rate, KEY)
    assert y.shape == (samples,)
    assert np.isfinite(y).all()


def test_silence_comes_back_unmarked(marker):
    x = np.zeros(5000, np.float32)
    np.testing.assert_array_equal(marker.embed(x, RATE, KEY), x)
    assert marker.detect(x, RATE) is None
    assert marker.embed(np.zeros(0, np.float32), RATE, KEY).shape == (0,)


def test_silence_within_speech_stays_finite(marker):
    x = support.tones(2 * PERIOD, RATE)
    x[PERIOD // 2 : PERIOD] = 0
    y = marker.embed(x, RATE, KEY)
    assert np.isfinite(y).all()
    assert np.abs(y[PERIOD // 2 + 2 * HOP : PERIOD - 2 * HOP]).max() < 1e-6


def test_audio_shorter_than_a_message_has_no_mark(marker, marked):
    assert marker.detect(marked[: PERIOD // 2], RATE) is None


def test_embedding_does_not_depend_on_earlier_audio(marker, audio, marked):
    marker.embed(noise(3000), RATE, DEFAULT_KEY)
    np.testing.assert_array_equal(marker.embed(audio, RATE, KEY), marked)


def test_networks_that_return_nan_do_not_crash_detection(marker, marked, monkeypatch):
    def broken(self, carrier):
        return torch.full((5, carrier.shape[1]), torch.nan)

    monkeypatch.setattr(networks_module.Networks, "read", broken)
    assert marker.detect(marked, RATE) is None


def test_networks_that_return_nan_do_not_ruin_audio(marker, audio, monkeypatch):
    def broken(self, carrier, symbols):
        return torch.full_like(carrier, torch.nan)

    monkeypatch.setattr(networks_module.Networks, "mark", broken)
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        marker.embed(audio, RATE, KEY)


@pytest.mark.parametrize("symbols", [[0] * 21, [1] * 21, [1, 0] * 10 + [1]])
def test_messages_without_exactly_one_end_are_no_key(marker, marked, monkeypatch, symbols):
    def constant(self, carrier):
        frames = torch.arange(carrier.shape[1]) % 21
        return torch.nn.functional.one_hot(torch.tensor(symbols)[frames], 5).T.float()

    monkeypatch.setattr(networks_module.Networks, "read", constant)
    assert marker.detect(marked, RATE) is None


# --- streams -----------------------------------------------------------------------------------


def stream(marker, audio, rate, sizes, key=KEY):
    opened = marker.open_stream(rate, key)
    pieces, position = [], 0
    for size in sizes:
        pieces.append(opened.push(audio[position : position + size]))
        position += size
    assert position >= len(audio)
    return [*pieces, opened.flush()]


def test_a_stream_carries_the_same_mark(marker, audio, marked):
    pieces = stream(marker, audio, RATE, [1920] * 10)
    streamed = np.concatenate(pieces)
    assert streamed.shape == audio.shape
    assert marker.detect(streamed, RATE) == KEY
    # Frame for frame the same symbols: the two marks differ by a fraction of the mark.
    mark = np.abs(marked - audio).max()
    assert np.abs(streamed - marked).max() < 0.15 * mark
    # The delay is 11 frames.
    sent = np.cumsum([piece.size for piece in pieces[:-1]])
    taken = np.minimum(np.arange(1, 11) * 1920, len(audio))
    assert (taken - sent).max() < (11 + 7) * HOP
    assert sent[1] > 0


@pytest.mark.parametrize("rate", [RATE, 24000])
def test_the_size_of_pieces_changes_nothing(marker, rate):
    audio = support.tones(int(1.4 * rate), rate)
    one = np.concatenate(stream(marker, audio, rate, [len(audio)]))
    many = np.concatenate(stream(marker, audio, rate, [1, 700, 0, 5000, 333] + [997] * 40))
    assert one.shape == many.shape == audio.shape
    np.testing.assert_allclose(one, many, atol=2e-6)


@pytest.mark.parametrize("samples", [1, 200, 2 * HOP, 9 * HOP + 17, 11 * HOP - 1])
def test_a_short_stream_is_marked_as_a_whole(marker, samples):
    audio = support.tones(samples, RATE)
    streamed = np.concatenate(stream(marker, audio, RATE, [samples]))
    np.testing.assert_allclose(streamed, marker.embed(audio, RATE, KEY), atol=1e-6)


@pytest.mark.parametrize("samples", [11 * HOP, 11 * HOP + 1, 18 * HOP, 20 * HOP + 77])
def test_streams_of_any_length_are_complete(marker, samples):
    audio = support.tones(samples, RATE)
    streamed = np.concatenate(stream(marker, audio, RATE, [1000] * (samples // 1000 + 1)))
    assert streamed.shape == audio.shape
    # Nothing is lost, doubled or moved: the mark is far below the audio.
    assert np.abs(streamed - audio).max() < 0.03


def test_windows_join_in_cross_fades(marker, monkeypatch):
    # Each window multiplies the audio by its number, so the output shows which window it is from.
    windows = []

    def number(self, spectrum, symbols, power, frame_power=None):
        windows.append(spectrum.shape[1])
        return spectrum * len(windows)

    monkeypatch.setattr(TorchWatermarker, "_mark", number)
    audio = support.tones(26 * HOP, RATE)
    streamed = np.concatenate(stream(marker, audio, RATE, [1920] * 4))
    ramp = (np.arange(HOP) + 0.5) / HOP
    gain = np.repeat(np.array([1.0, 2, 3, 4]), 7 * HOP)[: len(audio)]
    for window in (1, 2, 3):
        gain[7 * window * HOP : (7 * window + 1) * HOP] = window + ramp
    np.testing.assert_allclose(streamed, audio * gain, atol=1e-5)
    assert windows[2] == 21  # one message period, once there is a past


def test_levels_are_those_of_everything_heard(marker, monkeypatch):
    audio = np.concatenate([np.zeros(18 * HOP, np.float32), support.tones(22 * HOP, RATE)])
    whole = marker._spectrum(marker._frame_samples(audio)).abs().square().numpy()
    seen = []

    def record(self, spectrum, symbols, power, frame_power=None):
        seen.append((power, frame_power))
        return spectrum

    monkeypatch.setattr(TorchWatermarker, "_mark", record)
    np.concatenate(stream(marker, audio, RATE, [1920] * 6))
    lasts = [last for last in range(10, 40, 7) if (last + 1) * HOP > 18 * HOP]
    assert lasts == [24, 31, 38]
    assert len(seen) == len(lasts) + 1  # the last one ends the utterance
    for (power, frame_power), last in zip(seen, lasts, strict=False):
        heard = audio[: (last + 1) * HOP].astype(np.float64)
        assert power == pytest.approx(np.square(heard).mean(), rel=1e-5)
        assert frame_power == pytest.approx(whole[:, : last + 1].mean(dtype=np.float64), rel=1e-4)
    assert seen[-1][1] == pytest.approx(whole.mean(dtype=np.float64), rel=1e-4)


def test_a_stream_that_starts_silent(marker):
    audio = support.tones(2 * PERIOD, RATE)
    audio[:PERIOD] = 0
    streamed = np.concatenate(stream(marker, audio, RATE, [1920] * 6))
    assert streamed.shape == audio.shape
    assert np.isfinite(streamed).all()
    np.testing.assert_allclose(streamed[: PERIOD - 2 * HOP], 0, atol=1e-6)
    assert np.abs(streamed - audio)[PERIOD:].max() > 1e-3


def test_a_silent_stream_comes_back(marker):
    audio = np.zeros(5000, np.float32)
    streamed = np.concatenate(stream(marker, audio, RATE, [5000]))
    np.testing.assert_array_equal(streamed, audio)


def test_an_empty_stream(marker):
    opened = marker.open_stream(24000, KEY)
    assert opened.push(np.zeros(0, np.float32)).shape == (0,)
    assert opened.flush().shape == (0,)
    with pytest.raises(RuntimeError, match="was flushed"):
        opened.push(np.zeros(1, np.float32))
    with pytest.raises(RuntimeError, match="was flushed"):
        opened.flush()


def test_bad_keys_rates_and_audio(marker, audio):
    for call in (marker.embed, marker.verify):
        with pytest.raises(ValueError, match="5 integers"):
            call(audio, RATE, (1, 2, 3))
        with pytest.raises(ValueError, match="Hz"):
            call(audio, 10, KEY)
        with pytest.raises(ValueError, match="NaN"):
            call(np.full(10, np.nan, np.float32), RATE, KEY)
    with pytest.raises(ValueError, match="5 integers"):
        marker.open_stream(RATE, (1, 2, 3, 4, 300))


# --- bad files ---------------------------------------------------------------------------------


@pytest.fixture
def copy(readable_dir, tmp_path):
    return shutil.copytree(readable_dir, tmp_path / "copy")


def test_missing_files_are_all_named(copy, tmp_path):
    (copy / "enc_c.ckpt").unlink()
    (copy / "hparams.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"hparams\.yaml, enc_c\.ckpt$"):
        TorchWatermarker.from_dir(copy)
    with pytest.raises(FileNotFoundError, match="no directory of watermark files"):
        TorchWatermarker.from_dir(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_truncated_checkpoint(copy, keep):
    data = (copy / "dec_c.ckpt").read_bytes()
    (copy / "dec_c.ckpt").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"dec_c\.ckpt is damaged"):
        TorchWatermarker.from_dir(copy)


def test_hostile_checkpoint_runs_nothing(copy, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"module.main.0.conv.weight": Hostile()}, copy / "enc_c.ckpt")
    with pytest.raises(ValueError, match=r"enc_c\.ckpt is damaged or not a checkpoint"):
        TorchWatermarker.from_dir(copy)
    assert not (tmp_path / "ran").exists()


def test_wrong_tensors_are_all_listed(copy):
    state = torch.load(copy / "enc_c.ckpt")
    del state["module.linear.bias"]
    state["module.main.1.conv.bias"] = torch.zeros(3)
    state["module.main.2.gate.weight"].fill_(torch.nan)
    state["module.other"] = torch.zeros(1)
    torch.save(state, copy / "enc_c.ckpt")
    with pytest.raises(ValueError, match="does not hold silentcipher") as info:
        TorchWatermarker.from_dir(copy)
    for problem in (
        "enc_c.ckpt: linear.bias is missing",
        "enc_c.ckpt: main.1.conv.bias has shape [3], expected [32]",
        "enc_c.ckpt: main.2.gate.weight holds NaN",
        "enc_c.ckpt: other is not part of it",
    ):
        assert problem in str(info.value)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("message_len: 21", "message_len: 20", "message_len is 20, expected 21"),
        ("HOP_LENGTH: 256", "HOP_LENGTH: 128", "N_FFT=512 is not twice HOP_LENGTH=128"),
        ("SR: 8000", "SR: fast", "SR is 'fast'"),
        ("message_band_size: 128", "message_band_size: 900", "exceeds the bins"),
        ("SR: 8000", "SR: [", "not valid YAML"),
    ],
)
def test_other_models_are_refused(copy, old, new, match):
    text = (copy / "hparams.yaml").read_text()
    assert old in text
    (copy / "hparams.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=match):
        TorchWatermarker.from_dir(copy)
