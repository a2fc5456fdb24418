"""A shard as a Parquet file that the `datasets` library takes for what it is: audio, text, codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.config import SAMPLE_RATE
from csm_jax.corpus.shard import AUDIO

if TYPE_CHECKING:
    from csm_jax.corpus.export import Shard

_ROWS_PER_GROUP = 100  # what a reader of single rows takes into memory: a few megabytes each


def _value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def _sequence(feature: dict[str, Any]) -> dict[str, Any]:
    return {"feature": feature, "_type": "Sequence"}


_FEATURES = {
    "id": _value("string"),
    "audio": {"sampling_rate": SAMPLE_RATE, "_type": "Audio"},
    "text": _value("string"),
    "speaker": _value("int64"),
    "voice": _value("string"),
    "duration": _value("float64"),
    "codes": _sequence(_sequence(_value("int32"))),
    "seed": _value("uint64"),
    "finish_reason": _value("string"),
    "flags": _sequence(_value("string")),
    "synthesis": _value("string"),
}


def write(shard: Shard, number: int, count: int, directory: Path) -> None:
    """Writes one file of `count`, under `data/`; `synthesis` holds all that is told of a row, as JSON.

    Raises:
        ImportError: pyarrow is not installed; the message has the command.
        ValueError: The shard is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "writing Parquet needs pyarrow: pip install 'csm_jax[corpus]', or pip install pyarrow"
        ) from error
    text, whole = pyarrow.string(), pyarrow.int32()
    schema = pyarrow.schema(
        {
            "id": text,
            "audio": pyarrow.struct({"bytes": pyarrow.binary(), "path": text}),
            "text": text,
            "speaker": pyarrow.int64(),
            "voice": text,
            "duration": pyarrow.float64(),
            "codes": pyarrow.list_(pyarrow.list_(whole)),
            "seed": pyarrow.uint64(),
            "finish_reason": text,
            "flags": pyarrow.list_(text),
            "synthesis": text,
        },
        metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
    )
    folder = directory / "data"
    folder.mkdir(exist_ok=True)
    path = folder / f"train-{number:05d}-of-{count:05d}.parquet"
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        group: list[dict[str, Any]] = []
        for key, told, flac, codes in shard.rows():
            group.append(
                {
                    "id": told["id"],
                    "audio": {"bytes": flac, "path": key + AUDIO},
                    "text": told["text"],
                    "speaker": told["speaker"],
                    "voice": told.get("voice"),
                    "duration": told["seconds"],
                    "codes": codes.tolist(),
                    "seed": told["seed"],
                    "finish_reason": told["finish_reason"],
                    "flags": told["flags"],
                    "synthesis": json.dumps(told, ensure_ascii=False),
                }
            )
            if len(group) == _ROWS_PER_GROUP:
                file.write_table(pyarrow.Table.from_pylist(group, schema))
                group = []
        if group:
            file.write_table(pyarrow.Table.from_pylist(group, schema))
