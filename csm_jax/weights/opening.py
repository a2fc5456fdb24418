"""From a path to an opened checkpoint: which file, which layout, which config, and does it all fit.

Only headers are read here. Whatever does not fit is collected and raised once, before any data is
read and before any device memory is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax import config as config_module
from csm_jax.config import CSMConfig
from csm_jax.weights import tables
from csm_jax.weights.checkpoint import OrbaxSource, is_orbax
from csm_jax.weights.errors import WeightsError
from csm_jax.weights.safetensors_io import MAX_HEADER_BYTES, SafetensorsSource, load_json
from csm_jax.weights.source import NUMPY_DTYPES, TensorSource, cast
from csm_jax.weights.tables import Binding, Layout
from csm_jax.weights.torch_pickle import TorchSource
from csm_jax.weights.transforms import IDENTITY

CONFIG_NAME = "config.json"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose tensors are known to be complete and well-shaped.

    Attributes:
        path: The file or orbax directory.
        config: The model's sizes.
        config_json: The `config.json` beside it as parsed, empty if there was none.
        layout: The layout.
        source: The tensors.
        bindings: The entries of the layout's table that are there, several for a copied tensor.
    """

    path: Path
    config: CSMConfig
    config_json: dict[str, Any]
    layout: Layout
    source: TensorSource
    bindings: tuple[Binding, ...]

    @property
    def directory(self) -> Path:
        """The directory that holds the checkpoint and its `config.json`."""
        return self.path.parent

    @property
    def codec_names(self) -> list[str]:
        """Names of the codec's tensors in the file, in no way part of the model."""
        return [name for name in self.source.specs if tables.is_set_aside(self.layout, name)]

    def dtype(self, path: str) -> str:
        """Returns the stored dtype of one parameter."""
        return self.source.specs[self._binding(path).name].dtype

    def read(self, path: str, dtype: str | None) -> np.ndarray:
        """Returns one parameter in the project's form and the dtype named (None: as stored)."""
        binding = self._binding(path)
        stored = self.dtype(path)
        if binding.transform is not IDENTITY:
            array = self.source.read(binding.name)
            array = np.ascontiguousarray(binding.transform.forward(array, binding.num_heads))
            return cast(array, dtype, name=binding.name, where=self.source.where)
        out = np.empty(binding.shape, NUMPY_DTYPES[dtype or stored])
        flat, position = out.reshape(-1), 0
        for chunk in self.chunks(path, dtype):
            flat[position : position + chunk.size] = chunk
            position += chunk.size
        return out

    def chunks(self, path: str, dtype: str | None) -> Iterator[np.ndarray]:
        """Yields the elements of one parameter in the order of the foreign tensor."""
        binding = self._binding(path)
        for chunk in self.source.chunks(binding.name):
            yield cast(chunk, dtype, name=binding.name, where=self.source.where)

    def is_stored_as_ours(self, path: str) -> bool:
        """Returns whether the foreign tensor needs no rearranging."""
        return self._binding(path).transform is IDENTITY

    def _binding(self, path: str) -> Binding:
        return next(binding for binding in self.bindings if binding.path == path)

    def check_copies(self) -> None:
        """Compares tensors that are stored twice, piece by piece.

        Raises:
            WeightsError: Two copies differ though the config says that they are one.
        """
        first: dict[str, str] = {}
        problems = []
        for binding in self.bindings:
            name = first.setdefault(binding.path, binding.name)
            if name != binding.name and not self._same(name, binding.name):
                problems.append(
                    f"{name} and {binding.name} differ, but tie_codebooks_embeddings is true; "
                    f"set it to false in {CONFIG_NAME} if the two tables are meant to differ"
                )
        if problems:
            raise WeightsError(self.source.where, problems)

    def _same(self, one: str, other: str) -> bool:
        specs = self.source.specs
        return specs[one] == specs[other] and all(
            np.array_equal(a.view(np.uint8), b.view(np.uint8))
            for a, b in zip(self.source.chunks(one), self.source.chunks(other), strict=True)
        )

    def close(self) -> None:
        """Lets go of the files."""
        self.source.close()


def open_checkpoint(
    path: str | Path, *, layout: str | None, config: CSMConfig | None
) -> Checkpoint:
    """Returns the checkpoint at `path`, opened and checked; the caller closes it.

    Args:
        path: A directory, a safetensors file, an index, a `ckpt.pt`, or an orbax directory.
        layout: Name of the layout; None to tell by the names of the tensors.
        config: The sizes; None to read `config.json` beside the checkpoint.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The layout is unknown.
        WeightsError: Everything that does not fit, by name.
    """
    wanted = None if layout is None else tables.get_layout(layout)
    file = find_checkpoint(Path(path), wanted)
    source = open_source(file)
    try:
        chosen = _choose_layout(source, wanted)
        config_json, config = _find_config(file, source, chosen, config)
        try:
            bindings = tables.bind(chosen, config)
        except ValueError as error:
            raise WeightsError(source.where, str(error)) from error
        problems = tables.check(chosen, bindings, source.specs)
        if problems:
            raise WeightsError(source.where, problems)
    except BaseException:
        source.close()
        raise
    return Checkpoint(
        path=file,
        config=config,
        config_json=config_json,
        layout=chosen,
        source=source,
        bindings=tuple(binding for binding in bindings if binding.name in source.specs),
    )


def find_checkpoint(path: Path, layout: Layout | None) -> Path:
    """Returns the checkpoint meant by `path`: itself, or the best-known name in the directory.

    Raises:
        FileNotFoundError: There is nothing, or no checkpoint in the directory.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or directory")
    if not path.is_dir() or is_orbax(path):
        return path
    names = tables.CHECKPOINT_NAMES if layout is None else layout.reads
    for name in names:
        if (path / name).is_file() or is_orbax(path / name):
            return path / name
    raise FileNotFoundError(
        f"{path}: no checkpoint in this directory; looked for {', '.join(names)}"
    )


def open_source(file: Path) -> TensorSource:
    """Returns the tensors of a checkpoint file or orbax directory; reads headers only.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file is damaged or of no known kind.
    """
    if file.is_dir():
        return OrbaxSource(file)
    openers: dict[str, Callable[[], TensorSource]] = {
        ".safetensors": lambda: SafetensorsSource([file], where=str(file)),
        ".json": lambda: open_index(file),
        **{suffix: lambda: TorchSource(file) for suffix in _TORCH_SUFFIXES},
    }
    if file.suffix not in openers:
        raise WeightsError(file, f"unknown kind of file; known endings are {', '.join(openers)}")
    return openers[file.suffix]()


def open_index(file: Path) -> SafetensorsSource:
    """Returns the tensors of all files an index names.

    The names must be plain: an index is data from elsewhere and may not point out of its directory.
    (A plain name may well be a symbolic link, as in the hub's cache.)

    Raises:
        WeightsError: The index is damaged, names a file elsewhere, or does not list exactly the
            tensors that are there.
    """
    where = str(file)
    if file.stat().st_size > MAX_HEADER_BYTES:
        raise WeightsError(where, f"the index has more than {MAX_HEADER_BYTES:,} bytes")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(where, f"damaged index: {error}") from error
    data = load_json(text, where=where)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(where, "damaged index: it has no 'weight_map'")
    names = sorted({name for name in weight_map.values() if isinstance(name, str)})
    problems = [
        f"tensor {tensor}: {name!r} is not a file name"
        for tensor, name in weight_map.items()
        if not isinstance(name, str)
    ]
    for name in names:
        if not _is_plain(name):
            problems.append(
                f"refused the file name {name!r}: it must be a plain *.safetensors name"
            )
        elif not (file.parent / name).is_file():
            problems.append(f"the file {name} is missing")
    if problems:
        raise WeightsError(where, problems)
    source = SafetensorsSource([file.parent / name for name in names], where=where)
    problems = [
        f"tensor {tensor} is not in {name}"
        for tensor, name in weight_map.items()
        if tensor not in source.file_of or source.file_of[tensor].name != name
    ]
    problems += [
        f"tensor {tensor} of {path.name} is not in the index"
        for tensor, path in source.file_of.items()
        if tensor not in weight_map
    ]
    if problems:
        raise WeightsError(where, problems)
    return source


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and not any(c in name for c in "/\\:\0") and name[0] != "."


def _choose_layout(source: TensorSource, wanted: Layout | None) -> Layout:
    if isinstance(source, OrbaxSource):
        if wanted is not None and wanted.name != "orbax":
            raise WeightsError(source.where, f"an orbax directory, not layout {wanted.name!r}")
        return tables.LAYOUTS["orbax"]
    _strip_prefix(source)
    if wanted is None:
        return tables.LAYOUTS[
            tables.detect(source.specs, where=source.where, recorded=source.recorded_layout)
        ]
    try:
        fits = tables.fitting_layouts(source.specs, where=source.where)
    except WeightsError as error:
        if "quantised" in str(error):
            raise
        return wanted  # so many names are wrong that only the full list helps
    if wanted.name not in fits:
        raise WeightsError(
            source.where, f"the tensor names are those of {' or '.join(fits)}, not of {wanted.name}"
        )
    if source.recorded_layout in fits and source.recorded_layout != wanted.name:
        raise WeightsError(
            source.where,
            f"layout {wanted.name!r} was asked for, but the file was written as "
            f"{source.recorded_layout!r}",
        )
    return wanted


def _strip_prefix(source: TensorSource) -> None:
    """Drops the `model.` that some exports put before every name."""
    if isinstance(source, (SafetensorsSource, TorchSource)) and all(
        name.startswith("model.") for name in source.specs
    ):
        source.strip_prefix("model.")


def read_config_json(directory: Path) -> dict[str, Any]:
    """Returns the `config.json` of a directory as parsed; empty if there is none.

    Raises:
        WeightsError: It is not a JSON object.
    """
    file = directory / CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(file, f"damaged JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(file, "does not hold a JSON object")
    return data


def _find_config(
    file: Path, source: TensorSource, layout: Layout, config: CSMConfig | None
) -> tuple[dict[str, Any], CSMConfig]:
    data = read_config_json(file.parent)
    if config is not None:
        return data, config
    if data:
        return data, config_module.read_config(file.parent)
    preset = config_module.csm_1b()
    if not tables.check(layout, tables.bind(layout, preset), source.specs):
        return {}, preset
    raise WeightsError(
        file,
        f"there is no {CONFIG_NAME} beside it and its tensors are not those of csm_1b(): put the "
        f"model's {CONFIG_NAME} there, or pass config=",
    )
