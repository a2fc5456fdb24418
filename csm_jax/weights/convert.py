"""Checkpoints in and out: `load_checkpoint`, `save_checkpoint`, `convert_checkpoint`.

Everything is one tensor (or a part of one) at a time: host memory stays near the size of the
largest tensor, besides the parameters themselves where they are asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax import config as config_module
from csm_jax.config import CSMConfig
from csm_jax.weights import tables
from csm_jax.weights.checkpoint import write_orbax
from csm_jax.weights.errors import WeightsError
from csm_jax.weights.opening import (
    CONFIG_NAME,
    Checkpoint,
    open_checkpoint,
    open_source,
    read_config_json,
)
from csm_jax.weights.output import staged
from csm_jax.weights.safetensors_io import (
    LAYOUT_KEY,
    Output,
    SafetensorsSource,
    nbytes,
    write_safetensors,
)
from csm_jax.weights.source import cast
from csm_jax.weights.tables import Binding, Layout, TensorSpec
from csm_jax.weights.transforms import IDENTITY

SHARD_BYTES = 5_000_000_000
"""Most bytes of one file of a transformers export, as on the hub."""

Progress = Callable[[int, int], None]
"""Called with (bytes just written, bytes in all)."""


def load_checkpoint(
    path: str | Path,
    *,
    layout: str | None = None,
    dtype: Any = None,
    config: CSMConfig | None = None,
) -> tuple[CSMConfig, dict[str, Any]]:
    """Returns `(config, params)`: nested dicts of jax arrays on the default device.

    Args:
        path: A directory with `config.json`, a safetensors file, an index, a `ckpt.pt`, or an orbax
            directory. A bare file without `config.json` must be a CSM-1B.
        layout: A name of `LAYOUTS`; None to tell by the tensors' names.
        dtype: float32, bfloat16 or float16 for every tensor; None to keep the stored ones.
        config: The sizes, if they are not to come from `config.json`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The layout or dtype is unknown.
        WeightsError: Every missing, extra, mis-shaped or wrong-dtype tensor by name, before any
            device memory is taken; or damaged data.
    """
    import jax

    name = dtype_name(dtype)
    with closing(open_checkpoint(path, layout=layout, config=config)) as checkpoint:
        checkpoint.check_copies()
        shapes = tables.model_shapes(checkpoint.config)
        arrays: dict[str, Any] = {}
        # Largest first: the host copy of the largest tensor is gone before the rest is loaded.
        for item in sorted(shapes, key=lambda item: -prod(shapes[item])):
            arrays[item] = jax.block_until_ready(jax.device_put(checkpoint.read(item, name)))
        return checkpoint.config, tables.unflatten({item: arrays[item] for item in shapes})


def save_checkpoint(
    path: str | Path,
    config: CSMConfig,
    params: Mapping[str, Any],
    *,
    layout: str,
    dtype: Any = None,
    codec: str | Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Returns the files of a new checkpoint directory holding `params` and `config.json`.

    Args:
        path: The directory; made if missing, and then it appears only when complete.
        config: The sizes.
        params: The tree of `model.param_shapes(config)`; jax or numpy arrays.
        layout: A name of `LAYOUTS`.
        dtype: float32, bfloat16 or float16 for every tensor; None to keep each one's.
        codec: Where to take the codec's tensors and `codec_config` from: a transformers checkpoint
            (its directory or file) or a `codec_model.safetensors`. Without it a transformers export
            has no codec, and transformers will make up a random one.
        overwrite: Whether an existing checkpoint may be replaced.

    Raises:
        FileExistsError: A checkpoint is already there.
        OSError: The destination cannot be written.
        ValueError: The layout or dtype is unknown, or the layout has no place for this config.
        WeightsError: Everything that is wrong with `params`, by path.
    """
    target = tables.get_layout(layout)
    leaves = tables.flatten(params)
    problems = tables.check(
        tables.LAYOUTS["orbax"],
        tables.bind(tables.LAYOUTS["orbax"], config),
        {
            name: TensorSpec(np.dtype(leaf.dtype).name, tuple(leaf.shape))
            for name, leaf in leaves.items()
        },
    )
    if problems:
        raise WeightsError("params", problems)

    def read(item: str, name: str | None) -> np.ndarray:
        return cast(np.asarray(leaves[item]), name, name=item, where="params")

    origin = _Origin(
        config=config,
        config_json={},
        dtype=lambda item: np.dtype(leaves[item].dtype).name,
        read=read,
        chunks=None,
        names=None,
    )
    codec_source, codec_config = _no_codec(), None
    if codec is not None:
        codec_source, codec_config = _open_codec(Path(codec))
    with closing(codec_source):
        job = _plan(origin, target, dtype_name(dtype), codec_source, codec_config)
        return _write(job, Path(path), overwrite=overwrite, progress=lambda done, total: None)


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    from_layout: str | None,
    to_layout: str,
    dtype: Any,
    overwrite: bool,
    progress: Progress,
) -> list[Path]:
    """Returns the files written: the checkpoint at `source` in another layout or dtype.

    The codec's tensors of a transformers checkpoint are kept: in the same files where the target is
    transformers too, else in `codec_model.safetensors` beside the output, from where the way back
    takes them. A transformers checkpoint that stays one keeps its `config.json` and its copies of
    the audio table.

    Args:
        source: As `load_checkpoint`.
        destination: As `save_checkpoint`.
        from_layout: Layout of the source; None to tell by the tensors' names.
        to_layout: Layout of the destination.
        dtype: As `save_checkpoint`; the codec's tensors are never cast.
        overwrite: As `save_checkpoint`.
        progress: Called after each piece is written.

    Raises:
        FileNotFoundError, FileExistsError, OSError, ValueError, WeightsError: As the two above.
    """
    target, name = tables.get_layout(to_layout), dtype_name(dtype)
    with closing(open_checkpoint(source, layout=from_layout, config=None)) as checkpoint:
        _refuse_same_place(checkpoint, Path(destination))
        stays = checkpoint.layout is target
        origin = _Origin(
            config=checkpoint.config,
            config_json=checkpoint.config_json if stays else {},
            dtype=checkpoint.dtype,
            read=checkpoint.read,
            chunks=lambda item, to: (
                checkpoint.chunks(item, to) if checkpoint.is_stored_as_ours(item) else None
            ),
            names=frozenset(binding.name for binding in checkpoint.bindings) if stays else None,
        )
        codec_source, codec_config = _no_codec(), checkpoint.config_json.get("codec_config")
        codec_path = _codec_of(checkpoint)
        if codec_path is not None:
            codec_source, _ = _open_codec(codec_path)
        with closing(codec_source):
            job = _plan(origin, target, name, codec_source, codec_config)
            return _write(
                job,
                Path(destination),
                overwrite=overwrite,
                progress=progress,
                before=checkpoint.check_copies,
            )


def dtype_name(dtype: Any) -> str | None:
    """Returns the name of a dtype given as a string, numpy dtype or jax scalar type; None for None.

    Raises:
        ValueError: Not one of float32, bfloat16 and float16.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in tables.FLOAT_DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(tables.FLOAT_DTYPES)}")
    return name


def _refuse_same_place(checkpoint: Checkpoint, destination: Path) -> None:
    place, here = destination.resolve(), checkpoint.directory.resolve()
    inside = checkpoint.path.is_dir() and place.is_relative_to(checkpoint.path.resolve())
    if place == here or inside:
        raise WeightsError(
            destination, "the destination is the source's own directory; choose another"
        )


@dataclass(frozen=True)
class _Origin:
    """Where parameters come from, by our paths.

    Attributes:
        config: The sizes.
        config_json: A `config.json` of the target's form to start from; empty for none.
        dtype: Dtype of a parameter.
        read: `(path, dtype or None)` to the array.
        chunks: The same in pieces; may return None where only `read` will do. None: never.
        names: The foreign names to write; None for all of the layout.
    """

    config: CSMConfig
    config_json: dict[str, Any]
    dtype: Callable[[str], str]
    read: Callable[[str, str | None], np.ndarray]
    chunks: Callable[[str, str | None], Iterator[np.ndarray] | None] | None
    names: frozenset[str] | None


@dataclass(frozen=True)
class _Job:
    """Everything to be written, nothing of it read yet."""

    layout: Layout
    config_json: dict[str, Any]
    files: dict[str, list[Output]]
    index_name: str | None
    orbax: dict[str, Callable[[], np.ndarray]]
    total: int


def _plan(
    origin: _Origin,
    layout: Layout,
    dtype: str | None,
    codec: SafetensorsSource,
    codec_config: Any,
) -> _Job:
    bindings = tables.bind(layout, origin.config)
    codec_outputs = [
        Output(name, spec, partial(codec.raw_chunks, name)) for name, spec in codec.specs.items()
    ]
    dtypes = {binding.path: dtype or origin.dtype(binding.path) for binding in bindings}
    config_json = _config_json(origin, layout, set(dtypes.values()), codec_config)
    if layout.name == "orbax":
        files = {tables.CODEC_NAME: codec_outputs} if codec_outputs else {}
        orbax = {b.path: partial(origin.read, b.path, dtypes[b.path]) for b in bindings}
        specs = [TensorSpec(dtypes[b.path], b.shape) for b in bindings]
        total = sum(map(nbytes, specs)) + _size(codec_outputs)
        return _Job(layout, config_json, files, None, orbax, total)
    outputs = [
        Output(
            binding.name,
            TensorSpec(dtypes[binding.path], binding.foreign_shape),
            partial(_produce, origin, binding, dtypes[binding.path]),
        )
        for binding in bindings
        if origin.names is None or binding.name in origin.names
    ]
    total = _size(outputs) + _size(codec_outputs)
    if layout.set_aside is None:
        files = {layout.file_name: outputs}
        if codec_outputs:
            files[tables.CODEC_NAME] = codec_outputs
        return _Job(layout, config_json, files, None, {}, total)
    shards = _shard(outputs + codec_outputs)
    if len(shards) == 1:
        return _Job(layout, config_json, {layout.file_name: shards[0]}, None, {}, total)
    # The hub's names; `transformers_weights` is how transformers finds an index of this name.
    config_json["transformers_weights"] = tables.TRANSFORMERS_INDEX_NAME
    files = {
        f"transformers-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, start=1)
    }
    return _Job(layout, config_json, files, tables.TRANSFORMERS_INDEX_NAME, {}, total)


def _size(outputs: Iterable[Output]) -> int:
    return sum(nbytes(output.spec) for output in outputs)


def _shard(outputs: list[Output]) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if shards[-1] and _size(shards[-1]) + nbytes(output.spec) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(output)
    return shards


def _produce(origin: _Origin, binding: Binding, dtype: str) -> Iterable[np.ndarray]:
    if binding.transform is IDENTITY and origin.chunks is not None:
        chunks = origin.chunks(binding.path, dtype)
        if chunks is not None:
            return chunks
    return [binding.transform.inverse(origin.read(binding.path, dtype), binding.num_heads)]


def _config_json(
    origin: _Origin, layout: Layout, dtypes: set[str], codec_config: Any
) -> dict[str, Any]:
    form = layout.config_form
    if form == "either":
        form = "sesame" if origin.config.tie_codebooks_embeddings else "transformers"
    if form == "sesame":
        data = config_module.to_sesame(origin.config)
    else:
        data = {**config_module.to_transformers(origin.config), **origin.config_json}
        data.pop("transformers_weights", None)
        data.pop("torch_dtype", None)
        if layout.name == "transformers":
            data["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    if codec_config is not None:
        data["codec_config"] = codec_config
    if config_module.from_published(data) != origin.config:
        raise WeightsError(
            CONFIG_NAME,
            f"as written for {layout.name} it would not describe the same model; "
            f"{config_module.from_published(data)} instead of {origin.config}",
        )
    return data


def _codec_of(checkpoint: Checkpoint) -> Path | None:
    """Returns the file with the codec that belongs to a checkpoint: itself, one beside it, none."""
    beside = checkpoint.directory / tables.CODEC_NAME
    if checkpoint.codec_names:
        return checkpoint.path
    return beside if beside.is_file() else None


def _no_codec() -> SafetensorsSource:
    return SafetensorsSource([], where="no codec")


def _open_codec(path: Path) -> tuple[SafetensorsSource, Any]:
    """Returns the codec's tensors at `path`, and the `codec_config` beside them or None.

    Raises:
        FileNotFoundError: There is no such path.
        WeightsError: The file is damaged or holds no codec.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or directory (of the codec)")
    file = path
    if path.is_dir():
        names = (tables.CODEC_NAME, *tables.LAYOUTS["transformers"].reads)
        file = next((path / name for name in names if (path / name).is_file()), path)
    source = None if file.is_dir() else open_source(file)
    if isinstance(source, SafetensorsSource):
        source.keep(tables.LAYOUTS["transformers"].set_aside or "")
        if source.specs:
            return source, read_config_json(file.parent).get("codec_config")
    if source is not None:
        source.close()
    raise WeightsError(path, "holds no codec (no tensors named codec_model.*)")


def _write(
    job: _Job,
    destination: Path,
    *,
    overwrite: bool,
    progress: Progress,
    before: Callable[[], None] | None = None,
) -> list[Path]:
    names = [*job.files, CONFIG_NAME]
    names += [job.index_name] if job.index_name else []
    names += [tables.ORBAX_NAME] if job.orbax else []
    metadata = {"format": job.layout.metadata_format, LAYOUT_KEY: job.layout.name}
    with staged(destination, names, overwrite=overwrite, nbytes=job.total) as staging:
        if before is not None:
            before()
        for name, outputs in job.files.items():
            write_safetensors(
                staging / name,
                outputs,
                metadata=metadata,
                progress=lambda count: progress(count, job.total),
            )
        if job.orbax:
            _write_orbax(job, staging / tables.ORBAX_NAME, progress)
        if job.index_name:
            _write_json(staging / job.index_name, _index(job))
        _write_json(staging / CONFIG_NAME, job.config_json)
    return [destination / name for name in sorted(names)]


def _index(job: _Job) -> dict[str, Any]:
    return {
        "metadata": {"total_size": job.total},
        "weight_map": {
            output.name: name for name, outputs in job.files.items() for output in outputs
        },
    }


def _write_orbax(job: _Job, path: Path, progress: Progress) -> None:
    import jax

    arrays = {}
    cpu = jax.local_devices(backend="cpu")[0]
    for item, read in job.orbax.items():
        array = read()
        arrays[item] = jax.block_until_ready(jax.device_put(array, cpu))
        progress(array.nbytes, job.total)
    write_orbax(path, arrays)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        json.dump(data, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
