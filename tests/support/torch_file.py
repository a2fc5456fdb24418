"""Checkpoints in torch's file format, written without torch: for models of environments that lack it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_torch_file(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Returns `path` after writing there what `torch.save` writes for a dict of float32 tensors."""
    arrays = {name: np.asarray(tensor, "<f4", order="C") for name, tensor in tensors.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle(arrays))
        archive.writestr("archive/byteorder", "little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{number}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    # {name: torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())}
    items = b"".join(
        _text(name) + _tensor(str(number), array)
        for number, (name, array) in enumerate(arrays.items())
    )
    return b"\x80\x02}(" + items + b"u."


def _tensor(key: str, array: np.ndarray) -> bytes:
    storage = (b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu")) + (
        _int(array.size) + b"tQ"
    )
    strides = [stride // array.itemsize for stride in array.strides]
    arguments = b"(" + storage + _int(0) + _ints(array.shape) + _ints(strides) + b"\x89"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"ccollections\nOrderedDict\n)RtR"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def _ints(values) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"
