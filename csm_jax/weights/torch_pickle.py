"""Reading `ckpt.pt` without executing anything, and without torch.

`torch.save` writes a zip of uncompressed records: a pickle that describes the objects (read by
`pickle_machine`) and one record of raw bytes per storage.

Source: PyTorch `serialization.py` (record names, byte order).
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csm_jax.weights.errors import WeightsError
from csm_jax.weights.pickle_machine import Tensor, describe, kind
from csm_jax.weights.safetensors_io import read_fully
from csm_jax.weights.source import CHUNK_BYTES, NUMPY_DTYPES, TensorSource
from csm_jax.weights.tables import TensorSpec

MAX_PICKLE_BYTES = 8 << 20
"""CSM-1B's description is about 20 kB, with optimiser state a few hundred."""
MAX_RECORDS = 100_000


class _Record(NamedTuple):
    begin: int
    size: int
    checksum: int


class TorchSource(TensorSource):
    """A `torch.save` file holding a state dict, bare or under the key "model"; see `TensorSource`.

    Args:
        path: The file. The zip directory and the pickle are read here, no tensor is.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file is damaged, not of torch's zip format, or holds anything besides
            tensors, plain values and containers.
    """

    def __init__(self, path: Path):
        self.where = str(path)
        self.recorded_layout: str | None = None
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._verified: set[str] = set()
        try:
            self._records, self._root = self._read_directory()
            self._swap = self._read_byte_order()
            self._tensors = self._state_dict()
            self._check_storages()
        except BaseException:
            self._file.close()
            raise
        self.specs = {
            name: TensorSpec(tensor.storage.dtype, tensor.shape)
            for name, tensor in self._tensors.items()
        }

    def _fail(self, problem: str) -> WeightsError:
        return WeightsError(self.where, problem)

    def _read_directory(self) -> tuple[dict[str, _Record], str]:
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(4)
        self._file.seek(0)
        if not start:
            raise self._fail("truncated: the file is empty")
        if start[:1] == b"\x80":
            raise self._fail(
                "a bare pickle (torch's format before 1.6): load it with torch once and save it "
                "again with torch.save"
            )
        if start != b"PK\x03\x04":
            raise self._fail("not a torch checkpoint (no zip file)")
        try:
            with zipfile.ZipFile(self._file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise self._fail(f"truncated or damaged: {error}") from error
        if len(infos) > MAX_RECORDS:
            raise self._fail(f"{len(infos):,} records; a checkpoint has a few hundred")
        records: dict[str, _Record] = {}
        position = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            name = info.orig_filename
            stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            if not stored or info.file_size != info.compress_size:
                raise self._fail(
                    f"record {name!r} is compressed or encrypted; torch stores records plainly"
                )
            if name in records:
                raise self._fail(f"record {name!r} occurs twice")
            if info.header_offset < position:  # (which may be negative in a damaged directory)
                raise self._fail(f"damaged: record {name!r} overlaps another")
            begin = self._data_start(name, info.header_offset)
            if begin + info.file_size > size:
                raise self._fail(f"damaged: record {name!r} goes beyond the end of the file")
            position = begin + info.file_size
            records[name] = _Record(begin, info.file_size, info.CRC)
        roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise self._fail("not a torch checkpoint: the zip has no single 'data.pkl'")
        return records, roots[0]

    def _data_start(self, name: str, header_offset: int) -> int:
        self._file.seek(header_offset)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise self._fail(f"damaged: record {name!r} has no header")
        name_size, extra_size = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        return header_offset + 30 + name_size + extra_size

    def _read_record(self, name: str) -> bytes:
        record = self._records[name]
        out = np.empty(record.size, np.uint8)
        self._file.seek(record.begin)
        read_fully(self._file, out, where=self.where, name=name)
        self._check_sum(name, zlib.crc32(out.data))
        return out.tobytes()

    def _check_sum(self, name: str, checksum: int) -> None:
        # torch writes 0 where its CRC option is off.
        if self._records[name].checksum not in (0, checksum):
            raise self._fail(f"record {name!r} is damaged: its checksum is not the one in the zip")

    def _read_byte_order(self) -> bool:
        name = f"{self._root}byteorder"
        order = b"little"
        if name in self._records:
            if self._records[name].size > 16:
                raise self._fail("damaged: unknown byte order")
            order = self._read_record(name)
        if order not in (b"little", b"big"):
            raise self._fail(f"damaged: unknown byte order {order!r}")
        return order == b"big"

    def _state_dict(self) -> dict[str, Tensor]:
        name = f"{self._root}data.pkl"
        size = self._records[name].size
        if size > MAX_PICKLE_BYTES:
            raise self._fail(f"its pickle has {size:,} bytes; the limit is {MAX_PICKLE_BYTES:,}")
        try:
            root = describe(self._read_record(name))
        except WeightsError:
            raise
        # OverflowError: a length field beyond the platform's; the rest are ValueErrors.
        except (ValueError, OverflowError) as error:
            raise self._fail(f"refused to read the pickle: {error}") from error
        if isinstance(root, dict) and isinstance(root.get("model"), dict):
            root = root["model"]
        if not isinstance(root, dict):
            raise self._fail(f"holds a {kind(root)}, not a dict of tensors")
        problems = [
            f"entry {key!r} is a {kind(value)}, not a tensor"
            for key, value in root.items()
            if not isinstance(key, str) or not isinstance(value, Tensor)
        ]
        if problems:
            raise WeightsError(self.where, problems)
        return root

    def _check_storages(self) -> None:
        problems = []
        for name, tensor in self._tensors.items():
            storage = tensor.storage
            record = self._records.get(self._record_name(tensor))
            if record is None:
                problems.append(f"tensor {name}: its data record {storage.key[:40]!r} is missing")
            elif record.size != storage.size * storage.itemsize:
                problems.append(
                    f"tensor {name}: its data record has {record.size:,} bytes, expected "
                    f"{storage.size * storage.itemsize:,}"
                )
        if problems:
            raise WeightsError(self.where, problems)

    def _record_name(self, tensor: Tensor) -> str:
        return f"{self._root}data/{tensor.storage.key}"

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as a new contiguous array of its stored dtype."""
        tensor = self._tensors[name]
        if prod(tensor.shape) == 0:
            return np.empty(tensor.shape, NUMPY_DTYPES[tensor.storage.dtype])
        flat = np.concatenate(list(self._elements(tensor)))
        strides = tuple(step * flat.itemsize for step in tensor.strides)
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
        return np.array(view, order="C")

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Yields the elements of one tensor in order; see `TensorSource`."""
        tensor = self._tensors[name]
        if tensor.is_contiguous:
            yield from self._elements(tensor)
            return
        flat = self.read(name).reshape(-1)
        step = CHUNK_BYTES // flat.itemsize
        for start in range(0, flat.size, step):
            yield flat[start : start + step]

    def _elements(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Yields the part of the storage that the tensor spans, in chunks, its record verified."""
        itemsize = tensor.storage.itemsize
        name = self._record_name(tensor)
        record = self._records[name]
        begin = record.begin + tensor.offset * itemsize
        end = begin + tensor.span * itemsize
        whole = (begin, end) == (record.begin, record.begin + record.size)
        if not whole and name not in self._verified:
            self._check_sum(name, self._sum(name, record))
            self._verified.add(name)
        checksum = 0
        for position in range(begin, end, CHUNK_BYTES):
            chunk = np.empty(min(CHUNK_BYTES, end - position), np.uint8)
            self._file.seek(position)
            read_fully(self._file, chunk, where=self.where, name=name)
            checksum = zlib.crc32(chunk.data, checksum)
            if whole and position + chunk.size == end:
                self._check_sum(name, checksum)
            if self._swap:
                chunk = chunk.view(f"u{itemsize}").byteswap()
            yield chunk.view(NUMPY_DTYPES[tensor.storage.dtype])

    def _sum(self, name: str, record: _Record) -> int:
        checksum = 0
        end = record.begin + record.size
        for position in range(record.begin, end, CHUNK_BYTES):
            chunk = np.empty(min(CHUNK_BYTES, end - position), np.uint8)
            self._file.seek(position)
            read_fully(self._file, chunk, where=self.where, name=name)
            checksum = zlib.crc32(chunk.data, checksum)
        return checksum

    def strip_prefix(self, prefix: str) -> None:
        """Drops a prefix that every name has."""
        self.specs = {name.removeprefix(prefix): spec for name, spec in self.specs.items()}
        self._tensors = {name.removeprefix(prefix): item for name, item in self._tensors.items()}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
