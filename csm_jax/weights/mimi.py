"""Mimi's weights in and out of files: `load_mimi`, `save_mimi`.

Read are moshi's file (its sizes under `mimi_config` in the metadata, as the demo and the tests
write it, or the published ones), a Mimi of transformers, and the Mimi inside a CSM of transformers
(`codec_model.*`, sizes in `codec_config`). This is not in `csm_jax.mimi`, which stands above the
weights in the order of imports and holds no file format.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.mimi import published
from csm_jax.mimi.config import MimiConfig, mimi
from csm_jax.weights import mimi_tables, tables
from csm_jax.weights.convert import dtype_name
from csm_jax.weights.errors import WeightsError
from csm_jax.weights.mimi_tables import CODEC_PREFIX, MimiBinding, MimiLayout
from csm_jax.weights.opening import CONFIG_NAME, open_source, read_config_json
from csm_jax.weights.output import staged
from csm_jax.weights.safetensors_io import (
    Output,
    SafetensorsSource,
    load_json,
    nbytes,
    read_header,
    write_safetensors,
)
from csm_jax.weights.source import TensorSource, cast
from csm_jax.weights.tables import TensorSpec

MOSHI_NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"
"""Name of the published weights (moshi `loaders.MIMI_NAME`)."""
METADATA_KEY = "mimi_config"
"""Key of the safetensors metadata that holds moshi's configuration as JSON."""

# In a directory, best first; a CSM's own checkpoint there may hold no codec.
_READS = (
    MOSHI_NAME,
    tables.CODEC_NAME,
    tables.TRANSFORMERS_INDEX_NAME,
    tables.INDEX_NAME,
    tables.SAFETENSORS_NAME,
)


def load_mimi(path: str | Path, *, dtype: Any = None) -> tuple[MimiConfig, dict[str, Any]]:
    """Returns the sizes and parameters (numpy, see `csm_jax.mimi.params`) of the Mimi at `path`.

    Args:
        path: moshi's file, a Mimi of transformers, or a CSM of transformers with its codec: a
            safetensors file, an index, or a directory.
        dtype: float32, bfloat16 or float16; None to keep what is stored. The codebooks are never
            cast: their vectors are quotients of two sums, and a narrower count would shift a
            whole vector.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The dtype is unknown.
        WeightsError: Everything missing, extra or mis-shaped by name; a configuration that is not
            computed here; damaged or non-finite data.
    """
    name = dtype_name(dtype)
    source = _open(Path(path))
    with closing(source):
        layout = mimi_tables.detect(source.specs, where=source.where)
        config, origin = _find_config(source, layout)
        bindings = mimi_tables.bind(layout, config)
        problems = mimi_tables.check(bindings, source.specs)
        if problems:
            raise WeightsError(f"{source.where} (sizes from {origin})", problems)
        leaves = _read(source, bindings, name)
    shapes = mimi_tables.mimi_shapes(config)
    return config, tables.unflatten({item: leaves[item] for item in shapes})


def save_mimi(
    path: str | Path,
    config: MimiConfig,
    params: Mapping[str, Any],
    *,
    layout: str,
    overwrite: bool = False,
) -> list[Path]:
    """Returns the files written: `params` in moshi's or transformers' layout, complete or not at all.

    Args:
        path: For moshi a `.safetensors` file, which notes its sizes in its metadata; for
            transformers a directory, to hold `model.safetensors` and `config.json`.
        config: The sizes.
        params: The tree of `csm_jax.mimi.params.param_shapes(config)`; jax or numpy arrays.
        layout: "moshi" or "transformers".
        overwrite: Whether existing files may be replaced.

    Raises:
        FileExistsError: The file is already there.
        OSError: The destination cannot be written.
        ValueError: The layout is unknown or has no place for this config.
        WeightsError: Everything that is wrong with `params`, by path.
    """
    target, path = mimi_tables.get_layout(layout), Path(path)
    outputs = _outputs(target, config, params)
    if target.name == "moshi":
        metadata = {METADATA_KEY: json.dumps(published.to_moshi(config))}
        _write_file(path, outputs, metadata=metadata, overwrite=overwrite)
        return [path]
    data = published.to_transformers(config)
    data["dtype"] = _common_dtype(outputs)
    names = [tables.SAFETENSORS_NAME, CONFIG_NAME]
    total = sum(nbytes(output.spec) for output in outputs)
    with staged(path, names, overwrite=overwrite, nbytes=total) as staging:
        _write(staging / names[0], outputs, metadata={})
        text = json.dumps(data, indent=2, sort_keys=True) + "\n"
        (staging / CONFIG_NAME).write_text(text, encoding="utf-8")
    return [path / name for name in names]


def holds_mimi(path: str | Path) -> bool:
    """Returns whether `load_mimi` would find a Mimi at `path`; reads headers only."""
    try:
        source = _open(Path(path))
    except (OSError, WeightsError):
        return False
    with closing(source):
        try:
            mimi_tables.detect(source.specs, where=source.where)
        except WeightsError:
            return False
    return True


# --- reading -----------------------------------------------------------------------------------


def _open(path: Path) -> TensorSource:
    """Returns the Mimi's tensors at `path` without the prefix of a CSM's codec; the caller closes.

    Raises:
        FileNotFoundError: There is nothing, or no file of a known name.
        WeightsError: A file is damaged, or none holds a Mimi.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or directory")
    if not path.is_dir():
        return _without_prefix(open_source(path))
    found = [path / name for name in _READS if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{path}: no Mimi in this directory; looked for {', '.join(_READS)}"
        )
    for file in found:
        source = _without_prefix(open_source(file))
        try:
            mimi_tables.detect(source.specs, where=source.where)
        except WeightsError:
            source.close()
        else:
            return source
    raise WeightsError(
        path, f"none of {', '.join(file.name for file in found)} holds a Mimi or a CSM with one"
    )


def _without_prefix(source: TensorSource) -> TensorSource:
    inside = any(name.startswith(CODEC_PREFIX) for name in source.specs)
    if inside and isinstance(source, SafetensorsSource):
        source.keep(CODEC_PREFIX)
        source.strip_prefix(CODEC_PREFIX)
    return source


def _find_config(source: TensorSource, layout: MimiLayout) -> tuple[MimiConfig, str]:
    """Returns the config that belongs to the tensors, and where it was found.

    Raises:
        WeightsError: It is damaged, or not one this implementation computes.
    """
    file = Path(source.where)
    read, data, origin = published.from_moshi, None, f"{METADATA_KEY} in its metadata"
    if layout.name == "moshi":
        metadata = read_header(file).metadata if file.suffix == ".safetensors" else {}
        if METADATA_KEY in metadata:
            data = load_json(metadata[METADATA_KEY], where=f"{file}: {origin}")
    else:
        read, origin = published.from_transformers, CONFIG_NAME
        beside = read_config_json(file.parent)
        # transformers leaves the default codec out of a CSM's config; a Mimi's is its own.
        if beside.get("model_type") == "mimi":
            data = beside
        elif beside.get("codec_config") is not None:
            data, origin = beside["codec_config"], f"codec_config in {CONFIG_NAME}"
    if data is None:
        return mimi(), "the published Mimi: the checkpoint does not tell"
    if not isinstance(data, dict):
        raise WeightsError(file, f"{origin} is not a JSON object")
    try:
        return read(data), origin
    except ValueError as error:
        raise WeightsError(file, f"{origin}: {error}") from error


def _read(
    source: TensorSource, bindings: tuple[MimiBinding, ...], dtype: str | None
) -> dict[str, np.ndarray]:
    leaves: dict[str, np.ndarray] = {}
    problems = []
    for binding in bindings:
        name = next(name for name in binding.names if name in source.specs)
        tensor = source.read(name)
        count = int(tensor.size - np.isfinite(tensor).sum())
        if count:
            problems.append(f"tensor {name} holds {count:,} values that are NaN or infinite")
        for path, leaf in binding.to_ours(tensor):
            kept = ".codebooks." in path
            leaves[path] = cast(leaf, None if kept else dtype, name=name, where=source.where)
    if problems:
        raise WeightsError(source.where, problems)
    return leaves


# --- writing -----------------------------------------------------------------------------------


def _outputs(layout: MimiLayout, config: MimiConfig, params: Mapping[str, Any]) -> list[Output]:
    leaves = tables.flatten(params)
    specs = {
        path: TensorSpec(np.dtype(leaf.dtype).name, tuple(leaf.shape))
        for path, leaf in leaves.items()
    }
    problems = mimi_tables.check_params(config, specs)
    bindings = mimi_tables.bind(layout, config)
    for binding in bindings:
        dtypes = {specs[part.path].dtype for part in binding.parts if part.path in specs}
        if len(dtypes) > 1:
            paths = ", ".join(part.path for part in binding.parts)
            problems.append(
                f"{paths} have dtypes {', '.join(sorted(dtypes))}, but are one tensor in "
                f"layout {layout.name!r}"
            )
    if problems:
        raise WeightsError("params", problems)
    return [
        Output(
            binding.names[0],
            TensorSpec(specs[binding.parts[0].path].dtype, binding.foreign_shape),
            partial(_produce, binding, leaves),
        )
        for binding in bindings
    ]


def _produce(binding: MimiBinding, leaves: Mapping[str, Any]) -> list[np.ndarray]:
    return [binding.to_theirs({part.path: np.asarray(leaves[part.path]) for part in binding.parts})]


def _common_dtype(outputs: list[Output]) -> str:
    dtypes = {output.spec.dtype for output in outputs if ".codebook." not in output.name}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _write(path: Path, outputs: list[Output], *, metadata: Mapping[str, str]) -> None:
    # transformers insists on knowing that the tensors are torch's.
    write_safetensors(
        path, outputs, metadata={"format": "pt", **metadata}, progress=lambda count: None
    )


def _write_file(
    path: Path, outputs: list[Output], *, metadata: Mapping[str, str], overwrite: bool
) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: in moshi's layout a Mimi is a file that ends in .safetensors")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} is already there: choose another destination or pass overwrite=True"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        _write(staging, outputs, metadata=metadata)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
