"""The schema of training data: one conversation a line of JSON.

    {"messages": [
        {"role": "speaker_0", "content": [
            {"type": "text", "text": "How are you?"}, {"type": "audio", "url": "clips/a.wav"}]},
        {"role": "speaker_1", "content": [
            {"type": "text", "text": "Fine, thanks."},
            {"type": "audio", "url": "long.flac", "start": 12.5, "end": 14.1}]}],
     "training_mask": [false, true]}

Messages are in time order. A message has text, several of them joined by a space, and at most one
audio: a file, a part of one (`start`, `end` in seconds), a member of a tar (`shard.tar#member`), or
`codes`, a list [frames, codebooks] or a .npy file of one, without an end frame. Paths are relative to
the file's directory. Without `training_mask` every message is trained. Optional keys of a line: `id`,
`weight` (of its frames in the loss, from 1e-6 to 1e6), `split`, `lang`.

Two other kinds are recognised: preferences, with `chosen` and `rejected` messages after the context in
`messages`, and prompts for reinforcement learning, whose last message has no audio.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from csm_jax.prompt import check_text

MAX_LINE_BYTES = 1 << 26
"""Longest line: hours of audio as inline codes."""

Kind = Literal["speech", "preference", "prompt"]

# Far from where float32 sums of weighted losses overflow, or weights vanish.
_WEIGHTS = (1e-6, 1e6)
_ROLE = re.compile(r"speaker_(\d{1,9})", re.ASCII)
_LINE = {"messages", "training_mask", "id", "weight", "split", "lang", "chosen", "rejected"}
_MESSAGE = {"role", "content"}
_AUDIO = {"type", "url", "start", "end", "codes"}


class SchemaError(ValueError):
    """What is wrong with a line.

    Attributes:
        problems: All of it.
    """

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True, eq=False)
class Sound:
    """Where a message's audio is.

    Attributes:
        url: A file, or `file.tar#member`; None where there are codes.
        start: Seconds into it.
        end: Seconds; None is its end.
        codes: In its place, codes [n, C] or the path of a .npy file of them.
    """

    url: str | None = None
    start: float = 0.0
    end: float | None = None
    codes: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """One turn of a conversation; `sound` is None where it has no audio."""

    speaker: int
    text: str
    sound: Sound | None
    trained: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversation:
    """One line.

    Attributes:
        kind: "speech" is what fine-tuning takes.
        messages: In time order; of a preference its context, then what is chosen and what is rejected.
        base: What paths are relative to.
        id: As given.
        weight: Of its frames in the loss.
        split: As given.
        lang: As given.
    """

    kind: Kind
    messages: tuple[Message, ...]
    base: Path
    id: str | None = None
    weight: float = 1.0
    split: str | None = None
    lang: str | None = None


def read_lines(path: Path) -> Iterator[tuple[int, bytes | ValueError]]:
    """Yields (line number, line) of a file without its blank lines, an error in place of one too long."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                    pass
                yield number, ValueError(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                yield number, line


def parse_line(line: bytes, base: Path) -> Conversation:
    """Returns the conversation of a line.

    Args:
        line: With or without a byte order mark.
        base: What its paths are relative to.

    Raises:
        SchemaError: All that is wrong with it.
    """
    try:
        given = _decode(line.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text: byte 0x{line[error.start]:02X} at position {error.start}"
        raise SchemaError([what]) from error
    except json.JSONDecodeError as error:
        raise SchemaError([f"not JSON ({error.msg} at column {error.colno})"]) from error
    except (RecursionError, ValueError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SchemaError([f"not JSON ({what})"]) from error
    return as_conversation(given, base)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def as_conversation(given: Any, base: Path) -> Conversation:
    """Returns the conversation of a parsed line.

    Raises:
        SchemaError: All that is wrong with it.
    """
    if not isinstance(given, dict):
        raise SchemaError([f"must be a JSON object, got {type(given).__name__}"])
    problems: list[str] = []
    if unknown := sorted(given.keys() - _LINE):
        problems.append(f"unknown keys {unknown}: known are {sorted(_LINE)}")
    listed = given.get("messages")
    if not isinstance(listed, list):
        raise SchemaError([*problems, f"messages must be a list, got {_shown(listed)}"])
    preference = "chosen" in given or "rejected" in given
    if preference and not {"chosen", "rejected"} <= given.keys():
        problems.append("chosen and rejected go together")
    mask = _mask(given, len(listed), preference, problems)
    messages = [
        _message(each, f"message {i}", trained, problems)
        for i, (each, trained) in enumerate(zip(listed, mask, strict=True))
    ]
    if preference:
        messages += [
            _message(given[name], name, True, problems)
            for name in ("chosen", "rejected")
            if name in given
        ]
    elif not listed:
        problems.append("messages is empty")
    weight = given.get("weight", 1.0)
    if type(weight) not in (int, float) or not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
        problems.append(
            f"weight must be a number from {_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}, got {_shown(weight)}"
        )
    names = {name: _name(given.get(name), name, problems) for name in ("id", "split", "lang")}
    if problems:
        raise SchemaError(problems)
    found = tuple(message for message in messages if message is not None)
    silent = [i for i, message in enumerate(found) if message.sound is None]
    prompt = not preference and silent[-1:] == [len(found) - 1]
    if wrong := silent[:-1] if prompt else silent:
        raise SchemaError([f"message {i} has no audio" for i in wrong])
    if not preference and not prompt and not any(mask):
        raise SchemaError(["nothing is trained: training_mask is all false"])
    return Conversation(
        kind="preference" if preference else "prompt" if prompt else "speech",
        messages=found,
        base=base,
        weight=float(weight),
        **names,
    )


def _mask(
    given: Mapping[str, Any], count: int, preference: bool, problems: list[str]
) -> list[bool]:
    mask = given.get("training_mask")
    if mask is None:
        return [not preference] * count
    if not isinstance(mask, list) or any(type(value) is not bool for value in mask):
        problems.append(f"training_mask must be a list of true and false, got {_shown(mask)}")
    elif len(mask) != count:
        problems.append(f"training_mask has {len(mask)} values for {count} messages")
    else:
        return mask
    return [True] * count


def _message(given: Any, name: str, trained: bool, problems: list[str]) -> Message | None:
    before = len(problems)
    if not isinstance(given, dict):
        problems.append(f"{name} must be an object, got {_shown(given)}")
        return None
    if unknown := sorted(given.keys() - _MESSAGE):
        problems.append(f"{name} has unknown keys {unknown}: known are {sorted(_MESSAGE)}")
    role = given.get("role")
    found = _ROLE.fullmatch(role) if isinstance(role, str) else None
    if found is None:
        problems.append(f'{name}: role must be "speaker_<number>", got {_shown(role)}')
    content = given.get("content")
    if not isinstance(content, list):
        problems.append(f"{name}: content must be a list, got {_shown(content)}")
        return None
    texts: list[str] = []
    sounds: list[Sound] = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text" and isinstance(item.get("text"), str) and item.keys() == {"type", "text"}:
            texts.append(item["text"])
        elif kind == "audio":
            sounds.append(_sound(item, name, problems))
        else:
            problems.append(
                f'{name}: an item must be {{"type": "text", "text": ...}} or {{"type": "audio", '
                f'"url": ...}}, got {_shown(item)}'
            )
    if len(sounds) > 1:
        problems.append(f"{name} has {len(sounds)} audios; it may have one")
    text = " ".join(texts)
    try:
        check_text(text, f"{name}: text")
    except ValueError as error:
        problems.append(str(error))
    if len(problems) > before or found is None:
        return None
    return Message(
        speaker=int(found[1]), text=text, sound=sounds[0] if sounds else None, trained=trained
    )


def _sound(item: Mapping[str, Any], name: str, problems: list[str]) -> Sound:
    if unknown := sorted(item.keys() - _AUDIO):
        problems.append(f"{name}: audio has unknown keys {unknown}: known are {sorted(_AUDIO)}")
    before = len(problems)
    url, codes = item.get("url"), item.get("codes")
    times = {key: item[key] for key in ("start", "end") if item.get(key) is not None}
    for key, value in times.items():
        if type(value) not in (int, float) or not 0 <= value < 1e9:
            problems.append(f"{name}: audio.{key} must be seconds, got {_shown(value)}")
    if len(problems) > before:
        return Sound()
    start, end = float(times.get("start", 0.0)), times.get("end")
    if end is not None and end <= start:
        problems.append(f"{name}: audio.end={end:g} is not after audio.start={start:g}")
    if codes is not None:
        if url is not None or times:
            problems.append(f"{name}: audio has codes, so it must have no url, start or end")
        if not isinstance(codes, (str, list)) or not codes:
            problems.append(
                f"{name}: audio.codes must be a list or a .npy file, got {_shown(codes)}"
            )
    elif not isinstance(url, str) or not url.isprintable() or not url:
        problems.append(f"{name}: audio must have a url or codes, got url {_shown(url)}")
    if len(problems) > before:
        return Sound()
    return Sound(url=url, start=start, end=None if end is None else float(end), codes=codes)


def _name(value: Any, name: str, problems: list[str]) -> str | None:
    if value is None:
        return None
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not value or not value.isprintable() or len(value) > 1000:
        problems.append(f"{name} must be a string of visible characters, got {_shown(value)}")
        return None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
