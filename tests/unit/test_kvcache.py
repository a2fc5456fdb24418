from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax import kvcache
from csm_jax.config import tiny

CONFIG = tiny().backbone


def cache(per_row: bool = True) -> kvcache.KVCache:
    return kvcache.init(CONFIG, batch=2, capacity=8, dtype=jnp.float32, per_row=per_row)


def steps(count: int, seed: int = 0) -> jax.Array:
    shape = (2, CONFIG.num_kv_heads, count, CONFIG.head_dim)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_rows_are_written_at_their_own_length() -> None:
    start = kvcache.advance(cache(), jnp.array([1, 4]))
    k, v = steps(2), steps(2, seed=1)
    after = kvcache.append(start, 1, k, v)
    for row, at in ((0, 1), (1, 4)):
        want = np.zeros((CONFIG.num_kv_heads, 8, CONFIG.head_dim), np.float32)
        want[:, at : at + 2] = np.asarray(k[row])
        np.testing.assert_array_equal(np.asarray(after.k[1][row]), want)
        np.testing.assert_array_equal(np.asarray(after.v[1][row, :, at : at + 2]), v[row])
    assert not np.any(np.asarray(after.k[0]))
    assert after.length.tolist() == [1, 4]


def test_a_shared_length_writes_every_row_at_the_same_position() -> None:
    after = kvcache.append(kvcache.advance(cache(per_row=False), 3), 0, steps(1), steps(1))
    np.testing.assert_array_equal(np.asarray(after.k[0][:, :, 3:4]), steps(1))
    assert not np.any(np.asarray(after.k[0][:, :, jnp.array([0, 1, 2, 4])]))


def test_the_mask_shows_the_past_and_oneself() -> None:
    mask = kvcache.mask(kvcache.advance(cache(), jnp.array([0, 3])), num_steps=2, window=6)
    assert np.asarray(mask).astype(int).tolist() == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    ]


def test_a_capacity_beyond_max_seq_len_is_refused() -> None:
    with pytest.raises(ValueError, match="2049 exceeds max_seq_len=2048"):
        kvcache.init(CONFIG, batch=1, capacity=2049, dtype=jnp.float32, per_row=True)
