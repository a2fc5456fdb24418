"""Tokens as Parquet, one row per conversation, and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.corpus.files import PART
from csm_jax.data.shards import Shards

_ROWS = 256  # of a group: what a reader of single rows takes into memory, a few megabytes
_LEAST = ("texts", "codes")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'csm_jax[train]', or pip install pyarrow"
        ) from error
    return pyarrow


def export(
    directory: Path, target: Path, on_rows: Callable[[int], None] = lambda rows: None
) -> int:
    """Returns how many rows were written to one Parquet file.

    Columns: `id`, `lang`, `weight`, and per turn `speakers`, `texts`, `trained` and `codes`, the uint16
    codes [frames, codebooks] as little-endian bytes; `num_codebooks` is in the schema's metadata.

    Args:
        directory: Finished tokens.
        target: Ends in `.parquet`; replaced when the new one is complete.
        on_rows: Called with the rows written so far; may raise to stop.

    Raises:
        ImportError: pyarrow is not installed.
        OSError, ValueError: It cannot be read or written.
    """
    if target.suffix.lower() != ".parquet":
        raise ValueError(f"{target} must end in .parquet")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no directory {target.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a directory")
    pyarrow, shards = _pyarrow(), Shards(directory)
    text, many = pyarrow.string(), pyarrow.list_
    codebooks = shards.manifest["num_codebooks"]
    schema = pyarrow.schema(
        {
            "id": text,
            "lang": text,
            "weight": pyarrow.float32(),
            "speakers": many(pyarrow.int32()),
            "texts": many(text),
            "trained": many(pyarrow.bool_()),
            "codes": many(pyarrow.binary()),
        },
        metadata={"num_codebooks": str(codebooks), "codec_hash": shards.manifest["codec_hash"]},
    )
    temporary = target.with_name(f".{target.name}{PART}")
    try:
        with pyarrow.parquet.ParquetWriter(temporary, schema) as file:
            for start in range(0, len(shards), _ROWS):
                numbers = range(start, min(start + _ROWS, len(shards)))
                rows = [_row(example) for example in shards.read(numbers, facts=True)]
                file.write_table(pyarrow.Table.from_pylist(rows, schema))
                on_rows(numbers.stop)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(shards)


def _row(example: Any) -> dict[str, Any]:
    facts, turns = example.facts, example.turns
    return {
        "id": facts.get("id"),
        "lang": facts.get("lang"),
        "weight": turns[0].weight,
        "speakers": facts["speakers"],
        "texts": facts["texts"],
        "trained": [turn.trained for turn in turns],
        "codes": [turn.codes.tobytes() for turn in turns],
    }


def read_rows(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    """Yields the rows of a Parquet file as parsed lines of the schema, an error in place of a bad one.

    `texts` and `codes` must be there; codes are bytes as `export` writes them, or lists of numbers, flat
    or per frame. Without `speakers` every turn is speaker 0's.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: It is not Parquet, or lacks a column.
    """
    with _open(path) as file:
        names = file.schema_arrow.names
        if missing := [name for name in _LEAST if name not in names]:
            raise ValueError(f"{path} has no column {' and no '.join(missing)}; it has {names}")
        metadata = file.schema_arrow.metadata or {}
        codebooks = int(metadata.get(b"num_codebooks", b"32"))
        for batch in file.iter_batches(batch_size=_ROWS):
            for row in batch.to_pylist():
                try:
                    yield _line(row, codebooks)
                except (TypeError, ValueError) as error:
                    yield ValueError(str(error))


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of any Parquet file.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: It is not Parquet.
    """
    with _open(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS):
            yield from batch.to_pylist()


def _open(path: Path) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _line(row: dict[str, Any], codebooks: int) -> dict[str, Any]:
    texts, codes = row["texts"] or [], row["codes"] or []
    speakers = row.get("speakers") or [0] * len(texts)
    if not len(texts) == len(codes) == len(speakers):
        raise ValueError(
            f"texts, codes and speakers must be of one length, got {len(texts)}, {len(codes)} and "
            f"{len(speakers)}"
        )
    line: dict[str, Any] = {
        "messages": [
            {
                "role": f"speaker_{speaker}",
                "content": [
                    {"type": "text", "text": text},
                    {"type": "audio", "codes": _codes(own, codebooks)},
                ],
            }
            for speaker, text, own in zip(speakers, texts, codes, strict=True)
        ]
    }
    if row.get("trained") is not None:
        line["training_mask"] = row["trained"]
    line |= {
        name: row[name] for name in ("id", "lang", "split", "weight") if row.get(name) is not None
    }
    return line


def _codes(given: Any, codebooks: int) -> Any:
    flat = np.frombuffer(given, "<u2") if isinstance(given, bytes) else np.array(given)
    if flat.ndim == 2:
        return flat.tolist()
    if flat.ndim != 1 or len(flat) % codebooks:
        raise ValueError(
            f"codes of shape {list(flat.shape)} are no frames of {codebooks} codebooks"
        )
    return flat.reshape(-1, codebooks).tolist()


def codec_of(path: Path) -> str | None:
    """Returns the hash of the codec whose codes a Parquet file holds; None where it does not say.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: It is not Parquet.
    """
    if path.suffix.lower() != ".parquet":
        return None
    with _open(path) as file:
        told = (file.schema_arrow.metadata or {}).get(b"codec_hash")
    return None if told is None else told.decode()
