"""Marking, finding and streaming, on hand-made weights whose marks can be read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from csm_jax.watermark import JaxWatermarker, Watermarker, stft, watermarker
from csm_jax.watermark.files import Sizes
from csm_jax.watermark.interface import MESSAGE_SDR_DB, Marked
from csm_jax.watermark.message import symbols
from csm_jax.watermark.network import JaxNetworks
from csm_jax.watermark_key import DEFAULT_KEY
from tests.support import silentcipher as support

ROOT = Path(__file__).resolve().parents[2]
RATE = support.SMALL["SR"]
PERIOD = support.SMALL_PERIOD  # samples per repetition of the message
HOP = support.SMALL["HOP_LENGTH"]
KEY = (1, 35, 69, 103, 255)


@pytest.fixture(scope="module")
def readable_dir(tmp_path_factory):
    return support.write_readable(tmp_path_factory.mktemp("silentcipher") / "readable")


@pytest.fixture(scope="module")
def marker(readable_dir):
    return JaxWatermarker.from_dir(readable_dir)


@pytest.fixture(scope="module")
def audio():
    return support.tones(3 * PERIOD + 1000, RATE)


@pytest.fixture(scope="module")
def marked(marker, audio):
    return marker.embed(audio, RATE, KEY)


class FakeNetworks:
    """Networks of the small sizes that do to jobs and audios what the functions say."""

    def __init__(self, *, mark=None, read=None):
        self.sizes = Sizes(sample_rate=RATE, n_fft=2 * HOP, band=128, message_len=21, num_symbols=5)
        self.jobs, self._mark, self._read = [], mark, read

    def mark(self, jobs):
        results = []
        for job in jobs:
            self.jobs.append(job)
            frames = job.framed.reshape(-1, HOP)
            samples = frames[1:-1].reshape(-1)  # from the first centre to the last
            power = float(len(job.symbols) - job.first_new)
            results.append(Marked(samples=self._mark(job, samples), new_power=power))
        return results

    def read(self, framed):
        return [self._read(audio) for audio in framed]


# --- whole utterances --------------------------------------------------------------------------


def test_the_mark_is_read_back(marker, audio, marked):
    assert marked.shape == audio.shape
    assert marked.dtype == np.float32
    assert marker.detect(marked, RATE) == KEY
    assert marker.verify(marked, RATE, KEY)
    assert not marker.verify(marked, RATE, DEFAULT_KEY)
    ratio = 10 * np.log10(np.mean(audio**2) / np.mean((marked - audio) ** 2))
    assert MESSAGE_SDR_DB - 3 < ratio < MESSAGE_SDR_DB + 6  # spread over overlapping frames


def test_unmarked_audio_has_no_mark(marker, audio):
    assert marker.detect(audio, RATE) is None
    assert not marker.verify(audio, RATE, KEY)


def test_periods_that_disagree_are_no_mark(audio):
    # A vote of one against one against one still spells a key.
    periods = np.concatenate([[1] * 20 + [0], [2] * 20 + [1], [3] * 20 + [2]])
    networks = FakeNetworks(read=lambda framed: np.eye(5, dtype=np.float32)[periods])
    found = Watermarker(networks)
    assert found._read(audio, [0])[0].key == (0, 0, 0, 0, 0)
    assert found.detect(audio, RATE) is None


@pytest.mark.parametrize("cut", [HOP, HOP // 2, 90, 1234, 2 * HOP + 100])
def test_a_cut_start_does_not_hide_the_mark(marker, marked, cut):
    assert marker.detect(marked[cut:], RATE) == KEY


def test_a_mark_between_frames_needs_the_search(marker, marked):
    cut = marked[HOP // 2 :]
    assert marker._read(cut, [0])[0].key != KEY
    assert marker.verify(cut, RATE, KEY)


@pytest.mark.parametrize("phase", [0, 3, 100, 147, 250])
def test_the_search_closes_in_on_the_clearest_phase(monkeypatch, phase):
    # Audio that says where it was cut; scores that lead by more, the nearer that is to the phase.
    asked = []

    def read(framed):
        shift = round(float(framed[HOP]) * 1e4)
        distance = abs(shift % HOP - phase)
        asked.append(shift)
        lead = HOP - min(distance, HOP - distance)
        return lead * np.eye(5, dtype=np.float32)[np.ones(42, int)]

    networks = FakeNetworks(read=read)
    found = Watermarker(networks)
    monkeypatch.setattr(watermarker, "gain_of", lambda power: 1.0)
    found.detect(np.arange(50 * HOP, dtype=np.float32) / 1e4, RATE)
    distance = abs(asked[-1] % HOP - phase)
    assert min(distance, HOP - distance) <= HOP // 32
    assert len(asked) == 10


def test_the_phases_of_a_round_are_asked_for_together(marker, audio, monkeypatch):
    groups = []
    read = JaxNetworks.read

    def count(self, framed):
        groups.append(len(framed))
        return read(self, framed)

    monkeypatch.setattr(JaxNetworks, "read", count)
    marker.detect(audio, RATE)
    assert groups == [1, 4, 4, 1]


def test_a_known_key_ends_the_search(marker, marked, monkeypatch):
    groups = []
    read = JaxNetworks.read
    monkeypatch.setattr(
        JaxNetworks, "read", lambda self, framed: groups.append(len(framed)) or read(self, framed)
    )
    assert marker.verify(marked, RATE, KEY)
    assert marker.verify(marked[HOP // 2 :], RATE, KEY)
    assert groups == [1, 1, 4]


def test_long_audio_is_read_where_it_is_loudest(marker, marked):
    quiet = 1e-3 * support.noise(40 * PERIOD)
    quiet[25 * PERIOD : 25 * PERIOD + marked.size] += marked
    sizes = []
    read = marker._read

    def record(samples, shifts):
        sizes.append(samples.size)
        return read(samples, shifts)

    marker._read = record
    try:
        assert marker.verify(quiet, RATE, KEY)
    finally:
        del marker._read
    assert max(sizes) == (20 * 21 + 1) * HOP


def test_the_mark_survives_24_khz(marker):
    audio = support.tones(3 * 24000, 24000)
    marked = marker.embed(audio, 24000, DEFAULT_KEY)
    assert marked.shape == audio.shape
    assert marker.detect(marked, 24000) == DEFAULT_KEY


@pytest.mark.parametrize("samples", [1, 79, 80, 1921])
@pytest.mark.parametrize("rate", [RATE, 24000, 44100])
def test_embed_keeps_the_length(marker, samples, rate):
    y = marker.embed(support.noise(samples), rate, KEY)
    assert y.shape == (samples,)
    assert np.isfinite(y).all()


def test_very_long_audio(marker):
    audio = support.tones(60 * RATE, RATE)
    marked = marker.embed(audio, RATE, KEY)
    assert marked.shape == audio.shape
    assert marker.verify(marked, RATE, KEY)
    assert marker.detect(marked[50 * RATE :], RATE) == KEY


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


def test_audio_shorter_than_a_message_has_no_mark(marker, marked, monkeypatch):
    monkeypatch.setattr(JaxNetworks, "read", None)  # the networks are not even asked
    assert marker.detect(marked[: PERIOD // 2], RATE) is None


def test_embedding_does_not_depend_on_earlier_audio(marker, audio, marked):
    marker.embed(support.noise(3000), RATE, DEFAULT_KEY)
    np.testing.assert_array_equal(marker.embed(audio, RATE, KEY), marked)


# --- batches -----------------------------------------------------------------------------------


def test_a_batch_is_each_alone(marker, audio, marked):
    audios = [support.noise(700), audio, np.zeros(0, np.float32), np.zeros(90, np.float32), audio]
    audios[4] = audio[: 2 * PERIOD]
    together = marker.embed_batch(audios, RATE, KEY)
    assert len(together) == 5
    np.testing.assert_array_equal(together[1], marked)
    for x, y in zip(audios, together, strict=True):
        np.testing.assert_array_equal(y, marker.embed(x, RATE, KEY))


def test_a_batch_at_another_rate(marker):
    audios = [support.tones(n, 24000) for n in (24000, 1921, 30001)]
    for x, y in zip(audios, marker.embed_batch(audios, 24000, KEY), strict=True):
        assert y.shape == x.shape
        np.testing.assert_array_equal(y, marker.embed(x, 24000, KEY))


def test_an_empty_batch_and_a_bad_member(marker, audio):
    assert marker.embed_batch([], RATE, KEY) == []
    with pytest.raises(ValueError, match=r"audios\[1\] holds 10 NaN"):
        marker.embed_batch([audio, np.full(10, np.nan, np.float32)], RATE, KEY)


# --- networks that fail ------------------------------------------------------------------------


def test_networks_that_return_nan_do_not_crash_detection(marked):
    networks = FakeNetworks(read=lambda framed: np.full((42, 5), np.nan, np.float32))
    assert Watermarker(networks).detect(marked, RATE) is None


def test_networks_that_return_nan_do_not_ruin_audio(audio):
    found = Watermarker(FakeNetworks(mark=lambda job, samples: samples * np.float32(np.nan)))
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        found.embed(audio, RATE, KEY)
    opened = found.open_stream(RATE, KEY)
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        opened.push(audio)


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


def test_windows_join_in_cross_fades():
    # Each window multiplies the audio by its number, so the output shows which window it is from.
    networks = FakeNetworks(mark=lambda job, samples: samples * np.float32(len(networks.jobs)))
    audio = support.tones(26 * HOP, RATE)
    streamed = np.concatenate(stream(Watermarker(networks), audio, RATE, [1920] * 4))
    ramp = (np.arange(HOP) + 0.5) / HOP
    gain = np.repeat(np.array([1.0, 2, 3, 4]), 7 * HOP)[: len(audio)]
    for window in (1, 2, 3):
        gain[7 * window * HOP : (7 * window + 1) * HOP] = window + ramp
    np.testing.assert_allclose(streamed, audio * gain, atol=1e-5)
    assert networks.jobs[2].symbols.size == 21  # one message period, once there is a past


def test_windows_are_the_frames_of_the_whole():
    networks = FakeNetworks(mark=lambda job, samples: samples)
    audio = support.tones(40 * HOP + 33, RATE)
    streamed = np.concatenate(stream(Watermarker(networks), audio, RATE, [1920] * 6))
    np.testing.assert_allclose(streamed, audio, atol=1e-6)
    framed = stft.mirror(stft.fill(audio, 2 * HOP), HOP, start=True, end=True)
    firsts = [0, 0, 4, 11, 18, 25]
    assert len(networks.jobs) == len(firsts)
    for job, first in zip(networks.jobs, firsts, strict=True):
        np.testing.assert_array_equal(job.symbols, symbols(KEY, first, job.symbols.size))
        end = (first + job.symbols.size + 1) * HOP
        if first == 0:  # what is mirrored at the start is all there is of it yet
            np.testing.assert_array_equal(job.framed, framed[:end])
        else:
            np.testing.assert_array_equal(job.framed, framed[first * HOP : end])


def test_levels_are_those_of_everything_heard():
    networks = FakeNetworks(mark=lambda job, samples: samples)
    audio = np.concatenate([np.zeros(18 * HOP, np.float32), support.tones(22 * HOP, RATE)])
    np.concatenate(stream(Watermarker(networks), audio, RATE, [1920] * 6))
    lasts = [last for last in range(10, 40, 7) if (last + 1) * HOP > 18 * HOP]
    assert lasts == [24, 31, 38]
    assert len(networks.jobs) == len(lasts) + 1  # the last one ends the utterance
    past, counted = 0.0, 18  # the windows up to frame 17 were silent
    for job, last in zip(networks.jobs, [*lasts, 42], strict=True):
        heard = audio[: (last + 1) * HOP].astype(np.float64)
        power = np.square(heard).sum() / min((last + 1) * HOP, len(audio))
        assert job.gain == pytest.approx((0.002837200844477648 / power) ** 0.5, rel=1e-5)
        assert job.power_frames == last + 1
        assert job.past_power == past
        first = last + 1 - job.symbols.size
        assert first + job.first_new == counted
        past, counted = past + (last + 1 - counted), last + 1


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


# --- bad arguments, absent packages ------------------------------------------------------------


def test_bad_keys_rates_and_audio(marker, audio):
    for call in (marker.embed, marker.verify):
        with pytest.raises(ValueError, match="5 integers"):
            call(audio, RATE, (1, 2, 3))
        with pytest.raises(ValueError, match="5 integers"):
            call(audio, RATE, (1, 2, 3, 4, 256))
        with pytest.raises(ValueError, match="Hz"):
            call(audio, 10, KEY)
        with pytest.raises(ValueError, match="NaN"):
            call(np.full(10, np.nan, np.float32), RATE, KEY)
    with pytest.raises(ValueError, match="empty"):
        marker.detect(np.zeros(0, np.float32), RATE)
    with pytest.raises(ValueError, match="5 integers"):
        marker.open_stream(RATE, (1, 2, 3, 4, 300))
    with pytest.raises(ValueError, match="NaN"):
        marker.open_stream(RATE, KEY).push(np.full(10, np.nan, np.float32))


def test_neither_torch_nor_yaml_is_needed(readable_dir):
    code = f"""
import sys
for name in ("torch", "yaml", "silentcipher", "scipy"):
    sys.modules[name] = None
import numpy as np
from csm_jax.watermark import JaxWatermarker
marker = JaxWatermarker.from_dir({str(readable_dir)!r})
assert np.isfinite(marker.embed(np.full(500, 0.1, np.float32), 8000, (1, 2, 3, 4, 5))).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
