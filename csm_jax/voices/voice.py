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
from csm_jax.prompt import (
    TextTokenizer,
    check_codec,
    check_speaker,
    check_text,
    encode_codes,
    encode_text,
)

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
    """A named voice: recorded turns, trained vectors, or vectors and then turns.

    Attributes:
        name: What it is called: 1 to 64 letters, digits, dots, underscores and hyphens.
        turns: The recorded turns, oldest first; there may be none where there are vectors.
        codebook_size: Codes of its codec run from 0 to this, exclusive.
        provenance: Where it comes from: `source`, `consent`, `created`, `csm_jax` and whatever else;
            with vectors, `model` is the hash of the model they were trained for.
        vectors: Inputs of the backbone, float32 [P, D], not writable; None for none.
        num_codebooks: Codes per frame; 0 takes it from the turns.
    """

    name: str
    turns: tuple[VoiceTurn, ...]
    codebook_size: int
    provenance: Mapping[str, str]
    vectors: np.ndarray | None = None
    num_codebooks: int = 0

    def __post_init__(self) -> None:
        """Checks that the parts belong together, and takes a copy of the vectors.

        Raises:
            TypeError, ValueError: Bad name, vectors or provenance, neither turns nor vectors, or turns of
                different codecs.
        """
        check_name(self.name)
        if not self.turns and self.vectors is None:
            raise ValueError(f"voice {self.name!r} has no turns and no vectors")
        if self.turns and not self.num_codebooks:
            object.__setattr__(self, "num_codebooks", self.turns[0].codes.shape[1])
        if self.num_codebooks < 1:
            raise ValueError(
                f"voice {self.name!r}: num_codebooks must be 1 or more, got {self.num_codebooks}"
            )
        if self.vectors is not None:
            object.__setattr__(self, "vectors", _checked_vectors(self.vectors, self.name))
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
    def frames(self) -> int:
        """Frames of audio in all turns."""
        return sum(len(turn.codes) for turn in self.turns)

    @property
    def seconds(self) -> float:
        """Seconds of audio in all turns."""
        return self.frames / FRAME_RATE

    @functools.cached_property
    def key(self) -> str:
        """What the model reads of it as a hash: of vectors, and of the turns' codes, texts and speakers."""
        digest = hashlib.blake2b(digest_size=16, person=b"csm_jax.voice")
        if self.vectors is not None:
            # No turn begins with a letter.
            digest.update(b"v %d %d\n" % self.vectors.shape + portable_bytes(self.vectors))
        for turn in self.turns:
            # Every part after its length: no two voices write the same bytes.
            text = turn.text.encode()
            digest.update(b"%d %d %d %d\n" % (turn.speaker, len(text), *turn.codes.shape) + text)
            digest.update(portable_bytes(turn.codes))
        return digest.hexdigest()


def _checked_vectors(vectors: Any, name: str) -> np.ndarray:
    checked = np.array(vectors, np.float32)
    if checked.ndim != 2 or not checked.size:
        raise ValueError(
            f"voice {name!r}: vectors must have shape [positions, embed_dim], got "
            f"{list(checked.shape)}"
        )
    bad = checked.size - int(np.isfinite(checked).sum())
    if bad:
        raise ValueError(f"voice {name!r}: {bad:,} numbers of its vectors are not finite")
    checked.flags.writeable = False
    return checked


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


def portable_bytes(array: np.ndarray) -> bytes:
    """Returns codes or vectors as they are hashed, the same on every machine: little-endian."""
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def voice_prompt(
    tokenizer: TextTokenizer, voice: Voice, config: CSMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frames of a voice's turns: (int32 [T, C + 1], mask of the same shape).

    They are those of the same turns as the context of `csm_jax.prompt.build_prompt`. The voice's
    vectors come before them.

    Raises:
        ValueError: The voice's codec or vectors, or the tokenizer, do not belong to the model, or the
            voice leaves too little room for text and answer.
    """
    columns = config.num_codebooks + 1
    parts = [(np.zeros((0, columns), np.int32), np.zeros((0, columns), bool))]
    try:
        check_codec(voice.num_codebooks, voice.codebook_size, config=config)
        vectors = _check_embed_dim(voice, config)
        for turn in voice.turns:
            parts.append(encode_text(tokenizer, turn.text, turn.speaker, config=config))
            parts.append(encode_codes(turn.codes, config=config))
    except ValueError as error:
        raise ValueError(f"voice {voice.name!r}: {error}") from error
    frames = np.concatenate([frames for frames, _ in parts])
    positions, most = vectors + len(frames), int(_MAX_SHARE * config.backbone.max_seq_len)
    if positions > most:
        raise ValueError(
            f"voice {voice.name!r} takes {positions:,} positions ({voice.frames:,} of them audio), "
            f"but may take {most:,} of the {config.backbone.max_seq_len:,} that the model holds "
            "(max_seq_len): make it of shorter recordings"
        )
    return frames, np.concatenate([mask for _, mask in parts])


def _check_embed_dim(voice: Voice, config: CSMConfig) -> int:
    """Returns how many vectors there are."""
    if voice.vectors is None:
        return 0
    count, dim = voice.vectors.shape
    if dim != config.backbone.embed_dim:
        raise ValueError(
            f"its vectors have {dim:,} numbers, but the model's embed_dim is "
            f"{config.backbone.embed_dim:,}: they were trained for another model"
        )
    return count
