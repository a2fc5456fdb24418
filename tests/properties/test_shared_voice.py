"""A shared segment gives what the same positions give as part of the prompt, up to rounding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax import kvcache
from csm_jax.array_typing import Params
from csm_jax.generate import generate_frames, init_state, insert, prefill, share, stack_prompts
from csm_jax.kvcache import SharedKV
from csm_jax.llama import attend, attend_shared
from tests.support.model import CAPACITY, params_of, prompt, settings, short_config

CONFIG = short_config()
VOICES = [prompt(CONFIG, 6, 20, seed=70), prompt(CONFIG, 3, 11, seed=71)]
TURNS = [prompt(CONFIG, 5 + i, 0, seed=i) for i in range(4)]
USES = [0, -1, 1, 0]


@pytest.fixture(scope="module")
def params() -> Params:
    return params_of(CONFIG)


def one(pair: tuple[np.ndarray, np.ndarray], size: int) -> list[jnp.ndarray]:
    return [jnp.asarray(x) for x in stack_prompts([pair], size)]


def segments(params: Params, *, order: list[int], capacity: int = 48) -> SharedKV:
    shared = kvcache.init_shared(CONFIG.backbone, segments=3, capacity=capacity, dtype=jnp.float32)
    for place, voice in enumerate(order):
        prefix = prefill(params, *one(VOICES[voice], 32), config=CONFIG)
        shared = share(shared, prefix, jnp.int32(place))
    return shared


def hidden_and_codes(
    params: Params, shared: SharedKV, place: dict[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    rows = settings([0, 1, 2, 3], temperature=0.0)
    uses = jnp.array([place.get(use, -1) for use in USES], jnp.int32)
    frames, mask = (jnp.asarray(x) for x in stack_prompts(TURNS, 32))
    prefix = prefill(params, frames, mask, shared, uses, config=CONFIG)
    rows = rows.__class__(
        **{
            name: getattr(rows, name)
            for name in ("key", "max_frames", "sampling", "decoder_sampling")
        },
        segment=uses,
    )
    state = init_state(CONFIG, batch=4, capacity=CAPACITY, dtype=jnp.float32)
    state = insert(state, prefix, rows, jnp.arange(4))
    _, codes, valid = generate_frames(
        params, state, shared, config=CONFIG, num_frames=10, window=CAPACITY, ranks=64
    )
    assert np.asarray(valid).all()
    return np.asarray(prefix.hidden), np.asarray(codes)


def test_a_voice_is_worth_its_positions(params: Params) -> None:
    """Prefill and 10 greedy frames equal those of voice and turn in one prompt."""
    hidden, codes = hidden_and_codes(params, segments(params, order=[0, 1]), {0: 0, 1: 1})
    for row, use in enumerate(USES):
        frames, mask = TURNS[row]
        if use >= 0:
            frames = np.concatenate([VOICES[use][0], frames])
            mask = np.concatenate([VOICES[use][1], mask])
        prefix = prefill(params, *one((frames, mask), 64), config=CONFIG)
        np.testing.assert_allclose(hidden[row], np.asarray(prefix.hidden)[0], atol=2e-5)
        state = init_state(CONFIG, batch=1, capacity=CAPACITY, dtype=jnp.float32)
        state = insert(state, prefix, settings([row], temperature=0.0), jnp.arange(1))
        _, want, _ = generate_frames(
            params, state, config=CONFIG, num_frames=10, window=CAPACITY, ranks=64
        )
        np.testing.assert_array_equal(codes[row], np.asarray(want)[0])


def test_the_place_of_a_segment_changes_no_bit(params: Params) -> None:
    first = hidden_and_codes(params, segments(params, order=[0, 1]), {0: 0, 1: 1})
    other = hidden_and_codes(params, segments(params, order=[1, 1, 0]), {0: 2, 1: 1})
    for a, b in zip(first, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_merging_equals_one_softmax_also_where_one_part_is_all() -> None:
    rng = np.random.default_rng(0)
    q, k, v, shared_k, shared_v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((4, 2, 2, 3, 8), (4, 2, 6, 8), (4, 2, 6, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    )
    # Scores hundreds apart: one part's share vanishes, without overflow.
    q = q * jnp.array([1.0, 1.0, 100.0, 1.0])[:, None, None, None, None]
    shared_k = shared_k.at[1].multiply(10.0)
    use = np.array([0, -1, 1, 1])
    lengths = np.array([5, 3])
    mask = jnp.asarray(rng.random((4, 2, 6)) < 0.7).at[:, :, 0].set(True)
    shared_mask = jnp.arange(5)[None] < lengths[:, None]
    got = attend_shared(
        q, k, v, mask, shared_k, shared_v, shared_mask, jnp.arange(2)[:, None] == use[None]
    )
    for row in range(4):
        keys, values, seen = k[row], v[row], mask[row]
        if use[row] >= 0:
            n = lengths[use[row]]
            keys = jnp.concatenate([shared_k[use[row], :, :n], keys], axis=1)
            values = jnp.concatenate([shared_v[use[row], :, :n], values], axis=1)
            seen = jnp.concatenate([jnp.ones((2, n), bool), seen], axis=1)
        want = attend(q[row][None], keys[None], values[None], seen[None])[0]
        np.testing.assert_allclose(np.asarray(got[row]), np.asarray(want), atol=2e-6)


def test_padding_of_a_voice_leaves_nothing_in_its_segment(params: Params) -> None:
    shared = segments(params, order=[1])
    assert shared.length.tolist() == [14, 0, 0]
    for leaf in (*shared.k, *shared.v):
        assert np.asarray(leaf)[0, :, :14].any()
        assert not np.asarray(leaf)[0, :, 14:].any()
        assert not np.asarray(leaf)[1:].any()
