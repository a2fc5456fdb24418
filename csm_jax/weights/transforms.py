"""Named, invertible changes of one tensor between a foreign layout and this project's form.

`forward` turns the foreign tensor into ours, `inverse` turns ours back, bit for bit: each only
moves values. The project's form: projections `[out, in]`, RoPE on the two halves of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """One named change.

    Attributes:
        name: For messages.
        forward: `(foreign, num_heads) -> ours`; `num_heads` is 0 where heads play no part.
        inverse: `(ours, num_heads) -> foreign`.
        foreign_shape: Shape of the foreign tensor for a given shape of ours.
    """

    name: str
    forward: Callable[[np.ndarray, int], np.ndarray]
    inverse: Callable[[np.ndarray, int], np.ndarray]
    foreign_shape: Callable[[Shape], Shape]


def _same_shape(shape: Shape) -> Shape:
    return shape


def _unchanged(x: np.ndarray, num_heads: int) -> np.ndarray:
    return x


def _pairs_to_halves(x: np.ndarray, num_heads: int) -> np.ndarray:
    rows, width = x.shape
    return (
        x.reshape(num_heads, rows // num_heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
    )


def _halves_to_pairs(x: np.ndarray, num_heads: int) -> np.ndarray:
    rows, width = x.shape
    return (
        x.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width)
    )


def _swap_last_two(x: np.ndarray, num_heads: int) -> np.ndarray:
    return x.swapaxes(-1, -2)


IDENTITY = Transform("identity", _unchanged, _unchanged, _same_shape)

PERMUTE_ROPE = Transform("permute_rope", _pairs_to_halves, _halves_to_pairs, _same_shape)
"""Rows of q_proj and k_proj: from rotating neighbours (x0,x1),(x2,x3).. (torchtune, MLX) to rotating
the two halves of a head (transformers `convert_csm.py`, `permute_for_rope`)."""

TRANSPOSE_LAST_TWO = Transform(
    "transpose_last_two",
    _swap_last_two,
    _swap_last_two,
    lambda shape: (*shape[:-2], shape[-1], shape[-2]),
)
"""`audio_head`: published as [C-1, in, out] (`h @ audio_head[i]`), here [C-1, out, in]."""
