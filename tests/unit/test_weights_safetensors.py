"""safetensors files: equal to the library's, and every kind of damage named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from csm_jax.weights import WeightsError
from csm_jax.weights.safetensors_io import (
    CHECKSUM_KEY,
    MAX_HEADER_BYTES,
    Output,
    SafetensorsSource,
    read_header,
    write_safetensors,
)
from csm_jax.weights.tables import TensorSpec
from tests.support.checkpoints import BFLOAT16, assert_same_bits

TENSORS = {
    "half": np.arange(5, dtype=np.float16),
    "table": np.arange(12, dtype=np.float32).reshape(3, 4),
    "brain": np.arange(6).reshape(2, 3).astype(BFLOAT16),
    "none": np.empty((0, 4), np.float32),
    "scalar": np.array(2.5, np.float32),
}


def write(path: Path, tensors=TENSORS, **metadata: str) -> None:
    outputs = [
        Output(name, TensorSpec(array.dtype.name, array.shape), lambda array=array: [array])
        for name, array in tensors.items()
    ]
    write_safetensors(path, outputs, metadata=metadata, progress=lambda count: None)


def read(path: Path) -> dict[str, np.ndarray]:
    source = SafetensorsSource([path], where=str(path))
    try:
        return {name: source.read(name) for name in source.specs}
    finally:
        source.close()


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "f")
    assert_same_bits(read(tmp_path / "f"), TENSORS)


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path / "f", format="pt")
    assert_same_bits(load_file(tmp_path / "f"), TENSORS)
    with safe_open(tmp_path / "f", "np") as file:
        assert file.metadata()["format"] == "pt"
        assert set(json.loads(file.metadata()[CHECKSUM_KEY])) == set(TENSORS)
    assert_same_bits(read(tmp_path / "f"), TENSORS)


def test_chunks_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("csm_jax.weights.safetensors_io.CHUNK_BYTES", 8)
    write(tmp_path / "f")
    assert_same_bits(read(tmp_path / "f"), TENSORS)
    source = SafetensorsSource([tmp_path / "f"], where="f")
    assert [chunk.size for chunk in source.chunks("table")] == [2] * 6
    source.close()


def test_every_damaged_byte_is_found(tmp_path):
    write(tmp_path / "f")
    good = (tmp_path / "f").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for position in range(header, len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x10
        (tmp_path / "f").write_bytes(bad)
        with pytest.raises(WeightsError, match=r"tensor \w+ is damaged.*checksum"):
            read(tmp_path / "f")


def test_truncation_anywhere_is_found(tmp_path):
    write(tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    for size in range(len(good)):
        (tmp_path / "bad").write_bytes(good[:size])
        with pytest.raises(WeightsError, match="bad: truncated"):
            read_header(tmp_path / "bad")


def test_file_that_shrinks_after_the_header_was_read(tmp_path):
    write(tmp_path / "f")
    source = SafetensorsSource([tmp_path / "f"], where="f")
    with open(tmp_path / "f", "r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    with pytest.raises(WeightsError, match="truncated: the file ends inside tensor brain"):
        source.read("brain")
    source.close()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(header: bytes | dict, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


DAMAGED = {
    "empty": (b"", "too short"),
    "no length": (b"\0" * 7, "too short"),
    "huge header": (raw({}, length=MAX_HEADER_BYTES + 1), "claims 100,000,001 bytes"),
    "huge header 64 bit": (raw({}, length=2**64 - 1), "is this a safetensors file"),
    "header beyond the end": (raw({}, length=1000), "the header alone ends"),
    "zip file": (b"PK\x03\x04" + b"\0" * 100, "truncated|does not start"),
    "not json": (raw(b"{oops}"), "damaged JSON"),
    "not an object": (raw(b"[1]"), "does not start with"),
    "not utf-8": (raw(b'{"\xff": 1}'), "utf-8"),
    "nested deep": (raw(b'{"a":' + b"[" * 100_000), "damaged JSON"),
    "nan": (raw(b'{"a": NaN}'), "NaN is not JSON"),
    "key twice": (
        raw(
            b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"
        ),
        "'a' occurs twice",
    ),
    "field twice": (
        raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"shape":[2]}}'),
        "'shape' occurs twice",
    ),
    "bad metadata": (raw({"__metadata__": {"x": 1}, "a": entry()}), "__metadata__"),
    "field missing": (raw({"a": {"dtype": "F32", "shape": [2]}}), "tensor a: its entry must hold"),
    "entry a list": (raw({"a": []}), "tensor a: its entry must hold"),
    "unknown dtype": (raw({"a": entry(dtype="F31")}), "tensor a: unknown dtype 'F31'"),
    "dtype a list": (raw({"a": entry(dtype=["F32"])}), "tensor a: unknown dtype"),
    "negative size": (raw({"a": entry(shape=[-2])}), "tensor a: shape"),
    "bool size": (raw({"a": entry(shape=[True, 2])}), "tensor a: shape"),
    "float size": (raw({"a": entry(shape=[2.0])}), "tensor a: shape"),
    "rank": (raw({"a": entry(shape=[1] * 99)}), "tensor a: shape"),
    "size overflow": (raw({"a": entry(shape=[2**62, 2**62])}), "is not that size"),
    "negative offset": (raw({"a": entry(offsets=[-8, 0])}), "tensor a: data_offsets"),
    "backward": (raw({"a": entry(offsets=[8, 0])}), "is not that size"),
    "three offsets": (raw({"a": entry(offsets=[0, 4, 8])}), "tensor a: data_offsets"),
    "wrong size": (raw({"a": entry(shape=[3])}), "is not that size"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "overlaps that of a"),
    "same place": (raw({"a": entry(), "b": entry()}), "overlaps that of a"),
    "gap": (raw({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "leaves a gap after"),
    "gap first": (raw({"a": entry(offsets=[4, 12])}, b"\0" * 12), "gap after that of the header"),
    "beyond the end": (raw({"a": entry(shape=[9], offsets=[0, 36])}), "28 bytes are missing"),
    "trailing": (raw({"a": entry()}, b"\0" * 9), "1 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_header(tmp_path, case):
    content, words = DAMAGED[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        read_header(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)


def test_all_damaged_entries_are_listed(tmp_path):
    (tmp_path / "f").write_bytes(raw({"a": entry(dtype="X"), "b": entry(shape=[3]), "c": entry()}))
    with pytest.raises(WeightsError) as caught:
        read_header(tmp_path / "f")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("sums", ['{"table": "zz"}', '{"table": 5}', "[]", "{"])
def test_damaged_checksums(tmp_path, sums):
    save_file(TENSORS, tmp_path / "f", metadata={CHECKSUM_KEY: sums})
    with pytest.raises(WeightsError, match="damaged"):
        SafetensorsSource([tmp_path / "f"], where="f")


def test_writer_refuses_wrong_amounts_and_existing_files(tmp_path):
    spec = TensorSpec("float32", (4,))
    output = Output("a", spec, lambda: [np.zeros(3, np.float32)])
    with pytest.raises(WeightsError, match="tensor a: 12 of 16 bytes"):
        write_safetensors(tmp_path / "f", [output], metadata={}, progress=lambda count: None)
    (tmp_path / "g").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write(tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == b"precious"


def test_tensor_in_two_files(tmp_path):
    write(tmp_path / "f")
    write(tmp_path / "g")
    with pytest.raises(WeightsError, match="5 problems") as caught:
        SafetensorsSource([tmp_path / "f", tmp_path / "g"], where="index")
    assert "tensor brain is in f and g" in str(caught.value)
