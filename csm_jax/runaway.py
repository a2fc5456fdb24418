"""Finds utterances that do not end as they should: a cap on the length, loops, and silence.

The model has no length of its own: it stops when it draws the end frame. When it does not, it
usually repeats itself or falls silent. All in numpy, on the host, beside the device's work.
"""

from __future__ import annotations

import math
import operator
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from csm_jax.config import FRAME_MS

# --- flags -------------------------------------------------------------------------------------


class Flags:
    """What an utterance is flagged with."""

    REPETITION: Final = "repetition"
    SILENCE: Final = "silence"


# --- length ------------------------------------------------------------------------------------

# Seconds that a very slow speaker needs, 2 to 3 times the ordinary. English is read at 150 to 160 words
# a minute, 15 to 16 characters a second with spaces; Mandarin has 5.2 syllables a second (Pellegrino,
# Coupé and Marsico, Language 87, 2011), in conversation 4 to 5.
_CHARACTER_S = 1 / 6
_CAPITAL_S = 0.35  # perhaps spelled: FBI is three syllables
_DIGIT_S = 0.8  # a digit is a word
_SYLLABLE_S = 0.5  # a Chinese character, a Hangul block, a kana
_SIGN_S = 0.8  # read as a word, if at all: %, +, ☂
_PAUSE_S = 1.0  # at the end of a sentence
_START_S = 3.0  # so that "Hi." may be drawn out, with a breath before and after

_SYLLABLE_RANGES = (
    (0x3041, 0x30FF),  # kana
    (0x3400, 0x4DBF),  # CJK extension A
    (0x4E00, 0x9FFF),  # CJK
    (0xAC00, 0xD7A3),  # Hangul
    (0xF900, 0xFAFF),  # CJK compatibility
    (0x20000, 0x3FFFF),  # CJK extensions B and later
)
_ENDS = frozenset(".!?…。！？｡।؟۔\n")


def frame_cap(text: str) -> int:
    """Returns the most frames that any speaker could need for `text`: about 2.5 times the ordinary.

    A text that is still being spoken after so many frames will not end by itself. A model's own
    limit may be lower.
    """
    seconds = _START_S
    previous = ""
    for character in text:
        seconds += _character_s(character, previous)
        previous = character
    return math.ceil(seconds * 1000 / FRAME_MS)


def _character_s(character: str, previous: str) -> float:
    if character in _ENDS:
        # Not for every point of a row of dots.
        return 0.0 if previous in _ENDS and previous else _PAUSE_S
    if character.isascii() and character.islower():
        return _CHARACTER_S
    code = ord(character)
    if any(low <= code <= high for low, high in _SYLLABLE_RANGES):
        return _SYLLABLE_S
    category = unicodedata.category(character)
    if category[0] == "N":
        return _DIGIT_S
    if category == "Lu":
        return _CAPITAL_S
    if category[0] == "S":
        return _SIGN_S
    return _CHARACTER_S if category[0] in "LPZ" or character.isspace() else 0.0


# --- loops -------------------------------------------------------------------------------------

LONGEST_PERIOD = 37
"""Frames: 3 s, a short sentence."""
_REPEATS = 3  # after the first time; speakers repeat a word twice ("no, no, no"), not 3 s of it
_LEAST_FRAMES = 38  # 3 s: a pause inside speech has one code again and again, but is shorter
_SAME = 0.9  # of the frames: sampling varies a loop


class RepetitionDetector:
    """Says which slots' rows are stuck: in one frame, or in a loop of up to 3 s.

    A row is stuck at the first frame where, for some period p, at least 90 % of the last
    max(3 p, 38) frames have the code of codebook 0 that stood p frames earlier. Codebook 0 alone is compared,
    because it carries what is said; the others vary from one repeat to the next.

    Where a frame equals the one p earlier with probability q by chance, at least 35 of 38 do with
    probability below 8500 q^35: with q = 0.3, far above speech, that is less than one false alarm in
    10^9 utterances of 90 s over all periods.

    How the frames are cut into pushes changes nothing.
    """

    def __init__(self, num_slots: int) -> None:
        """Starts with every slot empty.

        Args:
            num_slots: How many rows are watched at once.

        Raises:
            ValueError: It is not positive.
        """
        num_slots = operator.index(num_slots)
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self._periods = np.arange(1, LONGEST_PERIOD + 1)
        self._windows = np.maximum(_REPEATS * self._periods, _LEAST_FRAMES)
        self._needed = np.ceil(_SAME * self._windows).astype(np.int16)
        # A ring as long as the longest window and the frame a period before it.
        self._length = int((self._windows + self._periods).max()) + 1
        self._history = np.zeros((num_slots, self._length), np.int32)
        self._counts = np.zeros((num_slots, LONGEST_PERIOD), np.int16)
        self._frames = np.zeros(num_slots, np.int64)
        self._since = np.full(num_slots, -1, np.int64)

    def reset(self, slots: int | Iterable[int]) -> None:
        """Forgets the frames of one slot or several, for their next rows."""
        rows = np.array([slots] if isinstance(slots, int) else list(slots), np.int64)
        self._counts[rows] = 0
        self._frames[rows] = 0
        self._since[rows] = -1

    def stuck_since(self, slot: int) -> int:
        """Returns how many frames the slot's row had when it was found stuck, or -1."""
        return int(self._since[slot])

    def push(
        self, slots: Sequence[int] | np.ndarray, codes: ArrayLike, counts: ArrayLike
    ) -> np.ndarray:
        """Returns which rows are stuck: bool [R].

        Args:
            slots: The rows' slots, each at most once [R].
            codes: Their next frames, integers [R, n, C].
            counts: How many of the n frames count, from the first [R].

        Raises:
            ValueError: The shapes do not fit together, or a slot is named twice.
        """
        rows = np.asarray(slots, np.int64)
        codes, counts = np.asarray(codes), np.asarray(counts)
        if codes.ndim != 3 or len(codes) != len(rows) or counts.shape != rows.shape:
            raise ValueError(
                f"push needs slots [R], codes [R, n, C] and counts [R], got {list(rows.shape)}, "
                f"{list(codes.shape)} and {list(counts.shape)}"
            )
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"push takes each slot once, got {rows.tolist()}")
        if len(rows) and counts.max(initial=0) > codes.shape[1]:
            raise ValueError(f"a count is {counts.max()}, but there are {codes.shape[1]} frames")
        for frame in range(int(counts.max(initial=0))):
            live = counts > frame
            self._advance(rows[live], codes[live, frame, 0])
        return self._since[rows] >= 0

    def _advance(self, rows: np.ndarray, codes: np.ndarray) -> None:
        at = self._frames[rows][:, None]
        history = self._history
        history[rows, at[:, 0] % self._length] = codes
        column = rows[:, None]
        entering = (at >= self._periods) & (
            codes[:, None] == history[column, (at - self._periods) % self._length]
        )
        left = at - self._windows
        leaving = (left >= self._periods) & (
            history[column, left % self._length]
            == history[column, (left - self._periods) % self._length]
        )
        counts = self._counts[rows] + entering - leaving
        self._counts[rows] = counts
        self._frames[rows] += 1
        stuck = (counts >= self._needed).any(axis=1) & (self._since[rows] < 0)
        self._since[rows[stuck]] = self._frames[rows[stuck]]


# --- silence -----------------------------------------------------------------------------------

LONGEST_SILENCE_S = 3.0
"""Pauses above 1 s are called long, and speakers hardly leave 3 s (see `csm_jax.text.splitting`)."""
_BLOCK_S = 0.02
_LOUD_SHARE = 95  # percentile of the blocks' levels that is the utterance's loudness
_BELOW_LOUD_DB = 40.0  # speech spans about 30 dB from its loudest vowels to its weakest consonants
_FLOOR_DB = -60.0  # of full scale: below the noise of a good recording


def _silent_blocks(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    size = max(1, round(sample_rate * _BLOCK_S))
    blocks = -(-audio.size // size)
    padded = np.zeros(blocks * size, np.float32)
    padded[: audio.size] = audio
    padded = padded.reshape(blocks, size)
    power = np.einsum("bw,bw->b", padded, padded, dtype=np.float64) / size
    loud = np.percentile(power, _LOUD_SHARE) if blocks else 0.0
    level = max(10 ** (_FLOOR_DB / 10), loud * 10 ** (-_BELOW_LOUD_DB / 10))
    return power < level


def longest_silence_s(audio: np.ndarray, sample_rate: int) -> float:
    """Returns the seconds of the longest silence in audio (float32 [W]), to 20 ms.

    Silent is what is 40 dB below the utterance's loudness (the level that 95 % of it stays under),
    or below -60 dB of full scale. Measure before the watermark, which adds a little noise.
    """
    quiet = _silent_blocks(audio, sample_rate)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
    runs = edges[1::2] - edges[::2]
    return _seconds(int(runs.max(initial=0)), audio, sample_rate)


def trailing_silence_s(audio: np.ndarray, sample_rate: int) -> float:
    """Returns the seconds of silence at the end of audio (float32 [W]), to 20 ms."""
    sounds = np.flatnonzero(~_silent_blocks(audio, sample_rate)[::-1])
    blocks = _silent_blocks(audio, sample_rate).size
    return _seconds(int(sounds[0]) if sounds.size else blocks, audio, sample_rate)


def _seconds(blocks: int, audio: np.ndarray, sample_rate: int) -> float:
    return min(blocks * max(1, round(sample_rate * _BLOCK_S)), audio.size) / sample_rate


def is_silent(audio: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_SILENCE_S) -> bool:
    """Returns whether audio (float32 [W]) has no sound, or a silence longer than `longest_s`."""
    return bool(_silent_blocks(audio, sample_rate).all()) or (
        longest_silence_s(audio, sample_rate) > longest_s
    )
