"""Mimi in pieces: any cutting, any company, any moment gives the audio and codes of the whole."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.mimi import model
from csm_jax.mimi.codec import JaxMimi, bucket
from csm_jax.mimi.config import tiny_mimi
from csm_jax.mimi.params import init_params

CONFIG = dataclasses.replace(
    tiny_mimi(), context=14, num_residual_layers=2, embed_dim=16, intermediate_dim=24
)
"""7 frames of context, so that the rings below wrap several times; two dilations."""
FRAMES = 30
SPLITS = 200
SIZE = CONFIG.samples_per_frame


@pytest.fixture(scope="module")
def codec() -> JaxMimi:
    return JaxMimi(CONFIG, init_params(CONFIG, jax.random.key(3)))


def random_codes(frames: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.codebook_size, (frames, CONFIG.num_codebooks), dtype=np.int32)


def random_audio(frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, frames * SIZE).astype(np.float32)


def random_split(frames: int, rng: np.random.Generator) -> list[int]:
    sizes: list[int] = []
    while (rest := frames - sum(sizes)) > 0:
        sizes.append(int(rng.integers(1, min(rest, int(rng.choice([1, 3, 8, FRAMES]))) + 1)))
    return sizes


@pytest.mark.parametrize("seed", range(2))
def test_decoding_in_any_pieces_equals_the_whole(codec, seed):
    rng = np.random.default_rng(seed)
    codes = random_codes(FRAMES, seed)
    whole = codec.decode(codes)
    assert whole.std() > 0.01
    for _ in range(SPLITS // 4):
        with codec.open_stream() as stream:
            pieces, start = [], 0
            for size in random_split(FRAMES, rng):
                pieces.append(stream.decode(codes[start : start + size]))
                assert pieces[-1].shape == (size * SIZE,)
                start += size
        np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_encoding_in_any_pieces_equals_the_whole(codec, seed):
    # The features are compared and not the codes: a rounding can tip a code over.
    rng = np.random.default_rng(seed)
    audio = random_audio(FRAMES, seed).reshape(FRAMES, SIZE)
    encode = jax.jit(model.encode_features, static_argnames="config")

    def features(sizes: list[int]) -> np.ndarray:
        state, start, pieces = model.init_encode_state(CONFIG, batch=1), 0, []
        for size in sizes:
            piece = np.zeros((bucket(size), SIZE), np.float32)
            piece[:size] = audio[start : start + size]
            got, state = encode(
                codec._params, state, piece.reshape(1, -1), jnp.array([size]), config=CONFIG
            )
            pieces.append(np.asarray(got)[0, :size])
            start += size
        return np.concatenate(pieces)

    whole = features([FRAMES])
    assert whole.std() > 0.05
    for _ in range(SPLITS // 4):
        np.testing.assert_allclose(
            features(random_split(FRAMES, rng)), whole, rtol=0, atol=1e-5 * np.abs(whole).max()
        )


def with_nan(leaf: jax.Array, *, rows: np.ndarray) -> jax.Array:
    if leaf.dtype == jnp.int32:
        return leaf
    return jnp.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.nan, leaf)


def run_schedule(codec: JaxMimi, *, encode: bool, poison: bool) -> list[tuple]:
    """Returns (input, output) of the utterances of 12 users of 3 slots that come, pause and go."""
    rng = np.random.default_rng(int(encode))
    make = random_audio if encode else random_codes
    step = model.encode_frames if encode else model.decode_frames
    init = model.init_encode_state if encode else model.init_decode_state
    waiting = [make(int(rng.integers(1, 30)), seed) for seed in range(12)]
    if encode:
        waiting = [audio.reshape(-1, SIZE) for audio in waiting]
    state = init(CONFIG, batch=3)
    slots: list[tuple[np.ndarray, list[np.ndarray]] | None] = [None] * 3
    done = []
    while waiting or any(slots):
        fresh = np.zeros(3, bool)
        for slot in range(3):
            if slots[slot] is None and waiting and rng.random() < 0.7:
                slots[slot], fresh[slot] = (waiting.pop(), []), True
        if poison and fresh.any():  # the user before left NaN everywhere
            state = jax.tree.map(functools.partial(with_nan, rows=fresh), state)
        state = model.reset(state, jnp.asarray(fresh))
        # 4 columns; each row has 0 to 4 frames, and what lies beyond is rubbish.
        piece = make(12, int(rng.integers(1 << 30))).reshape(3, 4, -1)
        counts = np.zeros(3, np.int32)
        for slot, user in enumerate(slots):
            if user is None:
                continue
            given = sum(len(part) for part in user[1])
            counts[slot] = min(int(rng.integers(0, 5)), len(user[0]) - given)
            piece[slot, : counts[slot]] = user[0][given : given + counts[slot]]
        argument = piece.reshape(3, -1) if encode else piece
        out, state = step(codec._params, state, argument, counts, config=CONFIG)
        out = np.asarray(out).reshape(3, 4, -1)
        for slot, user in enumerate(slots):
            if user is None:
                continue
            user[1].append(out[slot, : counts[slot]])
            if sum(len(part) for part in user[1]) == len(user[0]):
                done.append((user[0], np.concatenate(user[1])))
                slots[slot] = None
    assert len(done) == 12
    return done


@pytest.mark.parametrize("poison", [False, True])
def test_rows_that_start_pause_and_stop_at_different_times(codec, poison):
    for codes, audio in run_schedule(codec, encode=False, poison=poison):
        np.testing.assert_allclose(audio.reshape(-1), codec.decode(codes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("poison", [False, True])
def test_encoding_rows_at_different_times(codec, poison):
    same = total = 0
    for audio, codes in run_schedule(codec, encode=True, poison=poison):
        expected = codec.encode(audio.reshape(-1))
        same += (codes == expected).sum()
        total += codes.size
    assert same >= 0.999 * total


def test_a_piece_longer_than_the_context(codec):
    codes = random_codes(32, 9)  # 64 positions through a ring of 14
    with codec.open_stream() as stream:
        by_frame = [stream.decode(codes[i : i + 1]) for i in range(32)]
    np.testing.assert_allclose(np.concatenate(by_frame), codec.decode(codes), rtol=0, atol=1e-5)


def test_causality(codec):
    codes = random_codes(20, 1)
    other = codes.copy()
    other[12:] = random_codes(8, 2)
    a, b = codec.decode(codes), codec.decode(other)
    np.testing.assert_array_equal(a[: 12 * SIZE], b[: 12 * SIZE])
    assert np.abs(a[12 * SIZE : 13 * SIZE] - b[12 * SIZE : 13 * SIZE]).max() > 1e-3
