"""Packed rows: what one training step reads."""

from __future__ import annotations

import numpy as np

from csm_jax.array_typing import Array, Bool, Float, Int, pytree

_Arrays = Array | np.ndarray  # the host's, then the device's


@pytree
class Batch:
    """Rows of whole conversations, packed one after another and padded at the end.

    The axes before T are the rows of a batch, before them, where there is one, the micro-batches of a step.
    A segment is one conversation; its
    first position is never trained.

    Attributes:
        frames: C codes and a text id per position; 0 at padding.
        mask: Which columns count; none at padding, and none where a trained prefix goes.
        segments: 1, 2, ... per conversation of a row; 0 at padding.
        positions: From 0 within each segment.
        trained: Whether the position is an audio frame, or the end frame of one, that is to be predicted.
        weight: Weight of a trained frame; 0 where none is trained.
    """

    frames: Int[_Arrays, "*rows T C1"]
    mask: Bool[_Arrays, "*rows T C1"]
    segments: Int[_Arrays, "*rows T"]
    positions: Int[_Arrays, "*rows T"]
    trained: Bool[_Arrays, "*rows T"]
    weight: Float[_Arrays, "*rows T"]
