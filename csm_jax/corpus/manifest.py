"""Reads manifests: one row per utterance, and one error per bad line.

JSON Lines with NeMo's keys, one object per line:

    text                      what to say; the only key that must be there
    speaker                   whole number, 0 unless given
    context_audio_filepath    a recording to go on from, with context_audio_text, its transcript
    duration                  seconds of a recording of this text; here an estimate for planning
    audio_filepath, normalized_text, ...    of that recording: kept with the row, not used

and keys of our own: `id`, `seed`, `voice` (of the voice library), `context` (a list of
`{"audio", "text", "speaker"}`, oldest first) and the settings in `SETTINGS`. Other keys are kept
with the row under `extra`. seed-tts's `meta.lst` has `utt|prompt_text|prompt_wav|infer_text`, with a
recording of the text as an optional fifth. Paths are relative to the manifest's directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from csm_jax.prompt import check_text

Row = dict[str, Any]
"""A checked row: id, line, text, speaker; where given seed, voice, context, duration, settings, extra."""

MAX_LINE_BYTES = 1 << 18
"""Longest line: far more text than the model has positions for."""
MAX_KEY_BYTES = 200
"""Longest key of a row: with its ending it must be a file's name."""
SETTINGS = (
    "max_audio_length_ms",
    "temperature",
    "topk",
    "top_p",
    "min_p",
    "decoder_temperature",
    "decoder_topk",
)
"""Keys of a row that are settings of `Request`, all numbers."""

_WHOLE = {"topk", "decoder_topk"}
_FIRST = {"text", "speaker", "id", "seed", "voice", "duration", "context"}
_CONTEXT = ("context_audio_filepath", "context_audio_text")
_USED = _FIRST | set(_CONTEXT) | set(SETTINGS)
_PLAIN = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def key_of(row_id: str) -> str:
    """Returns the name of a row's files without their ending: the id, what is not `A-Za-z0-9_-` as %XX.

    A dot too: WebDataset takes the first one of a name for the start of its ending.
    """
    if _PLAIN.fullmatch(row_id):
        return row_id
    return "".join(
        chr(byte) if _PLAIN.fullmatch(chr(byte)) else f"%{byte:02X}" for byte in row_id.encode()
    )


def read_lines(
    path: Path, on_bytes: Callable[[bytes], None]
) -> Iterator[tuple[int, bytes | ValueError]]:
    """Yields (line number, line without its end) of a file, an error in place of a line too long.

    Args:
        path: The file.
        on_bytes: Called with all bytes of the file, in order.
    """
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            on_bytes(line)
            number += 1
            if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
                yield number, line.rstrip(b"\r\n")
                continue
            length = len(line)
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                on_bytes(line)
                length += len(line)
            yield (
                number,
                ValueError(f"the line has {length:,} bytes; at most {MAX_LINE_BYTES:,} are read"),
            )


def parser_of(path: Path) -> Callable[[bytes, int], Row]:
    """Returns what reads a line of this manifest, by the file's ending: `.lst` is seed-tts's."""
    return parse_seed_tts if path.suffix.lower() == ".lst" else parse_json


def parse_json(line: bytes, number: int) -> Row:
    """Returns the row of a JSON line.

    Raises:
        ValueError: What is wrong with it.
    """
    if number == 1 and line.startswith(b"\xef\xbb\xbf"):  # some editors put a byte order mark first
        line = line[3:]
    try:
        given = _decode(_text_of(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON (nested too deeply)") from error
    if not isinstance(given, dict):
        raise ValueError(f"must be a JSON object, got {type(given).__name__}")
    return _checked(given, number)


def parse_seed_tts(line: bytes, number: int) -> Row:
    """Returns the row of a line of seed-tts's `meta.lst`.

    Raises:
        ValueError: What is wrong with it.
    """
    fields = _text_of(line).lstrip("\ufeff").split("|")
    if len(fields) not in (4, 5):
        raise ValueError(
            f"must be utt|prompt_text|prompt_wav|infer_text, got {len(fields)} fields between bars"
        )
    utterance, prompt_text, prompt_wav, text = fields[:4]
    given: Row = {
        "id": utterance,
        "text": text,
        "context_audio_filepath": prompt_wav,
        "context_audio_text": prompt_text,
    }
    if len(fields) == 5:
        given["audio_filepath"] = fields[4]
    return _checked(given, number)


def _text_of(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 text: byte 0x{line[error.start]:02X} at position {error.start}"
        ) from error


def _checked(given: Row, number: int) -> Row:
    if "text" not in given:
        raise ValueError(f"has no text; its keys are {sorted(given)[:20]}")
    speaker = given.get("speaker", 0)
    if type(speaker) is not int or speaker < 0:
        raise ValueError(f"speaker must be a whole number of 0 or more, got {_shown(speaker)}")
    row: Row = {
        "id": _id(given.get("id"), number),
        "line": number,
        "text": _spoken(given["text"], "text"),
        "speaker": speaker,
    }
    if len(given) == 1:
        return row
    if (seed := given.get("seed")) is not None:
        if type(seed) is not int or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be a whole number in [0, 2**64), got {_shown(seed)}")
        row["seed"] = seed
    if (voice := given.get("voice")) is not None:
        if not isinstance(voice, str) or not voice:
            raise ValueError(f"voice must be a name, got {_shown(voice)}")
        row["voice"] = voice
    if context := _context(given, speaker):
        row["context"] = context
    if (duration := given.get("duration")) is not None:
        row["duration"] = _number(duration, "duration")
        if duration < 0:
            raise ValueError(f"duration must be 0 or more, got {_shown(duration)}")
    for name in SETTINGS:
        if given.get(name) is not None:
            row[name] = _number(given[name], name)
    extra = {name: value for name, value in given.items() if name not in _USED}
    if extra:
        try:
            json.dumps(extra, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:  # half a character, or a number too large for a float
            raise ValueError(f"a value of {sorted(extra)} cannot be kept: {error}") from error
        row["extra"] = extra
    return row


def _id(value: Any, number: int) -> str:
    if value is None:
        return f"line-{number:09d}"
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"id must be a string of visible characters, got {_shown(value)}")
    if (length := max(len(value), len(key_of(value)))) > MAX_KEY_BYTES:
        raise ValueError(f"id is {length:,} bytes as a file's name, at most {MAX_KEY_BYTES} fit")
    return value


def _spoken(value: Any, name: str) -> str:
    # The full check looks at every character; printable text, nearly all there is, needs none.
    if isinstance(value, str) and value.isprintable() and not value.isspace() and value:
        return value
    try:
        return check_text(value, name)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _context(given: Row, speaker: int) -> list[Row]:
    turns = given.get("context")
    if turns is None:
        turns = []
    if not isinstance(turns, list):
        raise ValueError(f"context must be a list, got {_shown(turns)}")
    audio, text = (given.get(name) for name in _CONTEXT)
    if (audio is None) != (text is None):
        raise ValueError(
            f"{_CONTEXT[0]} and {_CONTEXT[1]} go together: a recording needs its transcript"
        )
    if audio is not None:
        turns = [*turns, {"audio": audio, "text": text, "speaker": speaker}]
    return [_turn(turn, f"context[{i}]", speaker) for i, turn in enumerate(turns)]


def _turn(turn: Any, name: str, speaker: int) -> Row:
    if not isinstance(turn, dict) or not {"audio", "text"} <= turn.keys() <= {
        "audio",
        "text",
        "speaker",
    }:
        raise ValueError(f'{name} must be {{"audio", "text", "speaker"}}, got {_shown(turn)}')
    audio, who = turn["audio"], turn.get("speaker", speaker)
    if not isinstance(audio, str) or not audio or not audio.isprintable():
        raise ValueError(f"{name}: audio must be a path, got {_shown(audio)}")
    if type(who) is not int or who < 0:
        raise ValueError(f"{name}: speaker must be a whole number of 0 or more, got {_shown(who)}")
    return {"audio": audio, "text": _spoken(turn["text"], f"{name}: text"), "speaker": who}


def _number(value: Any, name: str) -> int | float:
    whole = name in _WHOLE
    if type(value) is not int and (whole or type(value) is not float):
        raise ValueError(f"{name} must be a {'whole ' * whole}number, got {_shown(value)}")
    if not abs(value) <= 1e15:  # no infinity, and no whole number beyond what a float can hold
        raise ValueError(f"{name} is out of range, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
