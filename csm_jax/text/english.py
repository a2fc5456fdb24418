"""English as it is said: `RULES`, applied one after the other, each to the whole text.

The order carries meaning. What has digits or full stops inside (addresses, telephone numbers,
dates, times, amounts) comes before the abbreviations, those before plain numbers, and single signs
last. A rule matches only what it can read; everything else is left for the rules after it, and in
the end left alone. What a rule says stands in this file too, long as it is: the two are read together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from csm_jax.text import english_words as words
from csm_jax.text import numbers
from csm_jax.text.numbers import number, ordinal, pairs, plural, spell, year

_Match = re.Match[str]


class Rule(NamedTuple):
    """One rewriting: what it is called, what it matches, what it says instead."""

    name: str
    pattern: re.Pattern[str]
    say: str | Callable[[_Match], str]

    def __call__(self, text: str) -> str:
        """Returns `text` with every match rewritten."""
        return self.pattern.sub(self.say, text)


def _any(strings: Iterable[str]) -> str:
    return "|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True))


# A number with correct thousands separators or none, and where it may begin and end.
_N = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(?:\.[0-9]{1,30})?"
_BEGIN = r"(?<![\w.])(?<![0-9],)"
_END = r"(?!\w)(?![.,:/][0-9])"
_SPEAKABLE = r"thousand|million|billion|trillion|hundred"
_MERIDIEM = r"(?:([AaPp])\.[ ]?[Mm]\.|([AaPp])[Mm]\b)"
_MONTH = _any([*words.MONTHS, *words.MONTH_NAMES])
_SIGNS = _any(sign for sign in words.CURRENCIES if not sign.isalpha())
_CODES = _any(sign for sign in words.CURRENCIES if sign.isalpha())


def _rule(name: str, pattern: str, say: str | Callable[[_Match], str], flags: int = 0) -> Rule:
    return Rule(name, re.compile(pattern, flags), say)


# After a time, a zone or a day goes on with the sentence.
_SENTENCE_START = re.compile(
    r"[\"']?(?:\s*$|\n|\s+(?!(?:[ECMP][SD]?T|GMT|UTC|CET|BST|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day)\b)"
    r"[\"']?[A-Z])"
)


def _stop(match: _Match) -> str:
    # The full stop of an abbreviation is the sentence's as well at an end, or before a capital.
    if not match[0].endswith("."):
        return ""
    return _sentence_stop(match)


def _sentence_stop(match: _Match) -> str:
    rest = match.string[match.end() : match.end() + 40]
    return "." if _SENTENCE_START.match(rest) else ""


# --- addresses on the net ----------------------------------------------------------------------

_NET_SIGNS = {
    ".": "dot", "/": "slash", "-": "dash", "_": "underscore", ":": "colon", "?": "question mark",
    "=": "equals", "&": "and", "#": "hash", "%": "percent", "+": "plus", "~": "tilde", "@": "at",
    ",": "comma", ";": "semicolon", "!": "exclamation mark", "$": "dollar", "*": "star", "'": "",
}  # fmt: skip


def _address(text: str) -> str:
    said = []
    for part in re.findall(r"[^\W\d_]+|[0-9]+|\S", text):
        if part.isascii() and part.isdigit():
            said.append(number(part) if len(part) < 3 and part[0] != "0" else spell(part))
        else:
            said.append(_NET_SIGNS.get(part, part))
    return " ".join(filter(None, said))


def _url(match: _Match) -> str:
    address = match[0]
    ending = re.search(r"[.,;:!?'\"]*$", address)
    tail = ending[0] if ending else ""
    address = address[: len(address) - len(tail)]
    address = re.sub(r"^[a-zA-Z]+://", "", address).rstrip("/")
    return _address(re.sub(r"^www\.", "w w w.", address)) + tail


def _file(match: _Match) -> str:
    return _address(match[0])


# --- digits said one by one --------------------------------------------------------------------


def _telephone(match: _Match) -> str:
    text = match[0]
    said = []
    for group in re.findall(r"[0-9]+|[A-Za-z]+", text):
        if not group.isdigit():
            said.append(group)
        elif group in ("800", "900"):
            said.append(number(group))
        else:
            said.append(spell(group))
    return ("plus " if text.startswith("+") else "") + ", ".join(said)


def _dotted(match: _Match) -> str:
    prefix = "version " if match[1] else ""
    point = " dot " if match[2].count(".") == 3 else " point "
    port = f" colon {pairs(match[3])}" if match[3] else ""
    return prefix + point.join(number(part) for part in match[2].split(".")) + port


# --- dates and times ---------------------------------------------------------------------------


def _month(name: str) -> str:
    return words.MONTHS.get(name, name)


def _day_ok(day: str) -> bool:
    return 1 <= int(day) <= 31


def _iso_date(match: _Match) -> str:
    month, day = int(match[2]), match[3]
    if not (1 <= month <= 12 and _day_ok(day)):
        return match[0]
    return f"{words.MONTH_NAMES[month - 1]} {ordinal(day)}, {year(match[1])}"


def _slash_date(match: _Match) -> str:
    first, second, tail = int(match[1]), int(match[3]), match[4]
    # American, month first, unless only the other order is a date; with full stops, day first.
    month, day = (second, first) if match[2] == "." or first > 12 else (first, second)
    if not (1 <= month <= 12 and 1 <= day <= 31) or (len(tail) == 2 and match[2] == "."):
        return match[0]
    said = year(tail) if len(tail) == 4 else f"{numbers.pairs('20' + tail)}"
    return f"{words.MONTH_NAMES[month - 1]} {ordinal(str(day))}, {said}"


def _month_day(match: _Match) -> str:
    if not _day_ok(match[2]):
        return match[0]
    said = f"{_month(match[1])} {ordinal(match[2])}"
    if match[3]:
        said += f" to {ordinal(match[3])}"
    return f"{said}, {year(match[4])}" if match[4] else said


def _day_month(match: _Match) -> str:
    if not _day_ok(match[2]):
        return match[0]
    the = "" if match[1] else "the "
    said = f"{match[1] or the}{ordinal(match[2])} of {_month(match[3])}"
    return f"{said}, {year(match[4])}" if match[4] else said


def _month_year(match: _Match) -> str:
    return f"{_month(match[1])} {year(match[2])}"


def _decade(match: _Match) -> str:
    digits = match[1]
    return plural(year(digits) if len(digits) == 4 else number(digits))


def _clock(match: _Match) -> str:
    hour, minute, second = match[1], match[2], match[3]
    half = (match[4] or match[5] or "").upper()
    if int(hour) > 24:  # minutes and seconds
        return match[0] if half or second else f"{number(hour)} {number(minute)}"
    stop = _stop(match) if half else ""
    if int(hour) == 0 and not half and not second:
        hour, half = "12", "A"
    said = number(str(int(hour)))
    if minute != "00":
        said += f" oh {spell(minute[1])}" if minute[0] == "0" else f" {number(minute)}"
    elif not half:
        said += " o'clock" if 1 <= int(hour) <= 12 else " hundred"
    if second and second != "00":
        said += f" and {number(str(int(second)))} second{'s' * (second != '01')}"
    if match[6]:
        return f"{said} UTC"
    return f"{said} {half}M{stop}" if half else said


def _hour(match: _Match) -> str:
    half = (match[2] or match[3]).upper()
    return f"{number(match[1])} {half}M{_stop(match)}"


# --- amounts -----------------------------------------------------------------------------------


def _money(sign: str, amount: str, magnitude: str | None) -> str:
    one, many, hundredth, hundredths = words.CURRENCIES[sign]
    if magnitude:
        return f"{number(amount)} {words.MAGNITUDES.get(magnitude, magnitude)} {many}"
    whole, _, part = amount.replace(",", "").partition(".")
    if len(part) == 2 and hundredth:
        cents = f"{number(str(int(part)))} {hundredth if int(part) == 1 else hundredths}"
        if int(part) == 0:
            return f"{number(whole)} {one if int(whole) == 1 else many}"
        if int(whole) == 0:
            return cents
        return f"{number(whole)} {one if int(whole) == 1 else many} and {cents}"
    return f"{number(amount)} {one if amount == '1' else many}"


def _price_after(match: _Match) -> str:
    return _money(match[3], match[1], match[2])


def _unit_words(sign: str, one: bool) -> str:
    if sign in words.UNITS:
        return words.UNITS[sign][0 if one else 1]
    base, power = sign[:-1], sign[-1]
    kind = "square" if power in "²2" else "cubic"
    return f"{kind} {words.UNITS[base][0 if one else 1]}"


def _unit(match: _Match) -> str:
    low, amount, space, sign, per = match[1], match[2], match[3], match[4], match[5]
    refused = words.UNITS_NOT_AFTER_SPACE if space else words.UNITS_NOT_GLUED
    if sign in refused:
        return match[0]
    if sign == "s" and not space and (low or (amount.isdigit() and len(amount) > 2)):
        return match[0]  # 1980-90s, 747s
    said = (f"{number(low)} to " if low else "") + number(amount)
    said += f" {_unit_words(sign, (amount == '1' and not low) or space == '-')}"
    if per:
        said += f" per {_unit_words(per, True)}"
    if match[6]:
        said += _sentence_stop(match) or (
            "." if re.match(r"\s+[0-9]", match.string[match.end() : match.end() + 9]) else ""
        )
    return said


_UNIT = _any(words.UNITS) + "|" + _any(
    base + power for base in ("km", "cm", "mm", "m", "ft", "mi", "in") if base in words.UNITS
    for power in "²³"
)  # fmt: skip
# Longest first across both lists: "m²" before "m".
_UNIT = "|".join(sorted(_UNIT.split("|"), key=len, reverse=True))


def _feet(match: _Match) -> str:
    feet = f"{number(match[1])} {'foot' if match[1] == '1' or match[2] else 'feet'}"
    return f"{feet} {number(match[2])}" if match[2] else feet


def _fraction_words(top: str, bottom: str) -> str:
    one = int(top) == 1
    if bottom == "2":
        part = "half" if one else "halves"
    elif bottom == "4":
        part = "quarter" if one else "quarters"
    else:
        part = ordinal(bottom) if one else f"{ordinal(bottom)}s"
    return f"{number(top)} {part}"


_SPOKEN_BOTTOMS = {
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
    "10",
    "12",
    "16",
    "20",
    "32",
    "64",
    "100",
}


def _fraction(match: _Match) -> str:
    whole, top, bottom = match[1], match[2], match[3]
    proper = bottom in _SPOKEN_BOTTOMS and 0 < int(top) < int(bottom)
    if not proper:
        if f"{top}/{bottom}" in ("24/7", "9/11"):
            said = f"{number(top)} {number(bottom)}"
        else:
            said = f"{number(top)} over {number(bottom)}"
        return f"{number(whole)} {said}" if whole else said
    if not whole:
        return _fraction_words(top, bottom)
    part = _fraction_words(top, bottom)
    return f"{number(whole)} and {part.replace('one ', 'a ', 1) if bottom in '24' else part}"


def _power(exponent: str) -> str:
    if exponent in ("2", "3"):
        return "squared" if exponent == "2" else "cubed"
    sign = "minus " if exponent[0] in "-−" else ""
    return f"to the power of {sign}{number(exponent.lstrip('-−+'))}"


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


# --- names with numbers ------------------------------------------------------------------------


def _regnal(match: _Match) -> str:
    value = numbers.roman(match[3])
    titled = bool(match[1])
    if value is None or (len(match[3]) == 1 and (match[3] not in "VX" and not titled)):
        return match[0]
    return f"{match[1] or ''}{match[2]} the {ordinal(str(value))}"


def _roman(match: _Match) -> str:
    value = numbers.roman(match[2])
    return match[0] if value is None else f"{match[1]}{number(str(value))}"


_SIDES = {"N": "North", "S": "South", "E": "East", "W": "West"}


def _house(match: _Match) -> str:
    letter = f" {match[2]}" if match[2] else ""
    side = f" {_SIDES[match[3][1]]}" if match[3] else ""
    return pairs(match[1]) + letter + side


def _mixed(match: _Match) -> str:
    return _mixed_words(match[0])


def _mixed_words(text: str) -> str:
    parts = re.findall(r"[A-Za-z]+|[0-9]+", text)
    if len(parts) > 3 and len(text) >= 6:
        return " ".join(spell(p) if p.isdigit() else " ".join(p) for p in parts)
    return " ".join(pairs(p) if p.isdigit() else p for p in parts)


# --- abbreviations -----------------------------------------------------------------------------


def _title(match: _Match) -> str:
    return words.TITLES[match[1]]


def _street(match: _Match) -> str:
    return f"{words.STREETS[match[1]]}{_stop(match)}"


def _reference(match: _Match) -> str:
    return words.REFERENCES[match[1]]


def _abbreviation(match: _Match) -> str:
    short = match[1]
    stop = "" if short in words.NEVER_LAST else _stop(match)
    return words.ABBREVIATIONS[short] + stop


def _day(match: _Match) -> str:
    return words.DAYS[match[1]]


# --- plain numbers -----------------------------------------------------------------------------


def _range(match: _Match) -> str:
    low, high = match[1], match[2]
    if len(low) == 4 and low.isdigit() and 1000 < int(low) < 2100 and high.isdigit():
        if len(high) == 2 and int(high) > int(low[2:]):
            return f"{year(low)} to {number(high)}"
        if len(high) == 4:
            return f"{year(low)} to {year(high)}"
    return f"{number(low)} to {number(high)}"


def _year(match: _Match) -> str:
    return match[1] + year(match[2]) + ("'s" if match[3] else "")


def _ordinal(match: _Match) -> str:
    return ordinal(match[1])


def _number(match: _Match) -> str:
    text = match[0]
    if text.isdigit() and len(text) == 4 and "1900" < text < "2100":
        return year(text)
    if text.isdigit() and len(text) >= 8:  # an account, an order: nobody reads it as a quantity
        return spell(text)
    return number(text)


def _sign(match: _Match) -> str:
    return f" {words.SIGNS[match[0]]} "


_TITLED = r"(?:King|Queen|Pope|Emperor|Empress|Tsar|Czar|Prince|Saint|Kaiser|Sultan|Shah)"
_CAPITALISED = r"[A-Z][\w']*"

_FRACTION_UNITS = ("tsp", "tbsp", "Tbsp", "oz", "lb", "lbs", "mi", "gal", "hr", "hrs", "pt", "qt", "yd", "ft", "kg", "km", "cm", "mm")  # fmt: skip

RULES: tuple[Rule, ...] = (
    _rule("vulgar fraction", f"(?<=[0-9]) ?([{''.join(words.FRACTIONS)}])", lambda m: " " + words.FRACTIONS[m[1]]),
    _rule("vulgar fraction alone", f"[{''.join(words.FRACTIONS)}]", lambda m: f" {words.FRACTIONS[m[0]]} "),
    # --- the net
    _rule("e-mail", r"(?<![\w.@])[A-Za-z0-9][\w.+-]{0,63}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,5}", lambda m: _address(m[0])),
    _rule("URL", r"(?<!\w)(?:(?:https?|ftp|ssh|git|file)://|www\.)[^\s<>\"()\[\]{}]{1,2000}", _url, re.IGNORECASE),
    _rule("domain", rf"(?<![\w.@/-])(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?\.){{1,4}}(?:{_any(words.DOMAINS)})(?:/[^\s<>\"()\[\]{{}}]{{0,2000}})?(?![\w@])(?!\.[A-Za-z])", _url),
    _rule("file", rf"(?<![\w.@-])[\w/-]{{1,100}}(?:\.[\w-]{{1,50}}){{0,3}}\.(?:{_any(words.FILES)})(?![\w@])", _file),
    _rule("sharp, plus plus", r"(?<!\w)([A-Za-z])#(?!\w)", r"\1 sharp"),
    _rule("plus plus", r"(?<=[A-Za-z])\+\+(?!\w)", " plus plus"),
    _rule("hashtag", r"(?<!\w)#(?=[^\W\d_])", "hashtag "),
    _rule("number sign", r"(?<!\w)(?:#|№) ?(?=[0-9])", "number "),
    _rule("mention", r"(?<!\w)@(?=\w)", "at "),
    # --- digits in groups
    _rule("ISO date", r"(?<![\w-])([12][0-9]{3})-([01]?[0-9])-([0-3]?[0-9])(?=T?(?![\w-]))", _iso_date),
    _rule("ISO date and time", r"(?<![\w-])([12][0-9]{3})-([01][0-9])-([0-3][0-9])[T](?=[0-2][0-9]:)", lambda m: _iso_date(m) + ", "),
    _rule("date", r"(?<![\w./])([0-3]?[0-9])([/.])([0-3]?[0-9])\2([12][0-9]{3}|[0-9]{2})(?![\w/])(?!\.[0-9])", _slash_date),
    _rule("telephone", r"(?<![\w.+-])(?:\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,4}(?:[ .-]?[0-9]{2,4}){1,4}|(?:1[ .-])?(?:\([0-9]{3}\) ?|[0-9]{3}[.-])[0-9]{3}[ .-][0-9]{4}|1-[89][0-9]{2}-[A-Z0-9][A-Z0-9-]{3,10}|[0-9]{3}-[0-9]{4})(?![\w-])(?!\.[0-9])", _telephone),
    _rule("groups", r"(?<![\w.,-])(?:[0-9]{4}(?:[ -][0-9]{4}){2,4}|[0-9]{3}(?: [0-9]{4}){2}|[0-9]{3}-[0-9]{2}-[0-9]{4}|[0-9]{3,5}(?:-[0-9]{2,5}){2,5}|0[0-9]{2,4}(?: [0-9]{3,4}){2,3}|0[0-9]{2,4}[ /-][0-9]{5,8}|[0-9]{1,3}(?:-[0-9]{1,7}){3,6})(?![\w-])(?!\.[0-9])", _telephone),
    _rule("emergency", r"(?<=[Cc]all |[Dd]ial )([0-9]{3})(?![\w,-])(?!\.[0-9])", lambda m: spell(m[1])),
    _rule("911", r"(?<![\w.,$€£/-])911(?![\w,-])(?!\.[0-9])", spell("911")),
    _rule("hundred hours", r"(?<![\w.,-])(0?)([0-9]{1,2}00)(?= hours\b)", lambda m: f"{'zero ' if m[1] else ''}{pairs(m[2])}"),
    _rule("zip code", r"(?:(?<=\b[A-Z]{2} )|(?<=[Zz]ip )|(?<=[Zz]ip code ))([0-9]{5})(?:-([0-9]{4}))?(?![\w,-])(?!\.[0-9])", lambda m: spell(m[1]) + (", " + spell(m[2]) if m[2] else "")),
    # --- dates
    _rule("month and day", rf"\b({_MONTH})\.? ([0-3]?[0-9])(?:st|nd|rd|th)?(?:-([0-3]?[0-9])(?:st|nd|rd|th)?)?(?:,? ([12][0-9]{{3}}))?{_END}(?!-[0-9])(?!%)", _month_day),
    _rule("day and month", rf"{_BEGIN}(the )?([0-3]?[0-9])(?:st|nd|rd|th)? (?:of )?({_MONTH})\b\.?(?:,? ([12][0-9]{{3}}){_END})?", _day_month),
    _rule("month and year", rf"\b({_MONTH})\.?,? ([12][0-9]{{3}}){_END}(?!-[0-9])", _month_year),
    _rule("decades", r"(?<![\w.,])'?((?:1[0-9]|20)?[0-9]0)'?s\b", _decade),
    _rule("days", rf"\b({_any(words.DAYS)})\.? ?- ?({_any(words.DAYS)})\b\.?", lambda m: f"{words.DAYS[m[1]]} to {words.DAYS[m[2]]}"),
    _rule("day of week and hour", rf"\b({_any(words.DAYS)})\.?(?= [0-9]{{1,2}}(?::[0-9]{{2}})? ?(?:-[0-9]{{1,2}} ?)?[ap]\.?m\b)", _day),
    _rule("day of week", rf"\b({_any(words.DAYS)})\.(?=,? (?:[A-Z0-9]|at\b))", _day),
    _rule("day of week, comma", rf"\b({_any(set(words.DAYS) - {'Sun', 'Sat'})})(?=, ?(?:{_MONTH})\b)", _day),
    # --- times
    _rule("hours after midday mark", r"(?:(?<=[aApP]\.[mM]\.)|(?<=[0-9 ][aApP][mM])) ?- ?(?=[0-9])", " to "),
    _rule("clock to", r"(?<![\w.])([0-9]{1,2}:[0-5][0-9]) ?-(?= ?[0-9])", r"\1 to "),
    _rule("clock", rf"{_BEGIN}([0-9]{{1,2}}):([0-5][0-9])(?::([0-5][0-9]))?(?: ?{_MERIDIEM}|(Z))?(?!\w)(?!:[0-9])", _clock),
    _rule("hour", rf"{_BEGIN}(1[0-2]|[1-9]) ?{_MERIDIEM}(?!\w)", _hour),
    _rule("hours", rf"{_BEGIN}(1[0-2]|[1-9])-(?=(?:1[0-2]|[1-9])(?::[0-5][0-9])? ?[ap]\.?m\b)", lambda m: f"{number(m[1])} to ", re.IGNORECASE),
    _rule("meridiem", r"\b([aApP])\.[mM]\.", lambda m: f"{m[1].upper()}M{_stop(m)}"),
    _rule("time zone", r"\b(UTC|GMT) ?([+−-])(?=[0-9])", lambda m: f"{m[1]} {'plus' if m[2] == '+' else 'minus'} "),
    _rule("ratio", rf"{_BEGIN}([0-9]{{1,3}}):([0-9]{{1,3}}){_END}", lambda m: f"{number(m[1])} to {number(m[2])}"),
    # --- amounts
    _rule("about", rf"[~≈] ?(?=[$£€]?{_N})", "about "),
    _rule("at least", rf"(?<!\S)(?<![\w)] )> ?(?=[$£€]?{_N})", "more than "),
    _rule("below", rf"(?<!\S)(?<![\w)] )< ?(?=[$£€]?{_N})", "less than "),
    _rule("scientific", rf"{_BEGIN}({_N}) ?(?:[×x*·] ?10(?:\^\{{?([-−+]?[0-9]{{1,3}})\}}?|([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{{1,3}}))|[eE]([-−+]?[0-9]{{1,3}}))(?!\w)(?: ?({_UNIT})(?:/({_UNIT}))?(?![\w/]))?", lambda m: f"{number(m[1])} times ten {_power((m[2] or m[3] or m[4]).translate(_SUPERSCRIPTS).lstrip('+'))}" + (f" {_unit_words(m[5], False)}" if m[5] else "") + (f" per {_unit_words(m[6], True)}" if m[6] else "")),
    _rule("model number", r"(?<![\w.-])[A-Za-z]{1,5}[0-9]{1,4}-[0-9]{1,5}[A-Za-z]{0,3}(?![\w-])", lambda m: " ".join(_mixed_words(part) for part in m[0].split("-"))),
    _rule("plural of a model", r"(?<=[A-Za-z]-)([0-9]{1,4})s\b", lambda m: plural(pairs(m[1]))),
    _rule("leading point", r"(?<![\w.)])\.(?=[0-9])", "0."),
    _rule("feet and inches", r"(?<![\w.,])([0-9]{1,3})' ?(?:([0-9]{1,2})(?:\"|(?![\w\"]))|(?=\s|$)(?!\w))", _feet),
    _rule("resolution", r"(?<!\w)([0-9]{3,4}) ?[x×] ?([0-9]{3,4})(?: ?px)?(?!\w)", lambda m: f"{pairs(m[1])} by {pairs(m[2])}"),
    _rule("dimensions", rf"(?<![A-Za-z_])(?!0x)({_N})(?: ?x ?|×)(?={_N}(?![0-9.,]*\^))", lambda m: f"{number(m[1])} by "),
    _rule("product", r"(?<=[0-9]) ?[×·] ?(?=[0-9])", " times "),
    _rule("quotient", r"(?<=[0-9]) / (?=[0-9])", " divided by "),
    _rule("sign", r"(?<![^\s\"',;:(])([-−])(?=(?:[$£€¥]|US\$)?\.?[0-9])", "minus "),
    _rule("plus sign", r"(?<![^\s\"',;:(])\+(?=(?:[$£€¥])?\.?[0-9])", "plus "),
    _rule("price", rf"(?<![\w])({_SIGNS}) ?(?:({_N})-\$?)?({_N})(?:[ -]?({_SPEAKABLE}|bn|mn|tn|mil)\b|([kKmMbBtT])\b)?(?![\w])(?!,[0-9])", lambda m: _price_any(m)),
    _rule("price, code first", rf"\b({_CODES}) ?()({_N})(?: ?({_SPEAKABLE}|bn|mn|tn)\b|([kKmMbBtT])\b)?{_END}", lambda m: _price_any(m)),
    _rule("price, sign last", rf"{_BEGIN}({_N})(?: ?({_SPEAKABLE}|bn|mn))? ?({_any(set('€£$₹¥₩₽'))}|{_CODES})(?![\w$€£])", _price_after),
    _rule("cents", rf"{_BEGIN}({_N}) ?¢", lambda m: f"{number(m[1])} cent{'s' * (m[1] != '1')}"),
    _rule("percent", rf"{_BEGIN}(?:({_N})%?-)?({_N}) ?%(?!\w)", lambda m: (f"{number(m[1])} to " if m[1] else "") + f"{number(m[2])} percent"),
    _rule("inches", rf"{_BEGIN}({_N})\"(?= ?(?:x|by|wide|tall|long|deep|thick|in\b))|{_BEGIN}({_N}) in\.(?! [A-Z])", lambda m: f"{number(m[1] or m[2])} inch{'es' * ((m[1] or m[2]) != '1')}{_stop(m)}"),
    _rule("inch", rf"{_BEGIN}({_N})(?:\"| ?-in\.)(?= (?:screen|pipe|monitor|display|TV|laptop|tablet|diameter|wheel|rim|drive|margin)s?\b)", lambda m: f"{number(m[1])} inch"),
    _rule("mixed fraction", rf"{_BEGIN}(?:([0-9]{{1,6}})[ -])?([0-9]{{1,4}})/([0-9]{{1,4}})(?=[ -]?\w|\W|$)(?![\w])(?!/[0-9])(?!\.[0-9])", _fraction),
    _rule("unit", rf"{_BEGIN}(?:({_N}) ?- ?)?({_N})([ -]?)({_UNIT})(?:(?:/|p)({_UNIT}))?(?![\w²³/])(\.(?=\s|$|[\"',;:]))?", _unit),
    _rule("unit after a fraction", rf"\b(hal(?:f|ves)|quarters?|thirds?|fifths?|sixths?|eighths?)[ -]({_any(_FRACTION_UNITS)})\b\.?", lambda m: f"{m[1]} {_unit_words(m[2], 'and' not in m.string[max(0, m.start() - 12) : m.start()])}"),
    _rule("per, number", r"(?<=[0-9])/(?=(?:day|week|month|year|hour|hr|min|person|night|yr|mo)\b)", " per "),
    _rule("per", r"\b(dollars?|euros?|pounds?|cents?|yen|francs?|rupees?)/([A-Za-z]+)", lambda m: f"{m[1]} per {words.UNITS.get(m[2], (m[2],))[0]}"),
    # --- names with numbers
    _rule("reference", rf"\b({_any(words.REFERENCES)})\. ?\(?(?=[0-9])", lambda m: _reference(m) + " "),
    _rule("reference, Roman", r"\b([Vv]ol|[Cc]h|[Cc]hap|[Ff]ig|[Ss]ec|Art|Tab)\. ?(?=[IVXLC]{1,9}\b)", lambda m: _reference(m) + " "),
    _rule("regnal", rf"\b({_TITLED} )?((?:{_any(words.REGNAL)})) ([IVX]{{1,6}})\b(?!\. [A-Z][a-z]+ )(?!['’]m)", _regnal),
    _rule("Roman", rf"\b((?:(?:World )?War|{_any(n.capitalize() for n in words.ROMAN_AFTER)}|{_any(words.ROMAN_AFTER)}|Part|Act|Super Bowl) )([IVXLC]{{1,9}})\b(?!')", _roman),
    _rule("Roman alone", r"(?<![\w.'])()(II|III|IV|VI|VII|VIII|IX|XI|XII|XIII|XIV|XVI{0,3}|XIX|XX|XXI{1,3})(?!\w|\.\w|['-])", _roman),
    _rule("street", rf"(?<=[a-z0-9] )({_any(set(words.STREETS) - {'Dr', 'St'})})\b\.?(?=,|\.|\s|$)", _street),
    _rule("street after a number", rf"\b([0-9]{{1,5}}[A-Za-z]? (?:[NSEW]\.? )?(?:{_CAPITALISED} |[0-9]{{1,3}}(?:st|nd|rd|th) ){{1,3}}?)({_any(words.STREETS)})\b\.?(?![\w'])", lambda m: f"{m[1]}{words.STREETS[m[2]]}{_stop(m)}"),
    _rule("house", rf"\b([0-9]{{2,5}})([A-Z])?( [NSEW]\b\.?)?(?= (?:(?:{_CAPITALISED}\.?|[0-9]{{1,3}}(?:st|nd|rd|th)) ){{1,3}}(?:{_any(set(words.STREETS.values()))})\b)", _house),
    # --- abbreviations
    _rule("e.g.", r"\b[eE]\. ?g\.,?", lambda m: f"{'F' if m[0][0] == 'E' else 'f'}or example,"),
    _rule("i.e.", r"\b[iI]\. ?e\.,?", lambda m: f"{'T' if m[0][0] == 'I' else 't'}hat is,"),
    _rule("a.k.a.", r"\ba\.?k\.?a\.?(?!\w)", "also known as"),
    _rule("Ph.D.", r"\bPh\. ?D\.", lambda m: f"PhD{_stop(m)}"),
    _rule("P.S.", r"\bP\. ?S\.:?(?=\s)", "P S,"),
    _rule("versus", r"(?<=[\w.] )v\.(?= [A-Z])", "versus"),
    _rule("title", rf"\b({_any(words.TITLES)})\.(?= ?[A-Z](?:[\w'-]|\.)| (?:&|and) M)", _title),
    _rule("title without stop", r"\b(Dr|Mr|Mrs|Ms|Prof|Mt)(?= [A-Z][a-z])", _title),
    _rule("Saint", r"\b(St)(?= (?:John|Paul|Peter|Mary|Louis|George|James|Patrick|Andrew|Francis|Pancras|Thomas|Helena|Lucia)\b)", _title),
    _rule("Street", r"(?<=[a-z0-9] )(St)\.?(?=[,.;]|\s+[a-z]|\s*$|\.\s)", lambda m: f"Street{_stop(m)}"),
    _rule("et al.", r"\bet al\.?(?!\w)", lambda m: f"and others{_stop(m)}"),
    _rule("month", rf"\b({_any(set(words.MONTHS) - {'May'})})\.(?= |,|$)", lambda m: words.MONTHS[m[1]]),
    _rule("with", r"\bw/o\b", "without"),
    _rule("w/", r"\bw/ ?(?=\w)", "with "),
    _rule("and/or", r"\band/or\b", "and or"),
    _rule("abbreviation", rf"\b({_any(set(words.ABBREVIATIONS) - {'w', 'et al'})})\.(?!\w)", _abbreviation),
    _rule("abbreviation without stop", rf"\b({_any(set(words.WITHOUT_STOP))})\b(?!\.)", lambda m: words.ABBREVIATIONS[m[1]]),
    # --- plain numbers
    _rule("versions", r"(?<![\w.])([vV](?:ersion )?)?([0-9]{1,6}(?:\.[0-9]{1,6}){2,6})(?::([0-9]{1,5}))?(?![\w])(?!\.[0-9])", _dotted),
    _rule("version", r"(?<!\w)[vV]\.? ?(?=[0-9])", "version "),
    _rule("factor", rf"{_BEGIN}({_N})[x×](?=\s+[A-Za-z]|[.,;!?]|$)", lambda m: f"{number(m[1])} times"),
    _rule("power", r"(?<=[\w)])\^\{?([-−]?[0-9]{1,6})\}?(?!\w)", lambda m: f" {_power(m[1])}"),
    _rule("power of a letter", r"(?<=[\w)])\^\{?([A-Za-z])\}?(?!\w)", r" to the power of \1"),
    _rule("superscript", r"(?<![A-Za-z])([0-9]{0,9}[A-Za-z]?)(⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,6})", lambda m: f"{m[1]} {_power(m[2].translate(_SUPERSCRIPTS))} " if m[1] else m[0]),
    _rule("subscript", r"[₀₁₂₃₄₅₆₇₈₉]{1,30}", lambda m: f" {spell(m[0].translate(_SUBSCRIPTS))} "),
    _rule("ordinal", rf"{_BEGIN}((?:[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,15}}))-?(?:st|nd|rd|th|ST|ND|RD|TH)\b", _ordinal),
    _rule("minus after a power", r"(?:(?<=squared)|(?<=cubed)) ?[-−] ?(?=[0-9A-Za-z(])", " minus "),
    _rule("minus between", r"(?<=[0-9)]) [-−] (?=[0-9(][^.!?\n]{0,60}=)|(?<=[0-9]) ?− ?(?=[0-9])", " minus "),
    _rule("range", rf"{_BEGIN}({_N}) ?- ?({_N})(?!-[0-9]){_END}", _range),
    _rule("year", rf"(?i:\b(in |since |by |from |until |till |to |of |year |before |after |circa |around |during |early |late |mid-|the |copyright |and |, ))(1[1-9][0-9]{{2}}|20[0-9]{{2}})('s)?{_END}(?!-)(?! (?:people|percent|of|times|{_SPEAKABLE})\b)", _year),
    _rule("World War", r"\bWW ?(II|I|1|2)\b", lambda m: f"World War {'two' if m[1] in 'II2' and m[1] != 'I' else 'one'}"),
    _rule("HTTP/2", r"(?<=[A-Z])/(?=[0-9])", " "),
    _rule("letters", r"(?<=[A-Za-z])-(?=[0-9])|(?<=[0-9])-(?=[A-Za-z])", " "),
    _rule("thousands", rf"{_BEGIN}({_N})k\b", lambda m: f"{number(m[1])} thousand"),
    _rule("K", rf"{_BEGIN}({_N})K\b", lambda m: f"{number(m[1])} K"),  # a 10K run, 4K video
    _rule("more", rf"{_BEGIN}({_N})\+(?!\w)", lambda m: f"{number(m[1])} plus"),
    _rule("plural", r"(?<![\w.,])([0-9]{1,4})'?s\b", lambda m: plural(pairs(m[1]))),
    _rule("decimal before letters", r"(?<![\w.])([0-9]{1,30}\.[0-9]{1,30})(?=[A-Za-z])", lambda m: number(m[1]) + " "),
    _rule("mixed", r"(?<![\w.])(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{2,40}(?!\w)", _mixed),
    _rule("number", rf"(?<![^\W_])(?<![0-9][.,]){_N}(?![^\W_])", _number),
    _rule("digits left", r"(?<![^\W_])[0-9]+(?![^\W_])", lambda m: number(m[0]) if len(m[0]) < 8 else spell(m[0])),
    # --- single signs
    _rule("identifier", r"(?<=[A-Za-z])_+(?=[A-Za-z])", " "),
    _rule("and", r"\s*&+\s*", " and "),
    _rule("equals", r"(?<=[\w)!']) ?={1,3} ?(?=[\w(+−-])", " equals "),
    _rule("comparisons", r" (<=|>=|!=|->|=>) ", lambda m: " " + {"<=": words.SIGNS["≤"], ">=": words.SIGNS["≥"], "!=": words.SIGNS["≠"], "->": "to", "=>": "gives"}[m[1]] + " "),
    _rule("greater", r"(?<=\w) ?> ?(?=\w)", " is greater than "),
    _rule("less", r"(?<=\w) ?< ?(?=\w)", " is less than "),
    _rule("plus", r"(?<=\w) ?\+ ?(?=\w)", " plus "),
    _rule("plus after", r"(?<=[A-Za-z])\+(?=[\s,.;!?]|$)", " plus"),
    _rule("times", r"(?<=\w) ?\* ?(?=\w)", " times "),
    _rule("asterisk", r"(?<=\S)\*+(?!\w)|(?<!\w)\*+(?=\w)", ""),
    _rule("at", r" @ ", " at "),
    _rule("slash", r"(?<=\w) ?/ ?(?=\w)", " slash "),
    _rule("bar", r" ?\|+ ?", ", "),
    _rule("percent alone", r"(?<=[a-z]) ?%(?!\w)", " percent"),
    _rule("degrees", r" ?° ?", " degrees "),
    _rule("signs", _any(words.SIGNS), _sign),
)  # fmt: skip


def _price_any(match: _Match) -> str:
    low, magnitude = match[2], match[4] or match[5]
    return (f"{number(low)} to " if low else "") + _money(match[1], match[3], magnitude)


_LOVE = re.compile(r"(?<=[A-Za-z] )[❤♥]\ufe0f?(?= [A-Za-z])")
_SMALL_START = re.compile(
    r"(?:^|(?<=\n)|(?<=[\w\"'][\w\"'][.!?] ))(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|"
    r"twelve|\w{3,5}teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|minus|plus|version|number)\b"
)


def love(text: str) -> str:
    """Returns `text` with a heart between words as the word; other emoji are no words."""
    return _LOVE.sub("love", text)


def say(text: str) -> str:
    """Returns English `text` with every rule applied once, in order."""
    for rule in RULES:
        text = rule(text)
    return _SMALL_START.sub(lambda start: start[0].capitalize(), text)
