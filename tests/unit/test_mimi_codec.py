from __future__ import annotations

import threading

import jax
import numpy as np
import pytest

from csm_jax.codec import Codec, CodecStream
from csm_jax.mimi import model
from csm_jax.mimi.codec import JaxMimi, bucket
from csm_jax.mimi.config import tiny_mimi
from csm_jax.mimi.params import init_params

CONFIG = tiny_mimi()


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def codec(params):
    return JaxMimi(CONFIG, params)


def random_codes(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32), dtype=np.int32)


def random_audio(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.2, samples).astype(np.float32)


def test_is_a_codec(codec):
    assert isinstance(codec, Codec)
    assert isinstance(codec.open_stream(), CodecStream)
    assert (codec.sample_rate, codec.num_codebooks, codec.codebook_size) == (24_000, 32, 256)


def test_shapes_and_dtypes(codec):
    codes = codec.encode(random_audio(5000))
    assert (codes.shape, codes.dtype) == ((3, 32), np.int32)
    assert len(np.unique(codes)) > 30
    audio = codec.decode(codes)
    assert (audio.shape, audio.dtype) == ((5760,), np.float32)
    assert audio.std() > 1e-3


def test_the_last_frame_is_filled_with_silence(codec):
    audio = random_audio(5000)
    np.testing.assert_array_equal(codec.encode(audio), codec.encode(np.pad(audio, (0, 760))))


def test_fewer_codebooks_are_the_first_ones(codec, params):
    few = JaxMimi(CONFIG, params, num_codebooks=8)
    audio = random_audio(5000)
    codes = codec.encode(audio)
    np.testing.assert_array_equal(few.encode(audio), codes[:, :8])
    one = JaxMimi(CONFIG, params, num_codebooks=1)
    np.testing.assert_array_equal(one.encode(audio), codes[:, :1])
    assert one.decode(codes[:, :1]).shape == few.decode(codes[:, :8]).shape
    assert np.abs(few.decode(codes[:, :8]) - codec.decode(codes)).max() > 1e-3


@pytest.mark.parametrize("num_codebooks", [0, 33, -1])
def test_codebooks_that_are_not_there(params, num_codebooks):
    with pytest.raises(ValueError, match=f"num_codebooks={num_codebooks}.*has 32"):
        JaxMimi(CONFIG, params, num_codebooks=num_codebooks)


def test_batch_equals_single(codec):
    lengths = [7, 50, 0, 1, 12, 3, 33, 2, 9, 64, 5]  # more than a group, longer than a piece
    rows = [random_codes(frames, seed) for seed, frames in enumerate(lengths)]
    for row, audio in zip(rows, codec.decode_batch(rows), strict=True):
        assert audio.shape == (len(row) * 1920,)
        np.testing.assert_allclose(audio, codec.decode(row), atol=1e-5)
    assert codec.decode_batch([]) == []
    audios = [random_audio(samples, seed) for seed, samples in enumerate([1, 1920, 122_000, 5000])]
    same = [
        (codes == codec.encode(audio)).mean()
        for audio, codes in zip(audios, codec.encode_batch(audios), strict=True)
    ]
    assert min(same) >= 0.999


def test_lengths_share_programs(codec):
    for frames in (1, 2, 4, 8, 16, 32):  # the sizes of a piece
        codec.decode(random_codes(frames))
    before = model.decode_frames._cache_size()
    for frames in range(1, 90, 4):
        codec.decode(random_codes(frames))
    assert model.decode_frames._cache_size() == before


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (np.zeros((3, 31), np.int32), ValueError, r"shape \[frames, 32\], got \[3, 31\]"),
        (np.zeros((32, 3), np.int32), ValueError, "transpose"),
        (np.full((3, 32), 256), ValueError, r"96 codes lie outside 0\.\.255"),
        (np.full((3, 32), -1), ValueError, "outside"),
        (np.zeros((3, 32)), TypeError, "integers"),
    ],
)
def test_bad_codes(codec, codes, error, message):
    for call in (codec.decode, codec.open_stream().decode):
        with pytest.raises(error, match=message):
            call(codes)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.array([0.1, np.nan], np.float32), "(?i)nan|finite"),
        (np.zeros((2, 500), np.float32), "mono|1-D|shape"),
    ],
)
def test_bad_audio(codec, audio, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(audio)


def test_a_bad_piece_leaves_the_stream_as_it_was(codec):
    codes = random_codes(6)
    stream = codec.open_stream()
    first = stream.decode(codes[:3])
    with pytest.raises(ValueError, match="outside"):
        stream.decode(codes[3:] + 256)
    assert stream.decode(codes[:0]).shape == (0,)
    whole = np.concatenate([first, stream.decode(codes[3:])])
    np.testing.assert_allclose(whole, codec.decode(codes), atol=1e-5)


def test_a_closed_stream(codec):
    with codec.open_stream() as stream:
        stream.decode(random_codes(1))
    stream.close()
    with pytest.raises(RuntimeError, match="open_stream"):
        stream.decode(random_codes(1))


def test_streams_in_threads_do_not_disturb_each_other(codec):
    rows = [random_codes(12, seed) for seed in range(4)]
    expected = [codec.decode(row) for row in rows]
    results: dict[int, np.ndarray] = {}

    def run(index: int) -> None:
        stream = codec.open_stream()
        parts = [stream.decode(rows[index][i : i + 1]) for i in range(12)]
        results[index] = np.concatenate(parts)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        np.testing.assert_allclose(results[index], expected[index], atol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (31, 32), (32, 32), (33, 64)])
def test_bucket(count, size):
    assert bucket(count) == size
