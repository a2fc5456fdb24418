"""What a small-vocabulary recogniser expects: a language model and a dictionary, made from sentences.

Both models are ARPA back-off n-grams, the form that recognisers read. `bigram` knows which words follow
which in the sentences it was made from, so it forgives an unclear word (lenient); `unigram` finds all
words equally likely anywhere, so only the sound counts (strict).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

START, END = "<s>", "</s>"

_DISCOUNT = 0.5  # of absolute discounting: taken from every bigram seen, given to all words
_NEVER = -99.0  # ARPA's way to write the logarithm of 0
_VARIANT = re.compile(r"\(\d+\)$")

Pronunciations = Mapping[str, Sequence[str]]
"""By word, its pronunciations, each as phones between spaces."""


def bigram(sentences: Iterable[Sequence[str]]) -> str:
    """Returns a bigram model of sentences in the ARPA format.

    Absolute discounting, interpolated with the words' own frequencies: after every word, all words of
    the sentences are possible, and the probabilities add up to 1.

    Raises:
        ValueError: There is no word in them, or none that follows another.
    """
    singles: Counter[str] = Counter()
    pairs: dict[str, Counter[str]] = {}
    for sentence in sentences:
        if not sentence:
            continue
        singles.update([*sentence, END])
        for before, after in zip([START, *sentence], [*sentence, END], strict=True):
            pairs.setdefault(before, Counter())[after] += 1
    if not singles:
        raise ValueError("a language model needs sentences with words in them; there is none")
    if all(set(after) == {END} for before, after in pairs.items() if before != START):
        raise ValueError(
            "a bigram model needs sentences of several words; these are single words, of which it would "
            "learn that nothing follows any: give sentences, or take a unigram model"
        )
    total = singles.total()
    alone = {word: count / total for word, count in singles.items()}
    # What discounting leaves to the words' own frequencies, after each word.
    left = {
        before: _DISCOUNT * len(after) / after.total() for before, after in sorted(pairs.items())
    }
    ones = [_line(_NEVER, START, math.log10(left[START]))]
    for word in sorted(alone):
        # Nothing comes after the end, and its line has no weight to fall back with.
        ones.append(
            _line(math.log10(alone[word]), word, None if word == END else math.log10(left[word]))
        )
    twos = [
        _line(
            math.log10(
                (count - _DISCOUNT) / after.total() + left[before] * alone[word],
            ),
            f"{before} {word}",
            None,
        )
        for before, after in sorted(pairs.items())
        for word, count in sorted(after.items())
    ]
    return _arpa(ones, twos)


def unigram(words: Iterable[str]) -> str:
    """Returns a model of equally likely words, and end of the sentence, in the ARPA format.

    Raises:
        ValueError: There is no word.
    """
    known = sorted({*words})
    if not known:
        raise ValueError("a language model needs words; there is none")
    each = -math.log10(len(known) + 1)
    ones = [_line(_NEVER, START, 0.0), _line(each, END, None)]
    return _arpa([*ones, *(_line(each, word, 0.0) for word in known)])


def _line(log: float, words: str, weight: float | None) -> str:
    return f"{log:.6f}\t{words}" + ("" if weight is None else f"\t{weight:.6f}")


def _arpa(*orders: Sequence[str]) -> str:
    counts = "\n".join(f"ngram {n}={len(lines)}" for n, lines in enumerate(orders, start=1))
    tables = "\n\n".join(
        "\n".join([f"\\{n}-grams:", *lines]) for n, lines in enumerate(orders, start=1)
    )
    return f"\\data\\\n{counts}\n\n{tables}\n\n\\end\\\n"


# --- pronunciations ----------------------------------------------------------------------------


def read_pronunciations(path: Path) -> dict[str, list[str]]:
    """Returns a pronunciation dictionary: a word and its phones on every line, in CMUdict's form.

    Further pronunciations of a word stand as `word(2)`. Lines that begin with `;;;` or `#` are comments.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line has no phones, or the file is not UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no pronunciations at {path}")
    found: dict[str, list[str]] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            word, *phones = line.split() or [""]
            if not word or word.startswith((";;;", "#")):
                continue
            if not phones:
                raise ValueError(f"line {number} has no phones: {line.strip()!r}")
            found.setdefault(_VARIANT.sub("", word).lower(), []).append(" ".join(phones))
    except ValueError as error:
        raise ValueError(f"{path} is no pronunciation dictionary: {error}") from error
    return found


def dictionary(words: Iterable[str], *sources: Pronunciations) -> str:
    """Returns the part of pronunciation dictionaries that has these words.

    Args:
        words: All that can be heard.
        sources: Dictionaries; a word's pronunciations come from the first that has it.

    Raises:
        ValueError: Words have no pronunciation; all are listed.
    """
    lines, missing = [], []
    for word in sorted({*words}):
        found = next((source[word] for source in sources if word in source), None)
        if found is None:
            missing.append(word)
            continue
        for number, phones in enumerate(found, start=1):
            lines.append(f"{word} {phones}" if number == 1 else f"{word}({number}) {phones}")
    if missing:
        raise ValueError(
            f"{len(missing)} words have no pronunciation in the recogniser's dictionary: "
            f"{', '.join(missing)}; write them into a file, one a line as in `csm S IY EH S EH M`, and "
            "give it with --pronunciations"
        )
    return "\n".join(lines) + "\n"
