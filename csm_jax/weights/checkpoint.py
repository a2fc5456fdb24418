"""The orbax layout: our own tree of parameters in a directory, `config.json` beside it.

Names are our dotted paths. Restoring goes leaf by leaf against an abstract target, so that only one
leaf is held; saving hands orbax the whole tree as arrays and limits what it copies at once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.weights.errors import WeightsError
from csm_jax.weights.source import CHUNK_BYTES, TensorSource
from csm_jax.weights.tables import TensorSpec, flatten, unflatten

MIN_BUFFER_BYTES = 1 << 28
"""Least that orbax may hold in write buffers; without a limit it holds the whole model again."""

METADATA_NAME = "_METADATA"
COMMIT_NAME = "commit_success.txt"
"""What orbax (0.12.8 and later) writes last, into every directory of arrays."""


def is_orbax(path: Path) -> bool:
    """Returns whether `path` is an orbax checkpoint directory."""
    return (path / METADATA_NAME).is_file()


@contextlib.contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """Turns what orbax and tensorstore raise on damaged files into one error with the name."""
    try:
        yield
    except WeightsError:
        raise
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, AttributeError) as error:
        first_line = (
            str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        )
        raise WeightsError(where, f"damaged orbax checkpoint: {first_line[:300]}") from error


def _check_stored(path: Path) -> None:
    """Refuses a checkpoint whose metadata lists an array that its files do not hold.

    Orbax opens all arrays at once. When one fails it reports none of them, and it closes its event
    loop while the others are still being opened, which prints a second, stray error.

    Args:
        path: The directory that holds `_METADATA`.

    Raises:
        WeightsError: Arrays are missing; lists them.
        ValueError, KeyError, TypeError, AttributeError: The metadata or the index is damaged.
    """
    import tensorstore as ts

    metadata = json.loads((path / METADATA_NAME).read_text(encoding="utf-8"))
    if not metadata.get("use_ocdbt", False):
        return
    described = "zarr.json" if metadata.get("use_zarr3", False) else ".zarray"
    names = [
        ".".join(str(key["key"]) for key in leaf["key_metadata"])
        for leaf in metadata["tree_metadata"].values()
    ]
    store = ts.KvStore.open({"driver": "ocdbt", "base": path.as_uri() + "/"}).result()
    problems = [
        f"{METADATA_NAME} lists {name}, which is not stored"
        for name in names
        if store.read(f"{name}/{described}").result().state != "value"
    ]
    if problems:
        raise WeightsError(str(path), problems)


class OrbaxSource(TensorSource):
    """An orbax directory as a set of tensors; see `TensorSource`.

    Args:
        path: The directory that holds `_METADATA`.

    Raises:
        WeightsError: Saving was not finished, or the metadata is damaged or does not describe nested
            dicts of arrays.
    """

    def __init__(self, path: Path):
        if not (path / COMMIT_NAME).is_file():
            raise WeightsError(
                str(path),
                f"unfinished orbax checkpoint: there is no {COMMIT_NAME}, which is written last; "
                "save it, or copy it, again",
            )
        import orbax.checkpoint as ocp  # slow to import and not needed for the other layouts

        self.where = str(path)
        self.recorded_layout: str | None = None
        self._path = path.absolute()
        self._ocp = ocp
        self._checkpointer = ocp.PyTreeCheckpointer()
        with _named_errors(self.where):
            _check_stored(self._path)
            metadata = self._checkpointer.metadata(self._path)
            leaves = flatten(getattr(metadata.item_metadata, "tree", None) or {})
            self.specs: dict[str, TensorSpec] = {
                name: TensorSpec(np.dtype(leaf.dtype).name, tuple(leaf.shape))
                for name, leaf in leaves.items()
            }

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as a new array of its stored dtype."""
        ocp = self._ocp
        spec = self.specs[name]
        target = unflatten({name: np.empty((0,))})
        restore = unflatten({name: ocp.RestoreArgs(restore_type=np.ndarray)})
        with _named_errors(self.where):
            tree = self._checkpointer.restore(
                self._path,
                args=ocp.args.PyTreeRestore(
                    item=target, restore_args=restore, partial_restore=True
                ),
            )
            array = flatten(tree)[name]
        if array.shape != spec.shape or array.dtype.name != spec.dtype:
            raise WeightsError(
                self.where,
                f"tensor {name} is {array.dtype.name}{list(array.shape)} on disk but "
                f"{spec.dtype}{list(spec.shape)} in the metadata",
            )
        return array

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Yields the elements of one tensor in order."""
        flat = self.read(name).reshape(-1)
        step = CHUNK_BYTES // flat.itemsize
        for start in range(0, flat.size, step):
            yield flat[start : start + step]

    def close(self) -> None:
        """Ends orbax's background threads."""
        self._checkpointer.close()


def write_orbax(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes jax arrays by dotted path as an orbax checkpoint.

    Args:
        path: A directory that does not exist yet.
        arrays: jax arrays: orbax would copy numpy ones all at once.

    Raises:
        OSError: The directory cannot be written.
    """
    import orbax.checkpoint as ocp

    # Orbax refuses a limit that the largest leaf does not stay below. Declared as whole gigabytes,
    # it takes fractions, and rounding up would cost a gigabyte of memory.
    limit = max(MIN_BUFFER_BYTES, *(array.nbytes + 1024 for array in arrays.values()))
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=limit / 10**9,  # pyright: ignore[reportArgumentType]
        # Weights hardly compress, and the compressed copy would be one more buffer.
        use_compression=False,
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(unflatten(arrays)))
