"""Reading and writing safetensors files: validated headers, tensor by tensor, checksums of our own.

Format: 8 bytes little-endian length, a JSON header of that length, then the data without gaps
(huggingface/safetensors README). Files written here note a CRC-32 per tensor in the header's free
metadata; it is verified whenever it is there. Data is read with plain reads, not mapped: a mapped
file that shrinks kills the process, and its pages count as the process's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csm_jax.weights.errors import WeightsError
from csm_jax.weights.source import CHUNK_BYTES, NUMPY_DTYPES, TensorSource
from csm_jax.weights.tables import TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the header."""
MAX_RANK = 32

CHECKSUM_KEY = "csm_jax.crc32"
LAYOUT_KEY = "csm_jax.layout"

# Name in the header -> (numpy or ml_dtypes name, bits per element).
_DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
_CODES = {name: code for code, (name, _) in _DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a header: what it is, and the bytes `[begin, end)` of the file that hold it."""

    spec: TensorSpec
    begin: int
    end: int


class Header(NamedTuple):
    """A validated header."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def nbytes(spec: TensorSpec) -> int:
    """Returns the bytes a tensor takes in a file."""
    return prod(spec.shape) * _DTYPES[_CODES[spec.dtype]][1] // 8


def load_json(text: str, *, where: str) -> Any:
    """Returns parsed JSON, refusing what parsers disagree about.

    Raises:
        WeightsError: Not JSON, too deep, a repeated key, or NaN and the like.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the key {twice!r} occurs twice")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise WeightsError(where, f"damaged JSON: {error}") from error


def read_header(path: str | Path) -> Header:
    """Returns the header of a safetensors file, held against the file's size; reads no tensor.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file is truncated or its header is damaged.
    """
    where = str(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if size < 8:
            raise WeightsError(
                where, f"truncated: {size} bytes is too short for a safetensors file"
            )
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise WeightsError(
                where,
                f"damaged header: it claims {length:,} bytes, the limit is {MAX_HEADER_BYTES:,} "
                "(is this a safetensors file?)",
            )
        if 8 + length > size:
            raise WeightsError(
                where,
                f"truncated: the header alone ends at {8 + length:,}, the file at {size:,} bytes",
            )
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise WeightsError(where, "damaged header: it does not start with '{'")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(where, f"damaged header: {error}") from error
    data = load_json(text, where=where)
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(where, "damaged header: __metadata__ is not a map of strings")
    entries, problems = {}, []
    for name, value in data.items():
        try:
            entries[name] = _entry(value, start=8 + length)
        except ValueError as error:
            problems.append(f"damaged header: tensor {name}: {error}")
    if problems:
        raise WeightsError(where, problems)
    _check_coverage(entries, start=8 + length, size=size, where=where)
    return Header(entries, metadata)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entry(value: Any, *, start: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry must hold exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"unknown dtype {str(code)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        raise ValueError("shape is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError("data_offsets is not a pair of offsets")
    name, bits = _DTYPES[code]
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * bits:
        raise ValueError(
            f"data_offsets span {end - begin:,} bytes, but {name}{shape} is not that size"
        )
    return Entry(TensorSpec(name, tuple(shape)), start + begin, start + end)


def _check_coverage(entries: Mapping[str, Entry], *, start: int, size: int, where: str) -> None:
    position, last = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps" if entry.begin < position else "leaves a gap after"
            raise WeightsError(where, f"damaged header: the data of {name} {kind} that of {last}")
        position, last = entry.end, name
    if position > size:
        raise WeightsError(
            where,
            f"truncated: the tensors end at byte {position:,}, the file at {size:,} "
            f"({position - size:,} bytes are missing)",
        )
    if position < size:
        raise WeightsError(where, f"damaged: {size - position:,} bytes follow the last tensor")


class SafetensorsSource(TensorSource):
    """One or several safetensors files as one set of tensors; see `TensorSource`.

    Args:
        paths: The files; their headers are read and checked here, no data is.
        where: For messages.

    Raises:
        WeightsError: A file is damaged, or a tensor is in two files.
    """

    def __init__(self, paths: Sequence[Path], *, where: str):
        self.where = where
        self.specs: dict[str, TensorSpec] = {}
        self.file_of: dict[str, Path] = {}
        self.recorded_layout: str | None = None
        self._entries: dict[str, Entry] = {}
        self._checksums: dict[str, int] = {}
        self._files = contextlib.ExitStack()
        self._open: dict[Path, Any] = {}
        problems: list[str] = []
        for path in paths:
            header = read_header(path)
            for name, entry in header.entries.items():
                if name in self.file_of:
                    problems.append(
                        f"tensor {name} is in {self.file_of[name].name} and {path.name}"
                    )
                self.specs[name], self._entries[name] = entry.spec, entry
                self.file_of[name] = path
            self.recorded_layout = header.metadata.get(LAYOUT_KEY, self.recorded_layout)
            self._checksums.update(_checksums(header, where=str(path)))
        if problems:
            raise WeightsError(where, problems)

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as a new array of its stored dtype; verifies its checksum."""
        spec = self.specs[name]
        out = np.empty(spec.shape, NUMPY_DTYPES[spec.dtype])
        flat = out.reshape(-1)
        position = 0
        for chunk in self.chunks(name):
            flat[position : position + chunk.size] = chunk
            position += chunk.size
        return out

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Yields the elements of one tensor in order; the checksum is verified with the last."""
        dtype = NUMPY_DTYPES[self.specs[name].dtype]
        for chunk in self.raw_chunks(name):
            yield chunk.view(dtype)

    def raw_chunks(self, name: str) -> Iterator[np.ndarray]:
        """Yields the bytes of one tensor of any dtype; the checksum is verified with the last.

        Raises:
            WeightsError: The file has become shorter, or the data is not what was written.
        """
        entry, path = self._entries[name], self.file_of[name]
        if path not in self._open:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
            self._open[path] = self._files.enter_context(file)
        file = self._open[path]
        checksum, position = 0, entry.begin
        while position < entry.end:
            chunk = np.empty(min(CHUNK_BYTES, entry.end - position), np.uint8)
            file.seek(position)
            read_fully(file, chunk, where=str(path), name=name)
            checksum = zlib.crc32(chunk.data, checksum)
            position += chunk.size
            if position == entry.end and checksum != self._checksums.get(name, checksum):
                raise WeightsError(
                    path, f"tensor {name} is damaged: its checksum is not the one in the header"
                )
            yield chunk

    def strip_prefix(self, prefix: str) -> None:
        """Drops a prefix that every name has."""
        self._rename({name: name.removeprefix(prefix) for name in self.specs})

    def keep(self, prefix: str) -> None:
        """Forgets every tensor whose name does not start with `prefix`."""
        self._rename({name: name for name in self.specs if name.startswith(prefix)})

    def _rename(self, names: Mapping[str, str]) -> None:
        self.specs = {new: self.specs[old] for old, new in names.items()}
        self.file_of = {new: self.file_of[old] for old, new in names.items()}
        self._entries = {new: self._entries[old] for old, new in names.items()}
        sums = self._checksums
        self._checksums = {new: sums[old] for old, new in names.items() if old in sums}

    def close(self) -> None:
        """Closes the files."""
        self._files.close()
        self._open.clear()


def _checksums(header: Header, *, where: str) -> dict[str, int]:
    text = header.metadata.get(CHECKSUM_KEY)
    if text is None:
        return {}
    sums = load_json(text, where=where)
    try:
        return {name: int(value, 16) for name, value in sums.items() if name in header.entries}
    except (AttributeError, TypeError, ValueError) as error:
        raise WeightsError(where, f"damaged header: {CHECKSUM_KEY}: {error}") from error


def read_fully(file: Any, out: np.ndarray, *, where: str, name: str) -> None:
    """Fills a byte array from an unbuffered file.

    Raises:
        WeightsError: The file ends before.
    """
    view, filled = out.data, 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise WeightsError(where, f"truncated: the file ends inside tensor {name}")
        filled += count


class Output(NamedTuple):
    """A tensor to be written; `produce` is called once, and yields its elements in order."""

    name: str
    spec: TensorSpec
    produce: Callable[[], Iterable[np.ndarray]]


def write_safetensors(
    path: Path,
    outputs: Sequence[Output],
    *,
    metadata: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    """Writes a new safetensors file, one tensor at a time, and syncs it to disk.

    The header goes first with its checksums blank and is written again, at the same length, once
    they are known, so nothing is held back in memory.

    Args:
        path: Must not exist.
        outputs: The tensors.
        metadata: Entries of the header's `__metadata__` besides the checksums.
        progress: Called with the number of bytes after each piece is written.

    Raises:
        OSError: The file exists or cannot be written.
        WeightsError: `produce` yielded another amount of data than its spec says.
    """
    # Wider elements first keeps every tensor aligned to its element size, as the format asks.
    ordered = sorted(outputs, key=lambda output: -_DTYPES[_CODES[output.spec.dtype]][1])
    checksums = {output.name: 0 for output in ordered}
    header = _encode_header(ordered, metadata, checksums)
    with open(path, "xb", buffering=0) as file:
        _write_fully(file, header)
        for output in ordered:
            checksum, written = 0, 0
            for array in output.produce():
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                for start in range(0, len(data), CHUNK_BYTES):
                    piece = data[start : start + CHUNK_BYTES]
                    checksum = zlib.crc32(piece, checksum)
                    _write_fully(file, piece)
                    written += len(piece)
                    progress(len(piece))
            if written != nbytes(output.spec):
                raise WeightsError(
                    path, f"tensor {output.name}: {written:,} of {nbytes(output.spec):,} bytes"
                )
            checksums[output.name] = checksum
        file.seek(0)
        _write_fully(file, _encode_header(ordered, metadata, checksums))
        os.fsync(file.fileno())


def _write_fully(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _encode_header(
    outputs: Sequence[Output], metadata: Mapping[str, str], checksums: Mapping[str, int]
) -> bytes:
    sums = {name: f"{value:08x}" for name, value in checksums.items()}
    header: dict[str, Any] = {
        "__metadata__": {**metadata, CHECKSUM_KEY: json.dumps(sums, separators=(",", ":"))}
    }
    position = 0
    for output in outputs:
        end = position + nbytes(output.spec)
        header[output.name] = {
            "dtype": _CODES[output.spec.dtype],
            "shape": list(output.spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts aligned
    return len(text).to_bytes(8, "little") + text
