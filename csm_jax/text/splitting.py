"""Cuts a long text into pieces to be spoken one after the other.

At paragraphs, then where sentences end, then at commas and the like, then between words. A full stop
ends no sentence after an abbreviation, an initial or an item's number, nor before a small letter:
two sentences in one piece sound right, half a sentence does not.

Rules of our own rather than a package's: where a text is cut decides what is heard, so it must
change with this package's version only.
"""

from __future__ import annotations

import bisect
import operator
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from csm_jax.text import english_words as words

DEFAULT_MAX_CHARACTERS = 240
"""About 16 s of speech at 15 characters a second, 200 frames: CSM learned from turns of conversation,
not pages, and two such pieces still fit before a third as its context."""

SENTENCE_PAUSE_MS = 350
CLAUSE_PAUSE_MS = 150
PARAGRAPH_PAUSE_MS = 800
"""Silent pauses in speech are brief (below 200 ms), medium (to 1,000 ms) or long (Campione and
Véronis, Speech Prosody 2002): one at a comma, one at a full stop, a long one between paragraphs, less
what the model itself leaves at the end of a piece."""

LEAST_MAX_CHARACTERS = 10


@dataclass(frozen=True)
class Chunk:
    """A piece to be spoken in one go.

    Attributes:
        text: What is said, with single spaces.
        pause_ms: The silence that follows; 0 between words of a cut sentence and at the end.
    """

    text: str
    pause_ms: int


# --- sentences ---------------------------------------------------------------------------------

_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*|\u2029")
_CLOSING = "\"'”’»)\\]}"
_CJK_CLOSING = "」』”’）】》\"'"
# Marks that need a space after them, and those that end a sentence anywhere.
_ENDS = re.compile(
    rf"(?<![.!?…])(?P<mark>[.!?…]++)(?P<quote>[{_CLOSING}]*+)(?=\s)"
    rf"|[。！？｡．।॥؟۔።]+[。！？…]*[{_CJK_CLOSING}]*"
)
_LAST_WORD = re.compile(r"\S{1,60}$")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_ITEM = re.compile(r"\(?(?:[0-9]{1,3}|[A-Za-z]|[ivxIVX]{1,4})")

_NEVER_LAST = (
    frozenset(word.lower() for word in words.TITLES)
    | frozenset(word.lower() for word in words.NEVER_LAST)
    | {
        "e.g",
        "i.e",
        "v",
        "mssrs",
        "sr",
        "sra",
        "srta",
        "z.b",
        "d.h",
        "bzw",
        "hr",
        "fr",
        "mme",
        "mlle",
    }
)
_BEFORE_NUMBERS = frozenset(words.REFERENCES) | frozenset(words.MONTHS) - {"May"}
_MAYBE_LAST = frozenset(word.lower() for word in words.ABBREVIATIONS) | {"m.d", "ph.d", "usw"}
_OPENERS = [
    "A",
    "After",
    "Although",
    "An",
    "And",
    "Another",
    "Are",
    "As",
    "At",
    "Because",
    "Before",
    "But",
    "By",
    "Can",
    "Could",
    "Did",
    "Do",
    "Does",
    "Even",
    "Every",
    "For",
    "From",
    "Had",
    "Has",
    "Have",
    "He",
    "Her",
    "Here",
    "His",
    "How",
    "However",
    "I",
    "I'd",
    "I'll",
    "I'm",
    "I've",
    "If",
    "In",
    "Is",
    "It",
    "It's",
    "Its",
    "Just",
    "Let",
    "Maybe",
    "Meanwhile",
    "More",
    "Most",
    "Much",
    "My",
    "No",
    "Nobody",
    "Not",
    "Nothing",
    "Now",
    "Of",
    "On",
    "Once",
    "One",
    "Only",
    "Or",
    "Our",
    "Perhaps",
    "Please",
    "She",
    "Should",
    "Since",
    "So",
    "Some",
    "Sometimes",
    "Still",
    "That",
    "That's",
    "The",
    "Their",
    "Then",
    "There",
    "These",
    "They",
    "They're",
    "This",
    "Those",
    "Though",
    "To",
    "Today",
    "Until",
    "Was",
    "We",
    "We're",
    "We've",
    "Were",
    "What",
    "When",
    "Where",
    "Which",
    "While",
    "Who",
    "Why",
    "Will",
    "With",
    "Would",
    "Yes",
    "Yet",
    "You",
    "You're",
    "Your",
]


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    mark = match["mark"]
    if mark is None:
        return True
    following = text[match.end() : match.end() + 60].lstrip()
    if not following:
        return False  # the end of the paragraph needs no cut
    first = following.lstrip("\"'“‘«([{¿¡")[:1]
    if first.islower():
        return False
    if mark != ".":
        return True
    before = _LAST_WORD.search(text, max(0, match.start() - 60), match.start())
    word = before[0].lstrip("\"'“‘«([{") if before else ""
    if match["quote"] and word:
        return True
    # "1." or "b." where a sentence begins is the number of what follows.
    if before and before.start() <= start + 1 and _ITEM.fullmatch(word):
        return False
    if word.lower() in _NEVER_LAST:
        return False
    if word in _BEFORE_NUMBERS and first.isdigit():
        return False
    single = len(word) == 1 and word.isalpha()
    if single or word.lower() in _MAYBE_LAST or _INITIALS.fullmatch(word):
        if word == "etc":
            return True
        opener = re.match(r"[\w']+", following.lstrip("\"'“‘«([{"))
        return bool(opener) and opener[0].replace("’", "'") in _OPENERS
    return True


def _spans(paragraph: str) -> list[str]:
    found, start = [], 0
    for match in _ENDS.finditer(paragraph):
        if _ends_sentence(paragraph, start, match):
            found.append(paragraph[start : match.end()].strip())
            start = match.end()
    found.append(paragraph[start:].strip())
    return [sentence for sentence in found if sentence]


def _paragraphs(text: str) -> list[str]:
    joined = (" ".join(paragraph.split()) for paragraph in _PARAGRAPHS.split(text))
    return [paragraph for paragraph in joined if paragraph]


def sentences(text: str) -> list[str]:
    """Returns the sentences of `text` in order, with single spaces; a blank line ends one as well."""
    return [sentence for paragraph in _paragraphs(text) for sentence in _spans(paragraph)]


# --- chunks ------------------------------------------------------------------------------------

_CLAUSES = re.compile(
    rf"(?<=[,;:.!?…—–])[{_CLOSING}]*+\s+|\s+(?=[—–-]\s)|(?<=[，、；：。！？，])(?![{_CJK_CLOSING}\s，、；：。！？])"
)


def chunks(text: str, *, max_characters: int = DEFAULT_MAX_CHARACTERS) -> list[Chunk]:
    """Returns `text` in pieces of at most `max_characters`, of about equal length in a paragraph.

    Joined, the pieces give the text back up to white space. Words stay whole unless one is longer
    than a piece; writing without spaces is cut between characters where it has no marks.

    Args:
        text: The text; normalise it first, since words are longer than digits.
        max_characters: The most characters of a piece, at least 10.

    Raises:
        TypeError: `max_characters` is not an integer.
        ValueError: It is less than 10.
    """
    limit = operator.index(max_characters)
    if limit < LEAST_MAX_CHARACTERS:
        raise ValueError(f"max_characters must be at least {LEAST_MAX_CHARACTERS}, got {limit}")
    made: list[Chunk] = []
    for paragraph in _paragraphs(text):
        made += _paragraph_chunks(paragraph, limit)
        made[-1] = Chunk(made[-1].text, PARAGRAPH_PAUSE_MS)
    if made:
        made[-1] = Chunk(made[-1].text, 0)
    return made


def _paragraph_chunks(paragraph: str, limit: int) -> Iterator[Chunk]:
    run: list[str] = []
    for sentence in _spans(paragraph):
        if len(sentence) <= limit:
            run.append(sentence)
            continue
        yield from _sentence_chunks(run, limit)
        run = []
        yield from _cut_sentence(sentence, limit)
    yield from _sentence_chunks(run, limit)


def _sentence_chunks(run: Sequence[str], limit: int) -> Iterator[Chunk]:
    for piece in _pack(run, limit):
        yield Chunk(piece, SENTENCE_PAUSE_MS)


def _cut_sentence(sentence: str, limit: int) -> Iterator[Chunk]:
    clauses = _split_at(_CLAUSES, sentence)
    run: list[str] = []
    made: list[Chunk] = []
    for clause in clauses:
        if len(clause) <= limit:
            run.append(clause)
            continue
        made += [Chunk(piece, CLAUSE_PAUSE_MS) for piece in _pack(run, limit)]
        run = []
        parts = [part for word in clause.split(" ") for part in _cut_word(word, limit)]
        made += [Chunk(piece, 0) for piece in _pack(parts, limit)]
        made[-1] = Chunk(made[-1].text, CLAUSE_PAUSE_MS)
    made += [Chunk(piece, CLAUSE_PAUSE_MS) for piece in _pack(run, limit)]
    made[-1] = Chunk(made[-1].text, SENTENCE_PAUSE_MS)
    yield from made


def _split_at(pattern: re.Pattern[str], text: str) -> list[str]:
    found, start = [], 0
    for match in pattern.finditer(text):
        found.append(text[start : match.end()].strip())
        start = match.end()
    found.append(text[start:].strip())
    return [part for part in found if part]


def _cut_word(word: str, limit: int) -> Iterator[str]:
    # A letter and its accents and joiners stay together, while they fit.
    while len(word) > limit:
        at = limit
        while at > limit // 2 and (
            unicodedata.category(word[at])[0] == "M" or "\u200d" in word[at - 1 : at + 1]
        ):
            at -= 1
        yield word[:at]
        word = word[at:]
    yield word


def _join(left: str, right: str) -> str:
    space = "" if _unspaced(left[-1]) and not right[0].isascii() else " "
    return f"{left}{space}{right}"


def _unspaced(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _pack(parts: Sequence[str], limit: int) -> list[str]:
    """Returns neighbours joined into as few pieces as the limit allows, the longest piece of which is
    as short as possible, so that no scrap is left at the end.
    """
    if not parts:
        return []
    fewest = len(_fill(parts, limit))
    low = max(map(len, parts))
    tightest = bisect.bisect_left(
        range(low, limit), True, key=lambda size: len(_fill(parts, size)) <= fewest
    )
    return _fill(parts, low + tightest)


def _fill(parts: Sequence[str], limit: int) -> list[str]:
    pieces = [parts[0]]
    for part in parts[1:]:
        joined = _join(pieces[-1], part)
        if len(joined) <= limit:
            pieces[-1] = joined
        else:
            pieces.append(part)
    return pieces
