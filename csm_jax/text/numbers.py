"""Numbers as words, from Unicode's own rules (CLDR, through the package `unicode-rbnf`)."""

from __future__ import annotations

import functools
from typing import Any

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LONGEST = 15  # digits; CLDR's rules end at 10^18, and nobody can follow more


@functools.cache
def _engine(language: str) -> Any:
    from unicode_rbnf import RbnfEngine

    return RbnfEngine.for_language(language)


@functools.cache
def supported_languages() -> frozenset[str]:
    """Returns the codes of the languages that have number words, such as `de` and `de_CH`."""
    from unicode_rbnf import RbnfEngine

    return frozenset(RbnfEngine.get_supported_languages())


def cardinal(digits: str, language: str) -> str | None:
    """Returns a whole number in words, or None where the language has none for it.

    Args:
        digits: ASCII digits, without separators.
        language: One of `supported_languages()`.
    """
    if len(digits) > _LONGEST:
        return None
    return _format(int(digits), language, "CARDINAL")


@functools.lru_cache(maxsize=4096)
def _format(number: int, language: str, purpose: str) -> str | None:
    from unicode_rbnf import FormatPurpose
    from unicode_rbnf.engine import RbnfError

    try:
        text = _engine(language).format_number(number, FormatPurpose[purpose]).text
    except RbnfError:  # a number that the language's rules do not reach
        return None
    # Soft hyphens mark where a long word may be broken.
    return text.replace("\u00ad", "").strip() or None


# --- English -----------------------------------------------------------------------------------


def spell(digits: str) -> str:
    """Returns English digits one by one: "two zero six"."""
    return " ".join(_DIGITS[int(digit)] for digit in digits)


def number(digits: str) -> str:
    """Returns English words for a whole or decimal number with or without thousands separators.

    Leading zeros and numbers too long to follow are said digit by digit.
    """
    whole, point, decimals = digits.replace(",", "").partition(".")
    if not whole:
        whole = "0"
    said = spell(whole) if len(whole) > 1 and whole[0] == "0" else cardinal(whole, "en")
    said = said or spell(whole)
    return f"{said} point {spell(decimals)}" if point and decimals else said


def ordinal(digits: str) -> str:
    """Returns the English ordinal: "twenty-second"."""
    digits = digits.replace(",", "").lstrip("0") or "0"
    said = _format(int(digits), "en", "ORDINAL") if len(digits) <= _LONGEST else None
    return said or f"{spell(digits)}th"


def year(digits: str) -> str:
    """Returns a year as it is said: "nineteen eighty-four", "two thousand five"."""
    said = _format(int(digits), "en", "YEAR") if len(digits) <= 4 else None
    return (said or number(digits)).replace("oh-", "oh ")


def pairs(digits: str) -> str:
    """Returns up to four digits as in house numbers and type numbers: "two twenty-one"."""
    if len(digits) == 4 and digits[0] != "0":
        return year(digits)
    if len(digits) == 3 and digits[0] != "0" and digits[1:] != "00":
        rest = f"oh {spell(digits[2])}" if digits[1] == "0" else number(digits[1:])
        return f"{spell(digits[0])} {rest}"
    return number(digits) if len(digits) <= 3 and digits[0] != "0" else spell(digits)


def plural(words: str) -> str:
    """Returns number words in the plural: "nineteen nineties", "twenties"."""
    if words.endswith("y"):
        return f"{words[:-1]}ies"
    return f"{words}es" if words.endswith(("x", "s")) else f"{words}s"


_ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
_ROMAN_PARTS = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


def roman(letters: str) -> int | None:
    """Returns the value of a Roman numeral in its one correct spelling, else None."""
    letters = letters.upper()
    values = [_ROMAN[letter] for letter in letters]
    total = sum(
        -value if value < max(values[index:]) else value for index, value in enumerate(values)
    )
    rest, spelled = total, ""
    for value, part in _ROMAN_PARTS:
        count, rest = divmod(rest, value) if rest > 0 else (0, rest)
        spelled += part * count
    return total if spelled == letters else None
