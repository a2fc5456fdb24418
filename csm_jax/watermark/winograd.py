"""3x3 convolution by Winograd's method: 25 products per tile of 3 x 3 outputs instead of 81.

Along one axis, 3 outputs of a 3-tap filter g over 5 inputs d are `A [(G g) * (B d)]`: the filter and
the inputs as polynomials, evaluated at 4 numbers and infinity, multiplied, interpolated (with inputs
and outputs transposed, which turns a product of polynomials into a sliding sum). In two dimensions
it is applied along both. The products are 25 matrix products over the channels, where XLA is near
the machine's peak; in float32 the result is as far from exact as a direct sum, times five.

The letters: R rows, T frames, I and O channels in and out; tiles are 3 frames by 3 bins.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.array_typing import Array, Float

TILE = 3
"""Outputs of a tile along each axis; the frames given to `convolve` are a multiple of it."""

_INPUTS = TILE + 2
_POINTS = (0.0, 1.0, -1.0, 2.0)  # small, so that their powers cost few bits


def _evaluate(coefficients: int) -> np.ndarray:
    # Polynomials of that many coefficients at the points, and at infinity their highest one.
    finite = [[point**power for power in range(coefficients)] for point in _POINTS]
    return np.array([*finite, [0.0] * (coefficients - 1) + [1.0]])


_A = _evaluate(TILE).T  # [3, 5]
_G = _evaluate(3)  # [5, 3]
_B = np.linalg.inv(_evaluate(_INPUTS)).T.round(12)  # [5, 5]; its zeros are exact


def transform_weight(weight: np.ndarray) -> np.ndarray:
    """Returns a 3x3 convolution's weight [O, I, bins, frames] as `convolve` takes it: [25, I, O]."""
    tiles = np.einsum("at,bk,oikt->abio", _G, _G, weight.astype(np.float64))
    return tiles.reshape(_INPUTS**2, *tiles.shape[2:]).astype(np.float32)


def padded_bins(bins: int) -> int:
    """Returns how many bins the input of `convolve` has for `bins` of output, borders included."""
    return -(-bins // TILE) * TILE + 2


def convolve(
    x: Float[Array, "R T_plus_2 padded I"], weight: Float[Array, "25 I O"]
) -> Float[Array, "R T padded_minus_2 O"]:
    """Returns the convolution of `x`, which has one frame and one bin of border on each side.

    Args:
        x: T + 2 frames, T a multiple of 3; `padded_bins` bins.
        weight: From `transform_weight`.
    """
    rows, frames, bins, _ = x.shape
    across, along = (bins - 2) // TILE, (frames - 2) // TILE
    x_bins = _combine(_B, [x[:, :, i : i + bins - 4 : TILE] for i in range(_INPUTS)])
    tiles = [
        _combine(_B, [x_bin[:, i : i + frames - 4 : TILE] for i in range(_INPUTS)])
        for x_bin in x_bins
    ]  # by bin, then by frame
    stacked = jnp.stack([tiles[b][a] for a in range(_INPUTS) for b in range(_INPUTS)])
    products = jnp.einsum("krtmi,kio->krtmo", stacked, weight, precision=jax.lax.Precision.HIGHEST)
    grid = [list(products[a * _INPUTS : (a + 1) * _INPUTS]) for a in range(_INPUTS)]
    by_frame = [_combine(_A, list(column)) for column in zip(*grid, strict=True)]
    outputs = [_combine(_A, list(row)) for row in zip(*by_frame, strict=True)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in outputs], axis=2)
    return y.reshape(rows, along * TILE, across * TILE, weight.shape[-1])


def _combine(matrix: np.ndarray, arrays: Sequence[Array]) -> list[Array]:
    # matrix @ arrays, written out: most coefficients are 0 or 1, and XLA fuses what is left.
    out = []
    for row in matrix:
        terms = [
            array if factor == 1 else array * np.float32(factor)
            for factor, array in zip(row, arrays, strict=True)
            if factor != 0
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        out.append(total)
    return out
