import io
import math
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch

from csm_jax import audio as audio_module
from csm_jax.audio import (
    StreamResampler,
    check_audio,
    check_rate,
    check_writable,
    read_audio,
    resample,
    write_audio,
)

RATES = [
    (24000, 44100),
    (44100, 24000),
    (48000, 24000),
    (16000, 24000),
    (8000, 44100),
    (22050, 24000),
    (384000, 24000),
]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


def tone(hertz: float, rate: int, seconds: float) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def documented_resample(x: np.ndarray, orig: int, new: int) -> np.ndarray:
    """The formula of torchaudio's documentation as one dense strided convolution in float64."""
    divisor = math.gcd(orig, new)
    orig, new = orig // divisor, new // divisor
    cutoff = min(orig, new) * 0.99
    width = math.ceil(6 * orig / cutoff)
    time = torch.arange(-width, width + orig, dtype=torch.float64) / orig
    phases = torch.arange(new, dtype=torch.float64)[:, None] / new
    arguments = ((time - phases) * cutoff).clamp(-6, 6)
    taps = torch.sinc(arguments) * torch.cos(arguments * math.pi / 12) ** 2 * cutoff / orig
    padded = torch.nn.functional.pad(torch.from_numpy(x).double(), (width, width + orig))
    out = torch.nn.functional.conv1d(padded[None, None], taps[:, None], stride=orig)
    return out[0].T.reshape(-1)[: math.ceil(new * len(x) / orig)].numpy()


@pytest.mark.parametrize(("orig", "new"), RATES)
@pytest.mark.parametrize("samples", [1, 79, 6001])
def test_resample_equals_the_documented_formula(orig, new, samples):
    x = noise(samples)
    y = resample(x, orig, new)
    expected = documented_resample(x, orig, new)
    assert y.dtype == np.float32
    assert y.shape == expected.shape == (math.ceil(new * samples / orig),)
    np.testing.assert_allclose(y, expected, atol=2e-6, rtol=0)


def test_resample_keeps_a_tone_and_its_time():
    y = resample(tone(1000, 24000, 0.5), 24000, 44100)
    np.testing.assert_allclose(y[500:-500], tone(1000, 44100, 0.5)[500:-500], atol=3e-3)


def test_resample_removes_what_the_new_rate_cannot_hold():
    y = resample(tone(16000, 44100, 0.5), 44100, 24000)
    assert np.abs(y[500:-500]).max() < 1e-2


def test_resample_keeps_a_constant():
    y = resample(np.ones(4000, np.float32), 44100, 24000)
    np.testing.assert_allclose(y[100:-100], 1.0, atol=2e-3)


def test_resample_of_equal_rates_copies():
    x = noise(100)
    y = resample(x, 24000, 24000)
    np.testing.assert_array_equal(x, y)
    assert not np.shares_memory(x, y)


def test_resample_of_nothing_is_nothing():
    assert resample(np.zeros(0, np.float32), 24000, 44100).shape == (0,)


def test_resample_of_coprime_rates_keeps_a_tone():
    # 47,999:24,000 has no common divisor; a dense filter bank would need gigabytes.
    y = resample(tone(1000, 47999, 0.2), 47999, 24000)
    assert len(y) == math.ceil(24000 * int(47999 * 0.2) / 47999)
    np.testing.assert_allclose(y[100:-100], tone(1000, 24000, 0.2)[100 : len(y) - 100], atol=3e-3)


@pytest.mark.parametrize(("orig", "new"), [*RATES, (24000, 24000), (47999, 24000)])
def test_stream_resampler_equals_resample(orig, new):
    x, rng = noise(9001), np.random.default_rng(1)
    stream = StreamResampler(orig, new)
    for _ in range(2):  # flushing starts afresh
        pieces, position = [], 0
        while position < len(x):
            size = int(rng.integers(0, 900))
            pieces.append(stream.push(x[position : position + size]))
            position += size
        pieces.append(stream.flush())
        y = np.concatenate(pieces)
        assert len(y) == math.ceil(new * len(x) / orig)
        np.testing.assert_allclose(y, resample(x, orig, new), atol=2e-6)


@pytest.mark.parametrize("rate", [0, -24000, 999, 10**9])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match="Hz, got"):
        resample(noise(10), rate, 24000)


@pytest.mark.parametrize("rate", [24000.0, "24000", True, None])
def test_rates_that_are_not_integers_are_refused(rate):
    with pytest.raises(TypeError, match="integer number of hertz"):
        check_rate(rate, "rate")


# --- check_audio -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        np.asarray,
        lambda x: np.asarray(x, np.float64),
        jnp.asarray,
        lambda x: jnp.asarray(x, jnp.bfloat16),
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.bfloat16),
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: [float(value) for value in x],
    ],
)
def test_check_audio_accepts_every_library(make):
    x = np.array([0.5, -0.25, 0.0, 1.0], np.float32)  # exact in bfloat16
    y = check_audio(make(x), "audio")
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (np.zeros((2, 10), np.float32), ValueError, r"mono with shape \[samples\], got \[2, 10\]"),
        (np.zeros((10, 1), np.float32), ValueError, "mono"),
        (np.float32(0.5), ValueError, "mono"),
        (np.zeros(0, np.float32), ValueError, "is empty"),
        (np.array([0.0, np.nan, np.inf], np.float32), ValueError, "2 NaN or infinite.*sample 1"),
        (np.zeros(10, np.int16), TypeError, "int16 recordings divide by 32,768"),
        (torch.zeros(10, dtype=torch.int32), TypeError, "divide by 2,147,483,648"),
        (np.zeros(10, bool), TypeError, "floating-point"),
        (np.zeros(10, np.complex64), TypeError, "floating-point"),
        (np.array([0.0, 12000.0], np.float32), ValueError, "peak of 12,000"),
        ("speech.wav", TypeError, "read_audio"),
    ],
)
def test_check_audio_refuses(bad, error, match):
    with pytest.raises(error, match=match):
        check_audio(bad, "audio")


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "A.WAV"])
def test_write_then_read(tmp_path, name):
    x = np.clip(noise(5000) / 3, -1, 0.999)
    write_audio(tmp_path / name, x, 24000)
    y, rate = read_audio(tmp_path / name)
    assert rate == 24000
    assert soundfile.info(tmp_path / name).subtype == "PCM_16"
    np.testing.assert_allclose(y, x, atol=1.01 / 32768)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("suffix", "kind"), [("mp3", "MP3"), ("ogg", "OGG")])
def test_read_compressed(tmp_path, suffix, kind):
    x = 0.5 * tone(440, 24000, 1.0)
    soundfile.write(tmp_path / f"a.{suffix}", x, 24000, format=kind)
    y, rate = read_audio(tmp_path / f"a.{suffix}")
    assert rate == 24000
    assert len(y) == pytest.approx(len(x), abs=3000)
    assert np.sqrt(np.mean(y**2)) == pytest.approx(np.sqrt(np.mean(x**2)), rel=0.05)


def test_write_clips(tmp_path):
    write_audio(tmp_path / "a.wav", np.array([2.0, -2.0, 0.0], np.float32), 24000)
    y, _ = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(y, [1, -1, 0], atol=1e-4)


def test_write_of_no_samples_is_a_valid_file(tmp_path):
    write_audio(tmp_path / "a.wav", np.zeros(0, np.float32), 24000)
    assert soundfile.info(tmp_path / "a.wav").frames == 0
    with pytest.raises(ValueError, match="holds no audio"):
        read_audio(tmp_path / "a.wav")


def test_read_stereo_says_how_to_mix(tmp_path):
    x = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", x, 24000)
    with pytest.raises(ValueError, match=r"2 channels.*ffmpeg -i a\.wav -ac 1 mono\.wav") as info:
        read_audio(tmp_path / "a.wav")
    # Shown in a traceback, where the call can be changed, and not on the command line.
    assert info.value.__notes__ == ['or average the channels: read_audio(path, mono="mean")']
    assert "read_audio" not in str(info.value)
    y, _ = read_audio(tmp_path / "a.wav", mono="mean")
    np.testing.assert_allclose(y, 0.125, atol=1e-4)


def test_read_refuses_long_audio_by_its_header(tmp_path):
    write_audio(tmp_path / "a.wav", np.zeros(24000, np.float32), 24000)
    with pytest.raises(ValueError, match=r"longer than the 0.5 s allowed.*header says 1.0 s"):
        read_audio(tmp_path / "a.wav", max_duration_s=0.5)
    assert len(read_audio(tmp_path / "a.wav", max_duration_s=1.0)[0]) == 24000


def test_read_refuses_long_audio_while_decoding(tmp_path, monkeypatch):
    # A flac whose header does not say how long it is (36 bits of STREAMINFO set to zero).
    path = tmp_path / "a.flac"
    write_audio(path, np.zeros(48000, np.float32), 24000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    monkeypatch.setattr(audio_module, "_READ_BLOCK", 4096)
    decoded = []
    original = soundfile.SoundFile.read

    def counting(self, *args, **kwargs):
        block = original(self, *args, **kwargs)
        decoded.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    with pytest.raises(ValueError, match=r"longer than the 0\.5 s allowed"):
        read_audio(path, max_duration_s=0.5)
    assert sum(decoded) <= 12000 + 4096


def test_read_refuses_what_is_not_audio(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"not audio at all")
    with pytest.raises(ValueError, match=r"a\.wav cannot be read as audio"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(FileNotFoundError, match=r"no audio file at .*b\.wav"):
        read_audio(tmp_path / "b.wav")
    with pytest.raises(ValueError, match="is not a file"):
        read_audio(tmp_path)


def test_read_refuses_nan(tmp_path):
    x = np.array([0.0, np.nan], np.float32)
    soundfile.write(tmp_path / "a.wav", x, 24000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav holds 1 NaN"):
        read_audio(tmp_path / "a.wav")


def test_read_of_a_damaged_header_is_an_error(tmp_path):
    write_audio(tmp_path / "a.wav", noise(1000) / 5, 24000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[22:24] = struct.pack("<H", 0)  # no channels
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read as audio"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("kind", "promised", "there"),
    [("WAV", "48,000", "23,978"), ("AIFF", "48,008", "23,981"), ("AU", "48,000", "23,988")],
)
def test_read_refuses_what_is_cut_short(tmp_path, kind, promised, there):
    whole = io.BytesIO()
    soundfile.write(whole, noise(24000) / 5, 24000, format=kind)
    path = tmp_path / "a.wav"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ValueError, match=rf"cut short: .*{promised} bytes.* {there} are there"):
        read_audio(path)
    path.write_bytes(whole.getvalue())
    assert len(read_audio(path)[0]) == 24000


def test_read_refuses_flac_that_is_cut_short(tmp_path):
    path = tmp_path / "a.flac"
    write_audio(path, noise(240_000) / 5, 24000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot be read as audio: \S"):
        read_audio(path)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_read_takes_a_wav_written_into_a_pipe(tmp_path, size):
    # Its writer could not go back to the header: ffmpeg, sox and others leave such sizes there.
    path = tmp_path / "a.wav"
    write_audio(path, noise(1000) / 5, 24000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", size)
    path.write_bytes(data)
    assert len(read_audio(path)[0]) == 1000


def test_check_writable_leaves_no_trace(tmp_path):
    (tmp_path / "old.wav").write_bytes(b"old")
    check_writable(tmp_path / "old.wav")
    check_writable(tmp_path / "new.flac")
    assert os.listdir(tmp_path) == ["old.wav"]
    assert (tmp_path / "old.wav").read_bytes() == b"old"


def test_check_writable_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        check_writable(tmp_path / "missing" / "a.wav")
    with pytest.raises(ValueError, match=r"\.wav or \.flac, not '\.mp3'"):
        check_writable(tmp_path / "a.mp3")
    (tmp_path / "dir.wav").mkdir()
    with pytest.raises(ValueError, match="not a file"):
        check_writable(tmp_path / "dir.wav")


def test_check_writable_tries_the_directory(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"cannot write .*a\.wav: Permission denied"):
        check_writable(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (KeyboardInterrupt(), None),
        (
            OSError(28, "No space left on device"),
            r"cannot write .*/a\.wav: No space left on device",
        ),
        (OSError("odd"), r"cannot write .*/a\.wav: odd"),
    ],
)
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, failure, said):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def fail(descriptor):
        assert len(os.listdir(tmp_path)) == 2  # with all of it in the temporary file
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure), match=said):
        write_audio(path, noise(100) / 5, 24000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.wav"]


def test_the_encoder_never_meets_the_disk(tmp_path, monkeypatch):
    # It would call back into Python, which prints the exception of a full disk and goes on.
    targets = []
    original = soundfile.write
    monkeypatch.setattr(
        soundfile, "write", lambda file, *a, **k: (targets.append(file), original(file, *a, **k))
    )
    write_audio(tmp_path / "a.flac", noise(100) / 5, 24000)
    assert isinstance(targets[0], io.BytesIO)
    with pytest.raises(OSError, match=r"cannot write .*b\.flac: .*"):
        write_audio(tmp_path / "b.flac", noise(100) / 5, 700_000)  # more than FLAC can say


def test_write_refuses_bad_audio_before_touching_the_file(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        write_audio(tmp_path / "a.wav", np.array([np.nan], np.float32), 24000)
    assert os.listdir(tmp_path) == []


def test_write_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "link.wav").symlink_to(tmp_path / "real.wav")
    write_audio(tmp_path / "link.wav", noise(100) / 5, 24000)
    assert (tmp_path / "link.wav").is_symlink()
    assert len(read_audio(tmp_path / "real.wav")[0]) == 100


def test_written_files_have_ordinary_permissions(tmp_path):
    write_audio(tmp_path / "a.wav", noise(100) / 5, 24000)
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a.wav").stat().st_mode == (tmp_path / "plain").stat().st_mode
