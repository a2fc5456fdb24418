"""The orbax directory, finished and not."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest

from csm_jax.weights.checkpoint import COMMIT_NAME, OrbaxSource, write_orbax
from csm_jax.weights.errors import WeightsError


def test_a_directory_whose_saving_was_not_finished_is_refused(tmp_path: Path) -> None:
    write_orbax(tmp_path / "params", {"a.b": jnp.ones((2, 3))})
    source = OrbaxSource(tmp_path / "params")
    assert source.read("a.b").sum() == 6
    source.close()
    (tmp_path / "params" / COMMIT_NAME).unlink()
    with pytest.raises(WeightsError, match=r"unfinished orbax checkpoint: there is no commit_succ"):
        OrbaxSource(tmp_path / "params")
