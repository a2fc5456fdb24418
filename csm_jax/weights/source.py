"""What a checkpoint on disk looks like to the converter: names and shapes first, data later."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from csm_jax.weights.errors import WeightsError
from csm_jax.weights.tables import TensorSpec

CHUNK_BYTES = 1 << 26
"""Bytes of tensor data handled at once when streaming."""

NUMPY_DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes of model tensors by name."""


class TensorSource(abc.ABC):
    """A checkpoint whose headers have been read and checked.

    Attributes:
        where: The file or directory, for messages.
        specs: Dtype and shape of every tensor.
        recorded_layout: The layout noted by the writer, if any.
    """

    where: str
    specs: dict[str, TensorSpec]
    recorded_layout: str | None

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as a new array of its stored dtype."""

    @abc.abstractmethod
    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Yields the elements of one tensor in C order, as flat arrays of at most `CHUNK_BYTES`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of the files."""


def cast(array: np.ndarray, dtype: str | None, *, name: str, where: str) -> np.ndarray:
    """Returns the array in the dtype named (None: unchanged), rounding to nearest even.

    Raises:
        WeightsError: A finite value does not fit the narrower range (float16 ends at 65,504).
    """
    if dtype is None or array.dtype == NUMPY_DTYPES[dtype]:
        return array
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # judged below
        out = array.astype(NUMPY_DTYPES[dtype])
    # Only float16 is so much narrower that ordinary values overflow; a finite float32 beyond
    # bfloat16's largest value is caught by the same test.
    finite = np.isfinite(out)
    if not finite.all() and np.isfinite(array[~finite]).any():
        raise WeightsError(
            where, f"tensor {name} holds values that do not fit in {dtype}; use another dtype"
        )
    return out
