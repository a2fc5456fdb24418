"""Random damage: a file is read as it was or refused, and nothing else comes out of the readers."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax.weights import WeightsError
from csm_jax.weights.pickle_machine import describe
from csm_jax.weights.safetensors_io import Output, SafetensorsSource, write_safetensors
from csm_jax.weights.tables import TensorSpec
from csm_jax.weights.torch_pickle import TorchSource

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def safetensors_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        outputs = [
            Output(name, TensorSpec(x.dtype.name, x.shape), lambda x=x: [x])
            for name, x in TENSORS.items()
        ]
        write_safetensors(Path(directory, "f"), outputs, metadata={}, progress=lambda count: None)
        return Path(directory, "f").read_bytes()


def torch_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(x) for name, x in TENSORS.items()}, buffer)
    return buffer.getvalue()


SAFETENSORS, TORCH = safetensors_bytes(), torch_bytes()
PICKLE = TORCH[TORCH.index(b"\x80\x02}") : TORCH.index(b"u.", TORCH.index(b"\x80\x02}")) + 2]


def damage(good: bytes) -> st.SearchStrategy[bytes]:
    """Returns a strategy: some bytes replaced, a stretch cut out or doubled."""
    places = st.integers(0, len(good) - 1)

    def replaced(edits: list[tuple[int, int]]) -> bytes:
        bad = bytearray(good)
        for place, value in edits:
            bad[place] = value
        return bytes(bad)

    return st.one_of(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4).map(replaced),
        st.tuples(places, places).map(lambda cut: good[: min(cut)] + good[max(cut) :]),
        st.tuples(places, places).map(lambda cut: good[: max(cut)] + good[min(cut) :]),
    )


def read(path: Path, kind: type) -> dict[str, np.ndarray] | None:
    """Returns the float tensors of the file, or None if it is refused."""
    try:
        source = kind(path) if kind is TorchSource else kind([path], where=str(path))
    except WeightsError:
        return None
    try:
        return {
            name: source.read(name)
            for name, spec in source.specs.items()
            if spec.dtype in ("float32", "float16", "bfloat16")
        }
    except WeightsError:
        return None
    finally:
        source.close()


def is_known(tensors: dict[str, np.ndarray] | None) -> bool:
    """Whether every tensor's bytes are the start of one that was written (names may be damaged)."""
    originals = [x.tobytes() for x in TENSORS.values()]
    return all(
        any(x.tobytes() == original for original in originals) for x in (tensors or {}).values()
    )


def test_undamaged():
    with tempfile.TemporaryDirectory() as directory:
        for good, kind in ((SAFETENSORS, SafetensorsSource), (TORCH, TorchSource)):
            Path(directory, "f").write_bytes(good)
            tensors = read(Path(directory, "f"), kind)
            assert tensors is not None
            assert set(tensors) == set(TENSORS)
            assert is_known(tensors)


@given(damage(SAFETENSORS))
@settings(max_examples=300, deadline=None)
def test_safetensors(bad):
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "f").write_bytes(bad)
        read(Path(directory, "f"), SafetensorsSource)


@given(damage(TORCH))
@settings(max_examples=300, deadline=None)
def test_torch(bad):
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "f").write_bytes(bad)
        read(Path(directory, "f"), TorchSource)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # of pickletools
@given(damage(PICKLE))
@settings(max_examples=300, deadline=None)
def test_pickle(bad):
    try:
        describe(bad)
    except (ValueError, OverflowError):
        return


@given(st.integers(0, len(SAFETENSORS) - 1), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_one_byte_of_safetensors_data(place, change):
    start = 8 + int.from_bytes(SAFETENSORS[:8], "little")
    bad = bytearray(SAFETENSORS)
    bad[start + place % (len(bad) - start)] ^= change
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "f").write_bytes(bad)
        assert read(Path(directory, "f"), SafetensorsSource) is None
