"""What a voice is, and the positions it takes in the model."""

from __future__ import annotations

import functools
import hashlib
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from csm_jax.codec import check_codes
from csm_jax.config import FRAME_RATE, CSMConfig
from csm_jax.prompt import TextTokenizer, check_speaker, check_text, encode_audio, encode_text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = {"CON", "PRN", "AUX", "NUL"} | {
    f"{port}{n}" for port in ("COM", "LPT") for n in range(10)
}
_MAX_CODES = 1 << 31
_MAX_SHARE = 0.75  # of the model's positions; the rest is for the text and the answer


@dataclass(frozen=True, eq=False, kw_only=True)
class VoiceTurn:
    """One recorded turn.

    Attributes:
        speaker: The speaker's number, 0 or more.
        text: What is said, exactly.
        codes: How it sounds: int32 [frames, codebooks], not writable.
    """

    speaker: int
    text: str
    codes: np.ndarray

    def __post_init__(self) -> None:
        """Takes a copy of the codes.

        Raises:
            TypeError, ValueError: Bad speaker, text or codes.
        """
        object.__setattr__(self, "speaker", check_speaker(self.speaker, "speaker"))
        check_text(self.text, "text")
        codes = np.asarray(self.codes)
        if codes.ndim != 2 or not codes.size:
            raise ValueError(
                f"a turn's codes must have shape [frames, codebooks], got {list(codes.shape)}"
            )
        codes = check_codes(codes, num_codebooks=codes.shape[1], codebook_size=_MAX_CODES)
        codes.flags.writeable = False
        object.__setattr__(self, "codes", codes)

    @property
    def seconds(self) -> float:
        """How long it lasts, in whole frames."""
        return len(self.codes) / FRAME_RATE


@dataclass(frozen=True, eq=False, kw_only=True)
class Voice:
    """A named voice.

    Attributes:
        name: What it is called: 1 to 64 letters, digits, dots, underscores and hyphens.
        turns: The recorded turns, oldest first.
        codebook_size: Codes of its codec run from 0 to this, exclusive.
        provenance: Where it comes from: `source`, `consent`, `created`, `csm_jax` and whatever else.
    """

    name: str
    turns: tuple[VoiceTurn, ...]
    codebook_size: int
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        """Checks that the parts belong together.

        Raises:
            TypeError, ValueError: Bad name or provenance, no turns, or turns of different codecs.
        """
        check_name(self.name)
        if not self.turns:
            raise ValueError(f"voice {self.name!r} has no turns")
        for i, turn in enumerate(self.turns):
            try:
                check_codes(
                    turn.codes, num_codebooks=self.num_codebooks, codebook_size=self.codebook_size
                )
            except ValueError as error:
                raise ValueError(f"voice {self.name!r}, turn {i}: {error}") from error
        for key, value in self.provenance.items():
            check_text(key, "a key of provenance")
            check_text(value, f"provenance[{key!r}]")
        object.__setattr__(self, "provenance", dict(self.provenance))

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return self.turns[0].codes.shape[1]

    @property
    def frames(self) -> int:
        """Frames of audio in all turns."""
        return sum(len(turn.codes) for turn in self.turns)

    @property
    def seconds(self) -> float:
        """Seconds of audio in all turns."""
        return self.frames / FRAME_RATE

    @functools.cached_property
    def key(self) -> str:
        """What the model reads of it as a hash: of the turns' codes, texts and speakers, in order."""
        digest = hashlib.blake2b(digest_size=16, person=b"csm_jax.voice")
        for turn in self.turns:
            # Every part after its length: no two voices write the same bytes.
            text = turn.text.encode()
            digest.update(b"%d %d %d %d\n" % (turn.speaker, len(text), *turn.codes.shape) + text)
            digest.update(code_bytes(turn.codes))
        return digest.hexdigest()


def check_name(name: Any) -> str:
    """Returns `name`, which is also the stem of a file's name.

    Raises:
        TypeError: It is not a string.
        ValueError: It is not 1 to 64 letters, digits, dots, underscores and hyphens, beginning with a
            letter or digit, or it is a device's name on Windows.
    """
    if not isinstance(name, str):
        raise TypeError(f"a voice's name must be a string, got {type(name).__name__}")
    complaint = name_complaint(name)
    if complaint is not None:
        raise ValueError(complaint)
    return name


def name_complaint(name: str) -> str | None:
    """Returns what is wrong with a voice's name, if anything is."""
    if not _NAME.fullmatch(name):
        return (
            "a voice's name must be 1 to 64 letters (a to z), digits, '.', '_' and '-', beginning "
            f"with a letter or digit, got {reprlib.repr(name)}"
        )
    if name.split(".")[0].upper() in _RESERVED:
        return f"a voice cannot be called {name!r}, the name of a device on Windows"
    return None


def code_bytes(codes: np.ndarray) -> bytes:
    """Returns codes as they are hashed, the same on every machine: little-endian int32."""
    return codes.astype("<i4").tobytes()


class _Recorded:
    """A turn's codes in the place of the codec that made them."""

    def __init__(self, voice: Voice, turn: VoiceTurn) -> None:
        self.num_codebooks, self.codebook_size = voice.num_codebooks, voice.codebook_size
        self._codes = turn.codes

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """Returns the codes, whatever `audio` is."""
        return self._codes


def voice_prompt(
    tokenizer: TextTokenizer, voice: Voice, config: CSMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frames of a voice: (int32 [T, C + 1], mask of the same shape).

    They are those of the same turns as the context of `csm_jax.prompt.build_prompt`.

    Raises:
        ValueError: The voice's codec or the tokenizer does not belong to the model, or the voice leaves
            too little room for text and answer.
    """
    parts = []
    no_audio = np.zeros(0, np.float32)
    try:
        for turn in voice.turns:
            parts.append(encode_text(tokenizer, turn.text, turn.speaker, config=config))
            parts.append(encode_audio(_Recorded(voice, turn), no_audio, config=config))
    except ValueError as error:
        raise ValueError(f"voice {voice.name!r}: {error}") from error
    frames = np.concatenate([frames for frames, _ in parts])
    most = int(_MAX_SHARE * config.backbone.max_seq_len)
    if len(frames) > most:
        raise ValueError(
            f"voice {voice.name!r} takes {len(frames):,} positions ({voice.frames:,} of them audio), "
            f"but may take {most:,} of the {config.backbone.max_seq_len:,} that the model holds "
            "(max_seq_len): make it of shorter recordings"
        )
    return frames, np.concatenate([mask for _, mask in parts])
