"""Measures of words, audio and codes: plain functions that need neither a model nor a recogniser."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from csm_jax.runaway import longest_silence_s, trailing_silence_s
from csm_jax.text import normalise

# --- words -------------------------------------------------------------------------------------

_APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ`´"), "'")
_MOST_REPEATED = 8
_Z = 1.959964  # the standard normal's 97.5th percentile


def words_of(text: str, *, language: str = "en") -> list[str]:
    """Returns the words of a text as they are compared: written out, lower case, without punctuation.

    What is said the same is compared the same: "20 %" and "twenty percent", "It’s" and "it's". Letters,
    their marks, digits and apostrophes within words remain.

    Raises:
        ValueError: The language is not known (`csm_jax.text.languages`).
    """
    said = unicodedata.normalize("NFKC", normalise(text, language=language))
    kept = "".join(
        character if character == "'" or unicodedata.category(character)[0] in "LMN" else " "
        for character in said.translate(_APOSTROPHES).lower()
    )
    return [word for part in kept.split() if (word := part.strip("'"))]


Kind = Literal["equal", "replace", "delete", "insert"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stretch of an alignment.

    Attributes:
        kind: `equal`; `replace`d by others; `delete`d, so that it was not heard; `insert`ed.
        said: What should be heard.
        heard: What was.
    """

    kind: Kind
    said: Sequence[str]
    heard: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How many of the words (or characters) that should be heard were, and what else was."""

    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def length(self) -> int:
        """How many should be heard."""
        return self.hits + self.substitutions + self.deletions

    @property
    def count(self) -> int:
        """How many errors there are; with insertions that may be more than `length`."""
        return self.substitutions + self.deletions + self.insertions


def align(said: Sequence[str], heard: Sequence[str]) -> list[Step]:
    """Returns an alignment with the fewest errors (Levenshtein): of words, or of characters.

    Raises:
        ImportError: rapidfuzz is not installed; the message has the command.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError(
            "error rates need rapidfuzz: pip install 'csm_jax[eval]', or pip install rapidfuzz"
        ) from error
    # Numbers stand for words: the library compares words by hashes, which may collide.
    numbers: dict[str, int] = {}
    first, second = (
        [numbers.setdefault(each, len(numbers)) for each in sequence] for sequence in (said, heard)
    )
    return [
        Step(
            kind=cast(Kind, operation.tag),
            said=said[operation.src_start : operation.src_end],
            heard=heard[operation.dest_start : operation.dest_end],
        )
        for operation in Levenshtein.opcodes(first, second)
    ]


def count_errors(steps: Sequence[Step]) -> Errors:
    """Returns the counts of an alignment."""
    found = dict.fromkeys(("equal", "replace", "delete", "insert"), 0)
    for step in steps:
        found[step.kind] += max(len(step.said), len(step.heard))
    return Errors(
        hits=found["equal"],
        substitutions=found["replace"],
        deletions=found["delete"],
        insertions=found["insert"],
    )


def repeats(words: Sequence[str]) -> int:
    """Returns how many words are said again right after the same words: stuttering of up to 8 words.

    `a b a b c` has two. Texts have such words as well, so compare with the text's own.
    """
    again = np.zeros(len(words), bool)
    for length in range(1, min(_MOST_REPEATED, len(words) // 2) + 1):
        for start in range(len(words) - 2 * length + 1):
            middle, end = start + length, start + 2 * length
            if list(words[start:middle]) == list(words[middle:end]):
                again[middle:end] = True
    return int(again.sum())


# --- audio -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AudioFacts:
    """What a recording alone tells, in seconds.

    Attributes:
        seconds: All of it.
        spoken_s: Without the silence before and after.
        longest_silence_s: Anywhere in it.
        trailing_silence_s: At its end.
    """

    seconds: float
    spoken_s: float
    longest_silence_s: float
    trailing_silence_s: float


def audio_facts(audio: np.ndarray, sample_rate: int) -> AudioFacts:
    """Returns the facts of audio (float32 [W]); silence is what `csm_jax.runaway` calls so."""
    seconds = audio.size / sample_rate
    after = trailing_silence_s(audio, sample_rate)
    before = trailing_silence_s(audio[::-1], sample_rate)
    return AudioFacts(
        seconds=seconds,
        spoken_s=max(0.0, seconds - before - after),
        longest_silence_s=longest_silence_s(audio, sample_rate),
        trailing_silence_s=after,
    )


# --- codes -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two models' codes for one request agree.

    Attributes:
        equal: Equal codes of each codebook, over the frames that both have.
        frames: How many those are.
        first_difference: The first frame in which any code differs, or that only one has; None if
            all is the same.
    """

    equal: tuple[int, ...]
    frames: int
    first_difference: int | None


def agreement(one: np.ndarray, other: np.ndarray) -> Agreement:
    """Returns the agreement of codes (int [n, C] and [m, C]).

    Raises:
        ValueError: They have different numbers of codebooks.
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise ValueError(
            f"codes must be [n, C] and [m, C], got {list(one.shape)} and {list(other.shape)}"
        )
    frames = min(len(one), len(other))
    same = one[:frames] == other[:frames]
    differing = np.flatnonzero(~same.all(axis=1))
    first: int | None = None
    if differing.size:
        first = int(differing[0])
    elif len(one) != len(other):
        first = frames
    return Agreement(
        equal=tuple(int(count) for count in same.sum(axis=0)), frames=frames, first_difference=first
    )


# --- uncertainty -------------------------------------------------------------------------------


def bootstrap(
    parts: Sequence[float], wholes: Sequence[float], *, seed: int, draws: int = 2_000
) -> tuple[float, float]:
    """Returns the 95 % confidence interval of `sum(parts) / sum(wholes)`, over sentences.

    As many sentences as there are are drawn with replacement, `draws` times; the interval is between the
    2.5th and the 97.5th percentile of the ratios. Of one sentence it is a single value.

    Args:
        parts: Of each sentence, such as its errors.
        wholes: Of each sentence, such as its words.
        seed: Of the draws.
        draws: How many.

    Raises:
        ValueError: There is no sentence, the numbers differ, or the wholes are all 0.
    """
    above, below = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if above.ndim != 1 or above.shape != below.shape or not above.size or not below.any():
        raise ValueError(
            f"a bootstrap needs sentences that hold something, got {above.size} parts and "
            f"{below.size} wholes with a sum of {below.sum():g}"
        )
    rng = np.random.default_rng(seed)
    ratios = []
    while len(ratios) < draws:
        drawn = rng.integers(above.size, size=above.size)
        if whole := below[drawn].sum():  # by chance, all that were drawn may be empty
            ratios.append(above[drawn].sum() / whole)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def wilson(count: int, total: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a share (Wilson's score interval).

    For shares in place of the bootstrap, which takes 200 of 200 for certain; this says 98.1 % and more.

    Raises:
        ValueError: `count` is not between 0 and `total`, or there is nothing.
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"a share needs a count in 0..total, got {count} of {total}")
    share, z = count / total, _Z
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
