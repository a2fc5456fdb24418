"""What a codec does: 24 kHz audio to and from frames of codes. A protocol, and the check of codes.

Frames come first and codebooks last everywhere: codes are int32 [n, C], one row per 80 ms frame.
Arrays are numpy; a codec moves them to its own device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable  # the tests check annotations at run time
class CodecStream(Protocol):
    """Decodes one utterance frame by frame; independent of every other stream of its codec."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the audio (float32 [n * samples per frame]) of the next frames (int [n, C])."""
        ...

    def begin(self, codes: np.ndarray) -> Callable[[], np.ndarray]:
        """Starts decoding the next frames and returns a function that waits for what `decode` gives."""
        ...

    def close(self) -> None:
        """Frees the stream's state; decoding afterwards is an error."""
        ...

    def __enter__(self) -> CodecStream: ...

    def __exit__(self, *exception: object) -> None: ...


@runtime_checkable  # the tests check annotations at run time
class CodecRows(Protocol):
    """Decodes several utterances side by side, a row each; rows do not disturb each other."""

    @property
    def rows(self) -> int:
        """How many."""
        ...

    @property
    def frames(self) -> int:
        """Most frames of a row in one call."""
        ...

    def begin(
        self, codes: Mapping[int, np.ndarray], fresh: Collection[int]
    ) -> Callable[[], dict[int, np.ndarray]]:
        """Starts decoding rows' next frames and returns a function that waits for their audio.

        Args:
            codes: By row, int [n, C]; other rows stand still.
            fresh: Rows that begin an utterance with these frames.
        """
        ...


class StreamRows:
    """Rows made of a codec's streams, for a codec that cannot decode rows together."""

    def __init__(self, codec: Codec, rows: int, frames: int) -> None:
        self._codec, self.rows, self.frames = codec, rows, frames
        self._streams: dict[int, CodecStream] = {}

    def begin(
        self, codes: Mapping[int, np.ndarray], fresh: Collection[int]
    ) -> Callable[[], dict[int, np.ndarray]]:
        """See `CodecRows.begin`."""
        for row in fresh:
            if row in self._streams:
                self._streams[row].close()
            self._streams[row] = self._codec.open_stream()
        waits = {row: self._streams[row].begin(part) for row, part in codes.items()}
        return lambda: {row: wait() for row, wait in waits.items()}


@runtime_checkable  # the tests check annotations at run time
class Codec(Protocol):
    """Encodes audio into codes and decodes codes into audio."""

    @property
    def sample_rate(self) -> int:
        """Samples per second of its audio."""
        ...

    @property
    def num_codebooks(self) -> int:
        """Codes per frame, C."""
        ...

    @property
    def codebook_size(self) -> int:
        """Codes run from 0 to this, exclusive."""
        ...

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """Returns the codes (int32 [ceil(W / samples per frame), C]) of audio (float32 [W])."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the audio (float32 [n * samples per frame]) of codes (int [n, C])."""
        ...

    def decode_batch(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns what `decode` gives for each, computed together; lengths may differ."""
        ...

    def open_stream(self) -> CodecStream:
        """Returns a new stream at the start of an utterance."""
        ...

    def open_rows(self, rows: int, frames: int) -> CodecRows:
        """Returns `rows` rows, of which a call decodes up to `frames` frames each."""
        ...


def check_codes(codes: Any, *, num_codebooks: int, codebook_size: int) -> np.ndarray:
    """Returns codes as an int32 array [n, C].

    Raises:
        TypeError: They are not integers.
        ValueError: The shape is not [n, C] (codebooks are the last axis), or a code is outside
            0..codebook_size-1, which a codec's table look-up would turn into a crash.
    """
    codes = np.asarray(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    if codes.ndim != 2 or codes.shape[1] != num_codebooks:
        hint = ""
        if codes.ndim == 2 and codes.shape[0] == num_codebooks:
            hint = "; codebooks are the last axis, so transpose them"
        raise ValueError(
            f"codes must have shape [frames, {num_codebooks}], got {list(codes.shape)}{hint}"
        )
    bad = np.argwhere((codes < 0) | (codes >= codebook_size))
    if len(bad):
        frame, codebook = (int(index) for index in bad[0])
        raise ValueError(
            f"{len(bad):,} codes lie outside 0..{codebook_size - 1:,}, the first "
            f"({int(codes[frame, codebook]):,}) at frame {frame:,}, codebook {codebook}"
        )
    return codes.astype(np.int32)
