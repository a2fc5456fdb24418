import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from csm_jax.bridge import mimi as mimi_module
from csm_jax.bridge.mimi import TorchMimi
from csm_jax.codec import Codec, CodecStream
from tests.support.mimi import small_config, write_mimi

CONTEXT = 20  # attention steps, 10 frames: streams below outlive it several times


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    config = small_config(context=CONTEXT)
    return write_mimi(tmp_path_factory.mktemp("mimi") / "mimi.safetensors", config=config)


@pytest.fixture(scope="module")
def codec(path):
    return TorchMimi.from_file(path)


def random_codes(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32), dtype=np.int32)


def test_sizes(codec):
    assert isinstance(codec, Codec)
    assert (codec.sample_rate, codec.num_codebooks, codec.codebook_size) == (24000, 32, 256)
    assert codec.samples_per_frame == 1920


def test_decode_equals_moshi(codec, path):
    codes = random_codes(9)
    tensor = torch.from_numpy(codes.astype(np.int64)).T[None]
    with torch.no_grad():
        expected = codec._model.decode(tensor)[0, 0].numpy()
    audio = codec.decode(codes)
    assert audio.dtype == np.float32
    assert audio.shape == (9 * 1920,)
    np.testing.assert_allclose(audio, expected, atol=1e-6)
    assert audio.std() > 1e-3


def test_encode_equals_moshi(codec):
    audio = np.random.default_rng(0).standard_normal(5000).astype(np.float32) / 5
    codes = codec.encode(audio)
    assert codes.dtype == np.int32
    assert codes.shape == (3, 32)  # 5,000 samples are 2.6 frames
    with torch.no_grad():
        expected = codec._model.encode(torch.from_numpy(np.pad(audio, (0, 760)))[None, None])
    np.testing.assert_array_equal(codes, expected[0].T.numpy())
    assert len(np.unique(codes)) > 10


def test_fewer_codebooks_are_the_first_ones(path, codec):
    audio = np.random.default_rng(0).standard_normal(5000).astype(np.float32) / 5
    few = TorchMimi.from_file(path, num_codebooks=8)
    assert few.num_codebooks == 8
    np.testing.assert_array_equal(few.encode(audio), codec.encode(audio)[:, :8])


@pytest.mark.parametrize("group_frames", [1200, 10])
def test_batch_equals_single(codec, monkeypatch, group_frames):
    monkeypatch.setattr(mimi_module, "_BATCH_FRAMES", group_frames)
    rows = [random_codes(frames, seed) for seed, frames in enumerate([7, 25, 0, 1, 12, 3])]
    for row, audio in zip(rows, codec.decode_batch(rows), strict=True):
        assert audio.shape == (len(row) * 1920,)
        expected = codec.decode(row)
        np.testing.assert_allclose(audio, expected, atol=1e-5)
    assert codec.decode_batch([]) == []


def test_stream_equals_whole(codec):
    codes = random_codes(90)
    whole = codec.decode(codes)
    with codec.open_stream() as stream:
        assert isinstance(stream, CodecStream)
        pieces, position = [], 0
        for frames in (1, 1, 2, 0, 5, 40, 16, 25):
            pieces.append(stream.decode(codes[position : position + frames]))
            assert pieces[-1].shape == (frames * 1920,)
            position += frames
    streamed = np.concatenate(pieces)
    assert position == 90
    np.testing.assert_allclose(streamed, whole, atol=1e-5)


def test_streams_do_not_disturb_each_other(codec):
    rows = [random_codes(12, seed) for seed in range(3)]
    wholes = [codec.decode(row) for row in rows]
    streams = [codec.open_stream() for _ in rows]
    pieces = [[], [], []]
    for step in range(6):
        for stream, row, out in zip(streams, rows, pieces, strict=True):
            out.append(stream.decode(row[2 * step : 2 * step + 2]))
        codec.decode(random_codes(3, 9))  # nor does decoding in between
        codec.encode(np.zeros(1920, np.float32) + 0.1)
    for whole, out in zip(wholes, pieces, strict=True):
        np.testing.assert_allclose(np.concatenate(out), whole, atol=1e-5)


def test_a_refused_chunk_leaves_the_stream_as_it_was(codec):
    codes = random_codes(6)
    stream = codec.open_stream()
    first = stream.decode(codes[:3])
    with pytest.raises(ValueError, match="outside"):
        stream.decode(codes[3:] + 256)
    streamed = np.concatenate([first, stream.decode(codes[3:])])
    np.testing.assert_allclose(streamed, codec.decode(codes), atol=1e-5)


def test_a_closed_stream_says_so(codec):
    stream = codec.open_stream()
    stream.close()
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.decode(random_codes(1))


def test_bad_codes_and_audio(codec):
    with pytest.raises(ValueError, match=r"outside 0\.\.255"):
        codec.decode(np.full((2, 32), 256))
    with pytest.raises(ValueError, match="transpose"):
        codec.decode(np.zeros((32, 5), np.int32))
    with pytest.raises(ValueError, match="NaN"):
        codec.encode(np.full(1920, np.nan, np.float32))


def test_the_published_architecture_needs_no_config(tmp_path):
    path = write_mimi(tmp_path / "tokenizer-e351c8d8-checkpoint125.safetensors", config=None)
    with safe_open(path, framework="np") as file:
        assert not file.metadata()
    codec = TorchMimi.from_file(path)
    assert (codec.num_codebooks, codec.codebook_size) == (32, 2048)
    codes = random_codes(2) * 8
    streamed = codec.open_stream().decode(codes)
    np.testing.assert_allclose(streamed, codec.decode(codes), atol=1e-5)
    path.unlink()


# --- bad files ---------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Mimi weights at .*mimi\.safetensors"):
        TorchMimi.from_file(tmp_path / "mimi.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, 100_000])
def test_truncated_file(path, tmp_path, keep):
    bad = tmp_path / "cut.safetensors"
    bad.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors"):
        TorchMimi.from_file(bad)


def test_foreign_file_lists_the_tensors(path, tmp_path):
    bad = tmp_path / "other.safetensors"
    state = load_file(path)
    name = next(iter(state))
    state["extra"] = state.pop(name)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(state, bad, metadata=metadata)
    with pytest.raises(ValueError, match=r"(?s)other\.safetensors does not hold Mimi") as info:
        TorchMimi.from_file(bad)
    assert name in str(info.value)
    assert "extra" in str(info.value)


@pytest.mark.parametrize("config", ["{", "[]", json.dumps({"seanet": {}})])
def test_bad_config(path, tmp_path, config):
    bad = tmp_path / "bad.safetensors"
    save_file(load_file(path), bad, metadata={"mimi_config": config})
    with pytest.raises(ValueError, match=r"bad\.safetensors.*mimi_config"):
        TorchMimi.from_file(bad)


def test_pickles_are_refused(tmp_path):
    bad = tmp_path / "mimi.pt"
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        TorchMimi.from_file(bad)


@pytest.mark.parametrize("num_codebooks", [0, 33])
def test_too_many_codebooks(path, num_codebooks):
    with pytest.raises(ValueError, match=f"num_codebooks={num_codebooks}, but .* has 32 codebooks"):
        TorchMimi.from_file(path, num_codebooks=num_codebooks)
