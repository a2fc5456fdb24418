"""Mimi on a mesh: rows over the data axis, and what one device gives."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from csm_jax.mimi import model
from csm_jax.mimi.codec import JaxMimi
from csm_jax.mimi.config import tiny_mimi
from csm_jax.mimi.params import init_params

CONFIG = tiny_mimi()


def test_batches_on_a_mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    codec = JaxMimi(CONFIG, init_params(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    rows = [
        rng.integers(0, CONFIG.codebook_size, (frames, 32), dtype=np.int32)
        for frames in (5, 64, 3, 9, 11, 2, 33, 7)  # two pieces of one size
    ]
    solo = codec.decode_batch(rows)
    codes = codec.encode_batch(solo)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        state = model.init_decode_state(CONFIG, batch=8)
        ring = state["transformer"]["layers"]["0"]["k"]
        assert ring.sharding.shard_shape(ring.shape)[0] == 2
        for audio, expected in zip(codec.decode_batch(rows), solo, strict=True):
            np.testing.assert_allclose(audio, expected, rtol=0, atol=1e-5)
        same = [(a == b).mean() for a, b in zip(codec.encode_batch(solo), codes, strict=True)]
        assert min(same) >= 0.999
        # One row does not divide by the mesh: every device computes it.
        with codec.open_stream() as stream:
            np.testing.assert_allclose(stream.decode(rows[0]), solo[0], rtol=0, atol=1e-5)
