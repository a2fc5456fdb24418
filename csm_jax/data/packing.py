"""Conversations side by side in rows of one length: which go together, and how a row is laid out.

Best fit, in the order given: a conversation goes into the fullest row that has room for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csm_jax.array_typing import Int
from csm_jax.data.batch import Batch
from csm_jax.data.examples import Example


def pack(lengths: Int[np.ndarray, " n"], capacity: int) -> list[np.ndarray]:
    """Returns the rows, each the indices of what is in it, in the order they were put there.

    Args:
        lengths: Positions of each conversation, at least 1.
        capacity: Positions of a row.

    Raises:
        ValueError: A length is below 1 or above the capacity.
    """
    if not len(lengths):
        return []
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(
            f"lengths must be in 1..{capacity:,}, got {lengths.min():,}..{lengths.max():,}"
        )
    # Rows by the room they have left, and a bit for each room that some row has.
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, rows = 0, 0
    row_of = []
    for length in lengths.tolist():
        fitting = rooms >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            same = with_room[room]
            row = same.pop()
            if not same:
                rooms ^= 1 << room
        else:
            room, row = capacity, rows
            rows += 1
        row_of.append(row)
        left = room - length
        if left:
            if not with_room[left]:
                rooms |= 1 << left
            with_room[left].append(row)
    placed = np.array(row_of)
    order = np.argsort(placed, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(placed[order])) + 1)


def empty_batch(shape: tuple[int, ...], capacity: int, num_codebooks: int) -> Batch:
    """Returns rows of nothing but padding.

    Args:
        shape: Of the rows, such as (accumulation, rows).
        capacity: Positions of a row.
        num_codebooks: Codes per frame.
    """
    rows = (*shape, capacity)
    return Batch(
        frames=np.zeros((*rows, num_codebooks + 1), np.int32),
        mask=np.zeros((*rows, num_codebooks + 1), bool),
        segments=np.zeros(rows, np.int32),
        positions=np.zeros(rows, np.int32),
        trained=np.zeros(rows, bool),
        weight=np.zeros(rows, np.float32),
    )


def assemble(
    examples: Sequence[Example], capacity: int, prefix_positions: int, num_codebooks: int
) -> Batch:
    """Returns one row, as a batch of one, with these conversations one after another.

    Args:
        examples: Whole, at most so many that they fit.
        capacity: Positions of the row.
        prefix_positions: Positions left free at the beginning of each, for a trained prefix.
        num_codebooks: Codes per frame.

    Raises:
        ValueError: They do not fit, have other codebooks, or a turn has no text or no audio.
    """
    batch = empty_batch((1,), capacity, num_codebooks)
    fill_row(batch, (0,), examples, prefix_positions=prefix_positions)
    return batch


def fill_row(
    batch: Batch, row: tuple[int, ...], examples: Sequence[Example], *, prefix_positions: int
) -> None:
    """Writes conversations into an empty row of a numpy batch; see `assemble`.

    Args:
        batch: Its arrays are changed.
        row: Index of the row.
        examples: What goes there.
        prefix_positions: As `assemble`.

    Raises:
        ValueError: As `assemble`.
    """
    frames, mask, segments, positions, trained, weight = (
        np.asarray(getattr(batch, name))[row]
        for name in ("frames", "mask", "segments", "positions", "trained", "weight")
    )
    capacity, columns = frames.shape
    at = 0
    for segment, example in enumerate(examples, start=1):
        length = prefix_positions + example.positions
        if at + length > capacity:
            raise ValueError(
                f"{len(examples)} conversations do not fit into a row of {capacity:,} positions: "
                f"{at + length:,} are needed for {segment} of them"
            )
        segments[at : at + length] = segment
        positions[at : at + length] = np.arange(length)
        at += prefix_positions
        for turn in example.turns:
            text, audio = len(turn.text), len(turn.codes)
            if not text or not audio or turn.codes.shape[1] != columns - 1:
                raise ValueError(
                    f"a turn has {text} text ids and codes of shape {list(turn.codes.shape)}: both are "
                    f"needed, with {columns - 1} codebooks"
                )
            frames[at : at + text, -1] = turn.text
            mask[at : at + text, -1] = True
            at += text
            end = at + audio + 1  # the end frame: zero codes, that count
            frames[at : end - 1, :-1] = turn.codes
            mask[at:end, :-1] = True
            if turn.trained:
                trained[at:end] = True
                weight[at:end] = turn.weight
            at = end
