"""One conversation as ids and codes: what a shard's record holds, and how it is kept within a row.

A turn takes its text's positions, one per frame of audio, and one for the end frame. The end frame is
not part of a record: whoever lays out a turn adds it, so none can be without one. A record is

    CSMt, version, codebooks, turns, bytes of facts          the head
    text ids, frames, trained, weight                        per turn
    int32 text ids, uint16 codes [frames, C]                 of all turns, in their order
    facts                                                    JSON, for people: id, lang, texts, speakers

all little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from csm_jax.array_typing import Int, UInt

_HEAD = struct.Struct("<4sHHII")
_MAGIC, _VERSION = b"CSMt", 1
_TURN = np.dtype([("text", "<u4"), ("frames", "<u4"), ("trained", "<u4"), ("weight", "<f4")])


class TooLongError(ValueError):
    """A conversation cannot be kept within a row; the message has the numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """What one speaker says.

    Attributes:
        text: Token ids of `[speaker]text`, begin and end tokens included.
        codes: Its audio, without an end frame.
        trained: Whether its audio is to be learned; otherwise it is context.
        weight: Of its frames in the loss.
    """

    text: Int[np.ndarray, " T"]
    codes: UInt[np.ndarray, "n C"]
    trained: bool
    weight: float

    @property
    def positions(self) -> int:
        """How many positions it takes, end frame included."""
        return turn_positions(len(self.text), len(self.codes))


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One conversation.

    Attributes:
        turns: In their order.
        facts: Of the source: `id`, `lang`, and per turn `texts` and `speakers`. Not used in training.
    """

    turns: tuple[Turn, ...]
    facts: Mapping[str, Any]

    @property
    def positions(self) -> int:
        """How many positions it takes."""
        return sum(turn.positions for turn in self.turns)


def turn_positions(text: int, frames: int) -> int:
    """Returns the positions of a turn of so many text ids and frames of audio: the end frame is one more."""
    return text + frames + 1


def kept_from(positions: Sequence[int], trained: Sequence[bool], capacity: int) -> int:
    """Returns the first turn that is kept: the oldest turns of context go, whole, until the rest fits.

    Args:
        positions: Of each turn.
        trained: Which turns are trained; none of them is dropped or cut, nor what follows one.
        capacity: Positions that there are.

    Raises:
        TooLongError: It does not fit then, or nothing is trained; the message says what takes how much.
    """
    if not any(trained):
        raise TooLongError("no message is trained")
    total, first = sum(positions), 0
    while total > capacity and not trained[first]:
        total -= positions[first]
        first += 1
    if total <= capacity:
        return first
    for turn, (length, own) in enumerate(zip(positions, trained, strict=True)):
        if own and length > capacity:
            raise TooLongError(
                f"trained message {turn} alone takes {length:,} positions, but {capacity:,} fit: cut "
                "the recording and its text in two, or raise the maximum length"
            )
    raise TooLongError(
        f"from its first trained message (number {first}) on it takes {total:,} positions, but "
        f"{capacity:,} fit: split the conversation, or raise the maximum length"
    )


def encode_record(example: Example) -> bytes:
    """Returns an example as the bytes of a record.

    Raises:
        ValueError: Its turns differ in codebooks, or there are none.
    """
    codebooks = {turn.codes.shape[1] for turn in example.turns}
    if len(codebooks) != 1:
        raise ValueError(f"turns must share one number of codebooks, got {sorted(codebooks)}")
    turns = np.array(
        [(len(t.text), len(t.codes), t.trained, t.weight) for t in example.turns], _TURN
    )
    facts = json.dumps(dict(example.facts), ensure_ascii=False, sort_keys=True).encode()
    return b"".join(
        [
            _HEAD.pack(_MAGIC, _VERSION, codebooks.pop(), len(turns), len(facts)),
            turns.tobytes(),
            *(np.ascontiguousarray(turn.text, "<i4").tobytes() for turn in example.turns),
            *(np.ascontiguousarray(turn.codes, "<u2").tobytes() for turn in example.turns),
            facts,
        ]
    )


def decode_record(record: bytes, *, facts: bool = True) -> Example:
    """Returns the example of a record's bytes; its arrays share them.

    Args:
        record: What `encode_record` gave.
        facts: Whether to read the facts; training has no use for them.

    Raises:
        ValueError: It is no such record, or not whole.
    """
    try:
        magic, version, codebooks, count, size = _HEAD.unpack_from(record)
    except struct.error as error:
        raise ValueError(f"a record of {len(record)} bytes is cut short") from error
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(f"a record begins with {magic!r}, version {version}: not of this program")
    start = _HEAD.size
    body = start + count * _TURN.itemsize
    rows = np.frombuffer(record, _TURN, count, start) if body <= len(record) else None
    ids = 0 if rows is None else int(rows["text"].sum(dtype=np.int64))
    frames = 0 if rows is None else int(rows["frames"].sum(dtype=np.int64))
    audio = body + 4 * ids
    end = audio + 2 * codebooks * frames
    if rows is None or end + size != len(record):
        raise ValueError(f"a record of {len(record):,} bytes is not whole")
    text = np.frombuffer(record, "<i4", ids, body)
    codes = np.frombuffer(record, "<u2", codebooks * frames, audio).reshape(frames, codebooks)
    turns, at, frame = [], 0, 0
    for length, count, trained, weight in rows.tolist():
        turns.append(
            Turn(
                text=text[at : at + length],
                codes=codes[frame : frame + count],
                trained=bool(trained),
                weight=weight,
            )
        )
        at, frame = at + length, frame + count
    return Example(turns=tuple(turns), facts=json.loads(record[end:]) if facts else {})
