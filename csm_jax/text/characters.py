"""Cleaning that is the same for every language: characters, markup, brackets, lists, lines.

What has no sound goes (invisible characters, emoji, Markdown's marks); what is a pause becomes a
comma or a full stop (brackets, dashes, line ends of a list). Square brackets must not stay: CSM's
prompt marks its speakers with `[0]`.
"""

from __future__ import annotations

import re
import unicodedata

# How the Unicode database tags what is a letter or digit in disguise: ﬁ, 𝐇, Ａ, ㎏, ①, no-break space.
_DISGUISES = ("<font>", "<wide>", "<compat>", "<square>", "<circle>", "<noBreak>")
_CJK_BRACKETS = "（）【】〔〕［］｛｝"

_EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u231a-\u231b\u23e9-\u23fa\u3030\u303d\u3297\u3299"
    "\ufe0e\ufe0f\u20e3™®]|[\U000e0020-\U000e007f]+"
)
_EMOTICON = re.compile(
    r"(?<!\S)(?:[<>]?[:;=8xX]['’]?[-o^]?[()\[\]DPp3|/\\*](?:[()]*)|<3+|\^_*\^|-_+-|¯\\_\(ツ\)_/¯)"
    r"(?=[\s.,!?]|$)"
)
_NOT_NAMED = re.compile(r"MODIFIER|SELECTOR|JOINER|REGIONAL|COMBINING|^TAG |^CANCEL TAG")

_SAME_FOR_ALL = str.maketrans(
    {
        **dict.fromkeys("“”„‟«»〝〞＂", '"'),
        **dict.fromkeys("‘’‚‛‹›＇ʼ", "'"),
        **dict.fromkeys("‐‑﹣－", "-"),
        **dict.fromkeys("―⸺⸻", "—"),
        "…": "...",
        "⁄": "/",
        "\t": " ",
        "\u2028": "\n",
        "\u2029": "\n\n",
    }
)


# Between numbers, hours or days, with no space: a range, read as one by the language's rules.
_RANGE_DASH = re.compile(r"(?<=[\w%°.])[–‒](?=[$£€]?\w)|(?<=[0-9%°])[ ]?[–‒][ ]?(?=[$£€]?[0-9])")


def characters(text: str) -> str:
    """Returns `text` with plain letters, digits, quotes, hyphens and spaces."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _RANGE_DASH.sub("-", text.translate(_SAME_FOR_ALL))
    if text.isascii():
        return text
    plain = []
    for index, character in enumerate(text):
        category = unicodedata.category(character)
        if category == "Zs":
            plain.append(" ")
        elif category == "Nd":  # ٣ and ３ are 3
            plain.append(str(unicodedata.decimal(character)))
        elif category == "Cf":
            # Joiners shape letters in some scripts; tags belong to an emoji, removed with it.
            around = text[index - 1 : index] + text[index + 1 : index + 2]
            joins = character in "\u200c\u200d" and len(around) == 2 and around.isalpha()
            if (joins and not around.isascii()) or "\U000e0020" <= character <= "\U000e007f":
                plain.append(character)
        else:
            plain.append(_undisguise(character))
    return unicodedata.normalize("NFC", "".join(plain))


def _undisguise(character: str) -> str:
    if not unicodedata.decomposition(character).startswith(_DISGUISES):
        return character
    simple = unicodedata.normalize("NFKC", character)
    if not simple[0].isalnum() and not simple.startswith("°"):
        return character  # full-width punctuation is right where it stands
    # A number or unit sign would run into its neighbours: ①, №.
    sign = not unicodedata.category(character).startswith("L")
    return f" {simple} " if sign and len(simple) == 1 else simple


def without_emoji(text: str) -> str:
    """Returns `text` without emoji and emoticons, which show a mood and are not read aloud."""
    return _EMOJI.sub(" ", _EMOTICON.sub(" ", text))


def emoji_names(text: str) -> str:
    """Returns the names of the signs in `text`, each once, for a text that has nothing else."""
    names = [unicodedata.name(character, "") for character in text if _EMOJI.match(character)]
    named = dict.fromkeys(name.lower() for name in names if name and not _NOT_NAMED.search(name))
    return ", ".join(named)


# --- markup ------------------------------------------------------------------------------------

_HTML = (
    "b|i|u|s|p|a|em|strong|br|div|span|ul|ol|li|h[1-6]|code|pre|img|sub|sup|table|thead|tbody|tr|td|th|hr|"
    "body|html|small|blockquote"
)
_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    # A link's text stands for it; a picture's as well.
    (re.compile(r"!?\[([^\[\]\n]{1,300})\]\((?:https?://|www\.|mailto:|[#/.])[^\s()]*\)"), r"\1"),
    # The number of a footnote, as encyclopedias put it behind a word; then other bare references.
    (
        re.compile(
            r"(?:(?<=[^\W\d_]{2})|(?<=[.,;:!?\"'%)\]]))\[[1-9][0-9]{0,2}(?:[-–, ]+[0-9]{1,3})*\](?!\w)"
        ),
        "",
    ),
    (re.compile(r"^[ ]*\[([0-9]{1,3})\][ ]+", re.MULTILINE), r"\1, "),
    (re.compile(r"(?<=[ ])\[([0-9]{1,3}(?:[-–, ]+[0-9]{1,3})*)\]"), r"\1"),
    (re.compile(rf"</?(?:{_HTML})\b[^<>\n]{{0,500}}>", re.IGNORECASE), " "),
    (re.compile(r"<([A-Za-z/][^<>|\n]{0,500})>"), r"\1"),
    (re.compile(r"^[ ]{0,3}```.*$", re.MULTILINE), ""),
    (re.compile(r"`+"), ""),
    # Rules and underlined headings.
    (re.compile(r"^[ ]*([-=*_~#+])(?:[ ]?\1){2,}[ ]*$", re.MULTILINE), "\n"),
    (re.compile(r"^[ ]*\|?[ ]*:?-{2,}:?[ ]*(?:\|[ ]*:?-{2,}:?[ ]*)+\|?[ ]*$\n?", re.MULTILINE), ""),
    (re.compile(r"^[ ]*\|(.+)\|[ ]*$", re.MULTILINE), r"\1.\n"),
    (re.compile(r"^[ ]{0,3}#{1,6}[ ]+(.*?)[ #]*$", re.MULTILINE), "\\1\n"),
    (re.compile(r"^[ ]*(?:>[ ]?)+", re.MULTILINE), ""),
    (re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]{0,400}[^\s*])\1(?![\w*])"), r"\2"),
    (re.compile(r"(?<![\w_])(_{1,3})(?=[^\s_])([^_\n]{0,400}[^\s_])\1(?![\w_])"), r"\2"),
    (re.compile(r"(?<!~)~~(?=\S)([^~\n]{1,400})~~(?!~)"), r"\1"),
)

_BULLET = re.compile(r"^[ ]*(?:[-*+–—]|[•‣◦▪●○·⁃∙])[ ]+(?:\[[ xX]\][ ]+)?(?=\S)")
_NUMBERED = re.compile(r"^[ ]*\(?([0-9]{1,2}|[a-zA-Z](?=\)))[.)][ ]+(?=\S)")
_TERMINAL = tuple(".!?:;,…。！？：；，、\"'")
_WRAP_COLUMN = 55  # hard-wrapped prose has longer lines than addresses, verse and headings


def markup(text: str) -> str:
    """Returns `text` without Markdown's signs."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


def lines(text: str) -> str:
    """Returns `text` with one line per paragraph and a blank line between two.

    Items of a list end in a full stop, short lines (an address, verse) in a comma.
    """
    paragraphs = re.split(r"\n[ ]*\n\s*", text.strip())
    done = [_paragraph(paragraph) for paragraph in paragraphs]
    done = [paragraph for paragraph in done if paragraph]
    return "\n\n".join([*(_closed(paragraph, ".") for paragraph in done[:-1]), *done[-1:]])


def _closed(line: str, mark: str) -> str:
    return line if not line or line.endswith(_TERMINAL) else line + mark


def _paragraph(paragraph: str) -> str:
    rows = [row.strip() for row in paragraph.split("\n")]
    numbered = sum(bool(_NUMBERED.match(row)) for row in rows) >= 2
    joined = ""
    previous = ""
    for row in rows:
        item = bool(_BULLET.match(row)) or (numbered and bool(_NUMBERED.match(row)))
        said = _BULLET.sub("", row)
        said = _NUMBERED.sub(r"\1, ", said) if numbered else said
        if not said:
            continue
        if item:
            joined = _closed(joined, ".")
        elif len(previous) < _WRAP_COLUMN and (said[0].isupper() or said[0].isdigit()):
            joined = _closed(joined, ",")
        joined = f"{joined} {said}" if joined else said
        previous = row
    return joined


# --- brackets, dashes, repeated marks ----------------------------------------------------------

_STOPS = ",.;:!?"
_OPTIONAL_ENDING = re.compile(r"(?<=\w)\((e?s|r|n)\)", re.IGNORECASE)
_BRACKETED_RANGE = re.compile(r"\)[ ]?[-–][ ]?\(")
_GLUED = re.compile(r"(?<=\w)(?:[(\[{][^\s()\[\]{}]*[)\]}])+")
_BRACKET = re.compile(rf"\s*[(\[{{{_CJK_BRACKETS[::2]}]+\s*|\s*[)\]}}{_CJK_BRACKETS[1::2]}]+")
_DASH = re.compile(r"[ ]*[—–]+[ ]*|[ ]*-{2,}[ ]*|(?<![0-9\s])[ ]+-[ ]+|[ ]+-[ ]+(?![0-9\s])")


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - 1) : match.start()]


def _comma(match: re.Match[str], *, opening: bool) -> str:
    before, after = _before(match), match.string[match.end() : match.end() + 1]
    mark = "，" if set(match[0]) & set(_CJK_BRACKETS) else ", "
    if not before or before == "\n" or (opening and before in _STOPS + "([{\"'"):
        return "" if not before or before == "\n" else " "
    if not after or after == "\n" or after in _STOPS + "。，！？；：":
        return ""
    return " " if before in ".!?,;:。！？，" else mark


def _bracket(match: re.Match[str]) -> str:
    opening = match[0].strip()[:1] in "([{" + _CJK_BRACKETS[::2]
    return _comma(match, opening=opening)


def _dash(match: re.Match[str]) -> str:
    before = _before(match)
    rest = match.string[match.end() : match.end() + 3]
    if before.isalnum() and re.match(r"[\"']?(?:[\s.,!?]|$)", rest) and not match[0].endswith(" "):
        return "..."  # cut off in mid-speech
    return _comma(match, opening=True)


def pauses(text: str) -> str:
    """Returns `text` with brackets and dashes as commas."""
    text = _OPTIONAL_ENDING.sub(r"\1", text)
    text = _BRACKETED_RANGE.sub(" to ", text)
    text = _GLUED.sub(lambda pairs: re.sub(r"[()\[\]{}]+", " ", pairs[0]), text)
    text = _BRACKET.sub(_bracket, text)
    return _DASH.sub(_dash, text)


_TIDY: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"[ ]+"), " "),
    (re.compile(r" ?\n ?"), "\n"),
    (re.compile(r" +([,;:!?.]+)(?=[\s\"']|$)"), r"\1"),
    (re.compile(r"！{2,}"), "！"),
    (re.compile(r"？[？！]+|！+？[？！]*"), "？"),
    (re.compile(r"。{2,}"), "。"),
    (re.compile(r"\.(?: ?\.){2,}"), "..."),
    (re.compile(r"(?<!\.)\.\.(?!\.)"), "."),
    (re.compile(r",(?:\s*,)+"), ","),
    (re.compile(r"，{2,}"), "，"),
    (re.compile(r", *([.!?;:])(?=[\s\"']|$)"), r"\1"),
    (re.compile(r"，([。！？；：])"), r"\1"),
    (re.compile(r"^[ ]*[,;，、]+[ ]*", re.MULTILINE), ""),
    (re.compile(r"[ ]*,?[ ]*$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def tidy(text: str) -> str:
    """Returns `text` with single spaces and single punctuation marks."""
    text = re.sub(r"[!?]{2,}", lambda run: "?" if "?" in run[0] else "!", text)
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()
