"""Writes text the way it is said, so that the model reads words and not signs.

In this order: characters, Markdown, the language's rules, emoji, lines, brackets and dashes, spaces.
The whole is repeated until nothing changes, so that a text already normalised stays as it is.
"""

from __future__ import annotations

import re

from csm_jax.text import characters, english, numbers

_PASSES = 8
_WORD = re.compile(r"\w")
# Whole numbers that stand alone. Separators and "3." differ by language and are left alone.
_DIGITS = re.compile(
    r"(?<![0-9])(?<![0-9][.,:/'’-])(?<![A-Za-z])[0-9]+(?![0-9]|[.,:/'’-][0-9]|\.(?:\s|$))(?![A-Za-z%°])"
)
_UNSPACED = ("zh", "ja", "yue", "th", "lo", "km", "my")


def languages() -> tuple[str, ...]:
    """Returns the values that `normalise` takes as `language`."""
    return tuple(sorted(numbers.supported_languages()))


def _language(language: str) -> str:
    known = numbers.supported_languages()
    code = language.replace("-", "_")
    base = code.partition("_")[0].lower()
    if base == "en":
        return "en"
    for candidate in (code, base):
        if candidate in known:
            return candidate
    raise ValueError(
        f"language must be one of {', '.join(languages())}, got {language!r}; "
        "or leave the text as it is"
    )


def normalise(text: str, *, language: str = "en") -> str:
    """Returns `text` as it is said: numbers, signs and abbreviations as words, brackets as commas.

    English has rules of its own: `csm_jax.text.english.RULES`, American where usages differ
    (`3/4/2024` is a day in March). In other languages whole numbers become words and only
    characters, brackets, dashes, emoji and white space are cleaned besides. What no rule can read
    stays as it is. Emoji, the numbers of footnotes (`word[3]`) and link targets in Markdown are
    left out; a text of nothing but emoji is said by their names. Paragraphs stay apart by a blank line.
    Normalising twice changes nothing.

    Args:
        text: Any text that `csm_jax.prompt.check_text` accepts.
        language: `languages()` lists them; a region as in `de-AT` may follow.

    Raises:
        ValueError: The language is not known.
    """
    language = _language(language)
    for _ in range(_PASSES):
        said = _once(text, language)
        if said == text:
            break
        text = said
    return text


def _once(text: str, language: str) -> str:
    clean = characters.characters(text)
    said = characters.markup(clean)
    if language == "en":
        said = english.say(characters.lines(characters.without_emoji(english.love(said))))
    else:
        said = characters.lines(characters.without_emoji(said))
        said = _DIGITS.sub(lambda digits: _cardinal(digits[0], language), said)
    said = characters.tidy(characters.pauses(said))
    if _WORD.search(said):
        return said
    # Marks without a word: only emoji can be said.
    return characters.emoji_names(clean) or text


def _cardinal(digits: str, language: str) -> str:
    if len(digits) > 1 and digits[0] == "0":
        return digits
    return numbers.cardinal(digits, language) or digits
