"""Turns a conversation into the frames the backbone reads.

A frame has C + 1 columns: C audio codes and, last, a text token; a mask says which columns count.
A turn is `[speaker]text` between the tokenizer's begin and end tokens, one token per frame. A
context turn is followed by its audio, one frame of codes per 80 ms, and one end frame of zero codes.
The turn to be spoken comes last, as text only. One frame is one position of the backbone.

Source of the format: SesameAILabs/csm `generator.py`.

What is not text is refused rather than repaired: control characters other than tab and line breaks,
and the written names of the tokenizer's control tokens, such as `<|end_of_text|>`, which would
become those tokens. Brackets are text: `[3]` inside a text is read as written and switches no speaker.
Format, limits and what is refused stand in this one file, so that they agree.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import os
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from csm_jax.audio import check_audio, check_rate, resample
from csm_jax.codec import check_codes
from csm_jax.config import FRAME_MS, SAMPLE_RATE, SAMPLES_PER_FRAME, CSMConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
"""The Llama-3 tokens around a text; their ids are looked up in the tokenizer."""

_LINE_CHARACTERS = "\t\n\r"
_CACHED_SEGMENTS = 64


@runtime_checkable  # the tests check annotations at run time
class AudioEncoder(Protocol):
    """The part of a codec a prompt needs."""

    @property
    def num_codebooks(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """Returns the codes (int [n, C]) of 24 kHz audio (float32 [W])."""
        ...


@dataclass(frozen=True, eq=False)
class Segment:
    """An earlier turn of the conversation: who said what, and how it sounded.

    Attributes:
        speaker: The speaker's number, 0 or more.
        text: What is said, exactly.
        audio: Mono samples [W] around -1..1 as a numpy, jax or torch array.
        sample_rate: Hertz of `audio`; other rates than 24,000 are resampled.
        codes: In place of `audio`, the codes int [n, C] that the model or the codec has made: what
            was spoken is heard again exactly, without the watermark and without encoding.
    """

    speaker: int
    text: str
    audio: Any = None
    sample_rate: int = SAMPLE_RATE
    codes: Any = None


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the backbone is prefilled with.

    Attributes:
        frames: int32 [T, C + 1], codes then text token.
        mask: bool [T, C + 1], true where `frames` counts.
        dropped_segments: How many of the oldest context segments were left out to fit.
    """

    frames: np.ndarray
    mask: np.ndarray
    dropped_segments: int


class TextTokenizer:
    """The Llama-3 tokenizer, putting begin and end tokens around every text."""

    def __init__(self, tokenizer: Tokenizer, *, name: str = "the tokenizer") -> None:
        """Takes over `tokenizer` and sets its post-processor.

        Args:
            tokenizer: A `tokenizers.Tokenizer`.
            name: What errors call it.

        Raises:
            ValueError: It lacks the Llama-3 begin or end token.
        """
        from tokenizers.processors import TemplateProcessing

        ids = {token: tokenizer.token_to_id(token) for token in (BOS, EOS)}
        missing = [token for token, token_id in ids.items() if token_id is None]
        if missing:
            raise ValueError(
                f"{name} has no {' and no '.join(missing)}, so it is not Llama 3's tokenizer; "
                "CSM needs tokenizer.json of meta-llama/Llama-3.2-1B"
            )
        # The published file adds the begin token only.
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=list(ids.items())
        )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._control_tokens = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TextTokenizer:
        """Returns the tokenizer in a `tokenizer.json`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a tokenizer, or not Llama 3's.
        """
        from tokenizers import Tokenizer

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        return cls(tokenizer, name=str(path))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, with the begin and end tokens around them.

        Raises:
            ValueError: The text holds the written name of a control token.
        """
        ids = self._tokenizer.encode(text).ids
        for token_id in ids[1:-1]:
            if token_id in self._control_tokens:
                raise ValueError(
                    f"text must not contain {self._control_tokens[token_id]!r}, which the "
                    "tokenizer reads as a control token; remove it or write it differently"
                )
        return ids


class EncodeCache:
    """An encoder that remembers the codes of the audio it saw last.

    Give it to `build_prompt` in place of the codec: in a dialogue every turn's context then costs
    one encoding, not one per turn that follows. Safe to share between threads.
    """

    def __init__(self, codec: AudioEncoder, *, max_segments: int = _CACHED_SEGMENTS) -> None:
        if max_segments < 1:
            raise ValueError(f"max_segments must be at least 1, got {max_segments}")
        self._codec, self._max_segments = codec, max_segments
        self._codes: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_codebooks(self) -> int:
        """The codec's codes per frame."""
        return self._codec.num_codebooks

    @property
    def codebook_size(self) -> int:
        """The codec's codes per codebook."""
        return self._codec.codebook_size

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """Returns the codec's codes (int [n, C], not writable) of audio (float32 [W])."""
        samples = np.ascontiguousarray(audio, np.float32)
        digest = hashlib.blake2b(samples.data, digest_size=16).digest()
        with self._lock:
            if digest in self._codes:
                self._codes.move_to_end(digest)
                return self._codes[digest]
        codes = np.array(self._codec.encode(samples))
        codes.flags.writeable = False
        with self._lock:
            self._codes[digest] = codes
            while len(self._codes) > self._max_segments:
                self._codes.popitem(last=False)
        return codes


# --- parts of a prompt -------------------------------------------------------------------------


def check_text(text: Any, name: str) -> str:
    """Returns `text`.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty or blank, holds a control character other than tab and line breaks,
            or was made of bytes that are not UTF-8.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    for index, character in enumerate(text):
        category, code = unicodedata.category(character), ord(character)
        if category == "Cs":  # how Python writes bytes that it cannot read, or half a character
            byte = f": the byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else ""
            raise ValueError(
                f"{name} is not valid UTF-8{byte or f': the surrogate U+{code:04X}'} at position "
                f"{index}; write it in UTF-8"
            )
        if category == "Cc" and character not in _LINE_CHARACTERS:
            raise ValueError(
                f"{name} holds the control character U+{code:04X} at position {index}; remove it"
            )
    return text


def check_speaker(speaker: Any, name: str) -> int:
    """Returns `speaker` as an int. Any number is a speaker: unknown ones get a voice of their own.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is negative.
    """
    if isinstance(speaker, (bool, np.bool_)) or not hasattr(speaker, "__index__"):
        raise TypeError(f"{name} must be an integer, got {speaker!r}")
    speaker = operator.index(speaker)
    if speaker < 0:
        raise ValueError(f"{name} must be 0 or more, got {speaker}")
    return speaker


def encode_text(
    tokenizer: TextTokenizer, text: str, speaker: int, *, config: CSMConfig, name: str = "text"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the text frames of one turn: (int32 [T, C + 1], mask of the same shape).

    Args:
        tokenizer: The text tokenizer.
        text: What is said.
        speaker: Who says it.
        config: The model's sizes.
        name: What errors call the text.

    Raises:
        TypeError, ValueError: Bad text or speaker, or a token the model has no embedding for.
    """
    turn = f"[{check_speaker(speaker, 'speaker')}]{check_text(text, name)}"
    try:
        ids = np.array(tokenizer.encode(turn), np.int64)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if ids.max() >= config.text_vocab_size:
        raise ValueError(
            f"{name} has the token id {ids.max():,}, but the model's text_vocab_size is "
            f"{config.text_vocab_size:,}: the tokenizer does not belong to this model"
        )
    frames = np.zeros((len(ids), config.num_codebooks + 1), np.int32)
    frames[:, -1] = ids
    mask = np.zeros(frames.shape, bool)
    mask[:, -1] = True
    return frames, mask


def encode_audio(
    codec: AudioEncoder, audio: np.ndarray, *, config: CSMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the audio frames of 24 kHz audio (float32 [W]) and their end frame of zero codes:
    (int32 [ceil(W / 1920) + 1, C + 1], mask of the same shape).

    Raises:
        ValueError: The codec's codes do not fit the model.
    """
    check_codec(codec.num_codebooks, codec.codebook_size, config=config)
    return encode_codes(codec.encode(audio), config=config)


def check_codec(num_codebooks: int, codebook_size: int, *, config: CSMConfig) -> None:
    """Checks that a codec's codes are the model's.

    Raises:
        ValueError: They are not.
    """
    if num_codebooks != config.num_codebooks or codebook_size > config.codebook_size:
        raise ValueError(
            f"the codec gives {num_codebooks} codebooks of {codebook_size:,} codes, but the model "
            f"has {config.num_codebooks} of {config.codebook_size:,}: they do not "
            "belong together"
        )


def encode_codes(codes: np.ndarray, *, config: CSMConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the audio frames of codes (int [n, C]) and their end frame of zero codes:
    (int32 [n + 1, C + 1], mask of the same shape).

    Raises:
        TypeError, ValueError: The codes do not fit the model.
    """
    codes = _check_codes(codes, config)
    frames = np.zeros((len(codes) + 1, config.num_codebooks + 1), np.int32)
    frames[:-1, :-1] = codes
    mask = np.ones(frames.shape, bool)
    mask[:, -1] = False
    return frames, mask


def encode_segment(
    tokenizer: TextTokenizer,
    codec: AudioEncoder,
    segment: Segment,
    *,
    config: CSMConfig,
    name: str = "segment",
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a context segment's frames, text then audio then end: (int32 [T, C + 1], mask).

    Raises:
        TypeError, ValueError: The segment holds bad text, speaker or audio.
    """
    text = encode_text(tokenizer, segment.text, segment.speaker, config=config, name=f"{name}.text")
    sound = _encode_sound(codec, _check_sound(segment, name, config)[0], config)
    return np.concatenate([text[0], sound[0]]), np.concatenate([text[1], sound[1]])


def segment_positions(
    tokenizer: TextTokenizer, segment: Segment, *, config: CSMConfig, name: str = "segment"
) -> int:
    """Returns how many positions a context segment takes, without encoding its audio.

    Raises:
        TypeError, ValueError: As `encode_segment`.
    """
    text = encode_text(tokenizer, segment.text, segment.speaker, config=config, name=f"{name}.text")
    return len(text[0]) + _check_sound(segment, name, config)[1]


def _encode_sound(
    codec: AudioEncoder, segment: Segment, config: CSMConfig
) -> tuple[np.ndarray, np.ndarray]:
    if segment.codes is not None:
        return encode_codes(segment.codes, config=config)
    audio = resample(segment.audio, segment.sample_rate, SAMPLE_RATE)
    return encode_audio(codec, audio, config=config)


def _check_sound(segment: Segment, name: str, config: CSMConfig) -> tuple[Segment, int]:
    # With plain arrays, and how many positions they will take: known before audio is resampled.
    if segment.codes is None:
        rate = check_rate(segment.sample_rate, f"{name}.sample_rate")
        samples = check_audio(segment.audio, f"{name}.audio")
        checked = replace(segment, audio=samples, sample_rate=rate)
        part, seconds = "audio", samples.size / rate
        positions = -(-samples.size * SAMPLE_RATE // (rate * SAMPLES_PER_FRAME)) + 1
    else:
        if segment.audio is not None:
            raise ValueError(f"{name} has both audio and codes: give one of them")
        codes = _check_segment_codes(segment.codes, f"{name}.codes", config)
        checked = replace(segment, codes=codes)
        part, seconds = "codes", len(codes) * FRAME_MS / 1000
        positions = len(codes) + 1
    if positions >= config.backbone.max_seq_len:
        raise ValueError(
            f"{name}.{part} lasts {seconds:,.1f} s, which is {positions:,} positions, but the model "
            f"holds max_seq_len={config.backbone.max_seq_len:,} for prompt and answer together; "
            "cut it"
        )
    return checked, positions


def _check_segment_codes(codes: Any, name: str, config: CSMConfig) -> np.ndarray:
    try:
        checked = _check_codes(codes, config)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    if not len(checked):
        raise ValueError(f"{name} is empty")
    return checked


def _check_codes(codes: Any, config: CSMConfig) -> np.ndarray:
    return check_codes(
        codes, num_codebooks=config.num_codebooks, codebook_size=config.codebook_size
    )


def check_max_frames(max_frames: int, *, config: CSMConfig) -> None:
    """Checks that a model can make so many frames at all, after some prompt.

    Raises:
        TypeError: It is not an integer.
        ValueError: It cannot; the message is in the user's words, milliseconds.
    """
    if isinstance(max_frames, bool) or not hasattr(max_frames, "__index__"):
        raise TypeError(f"max_frames must be an integer, got {max_frames!r}")
    max_seq_len = config.backbone.max_seq_len
    if not 1 <= max_frames < max_seq_len:
        raise ValueError(
            f"max_audio_length_ms must be between {FRAME_MS} and {(max_seq_len - 1) * FRAME_MS:,}, "
            f"less {FRAME_MS} for each position that text and context take ({max_seq_len=:,}), "
            f"got {max_frames * FRAME_MS:,}"
        )


def build_prompt(
    tokenizer: TextTokenizer,
    codec: AudioEncoder,
    *,
    context: Sequence[Segment],
    text: str,
    speaker: int,
    config: CSMConfig,
    max_frames: int,
    truncate_context: bool,
    before: int = 0,
) -> Prompt:
    """Returns the prompt for `text` spoken by `speaker` after `context`.

    The prompt must leave room for the answer: fewer than `max_seq_len - max_frames` positions, the
    reference's rule. Lengths are settled before any audio is resampled or encoded. Segments that are
    left out are logged at level INFO.

    Args:
        tokenizer: The text tokenizer.
        codec: Encodes the context's audio: a codec, or an `EncodeCache` around one.
        context: The earlier turns, oldest first.
        text: What to say.
        speaker: Who says it.
        config: The model's sizes.
        max_frames: The most frames that will be generated.
        truncate_context: Whether to leave out whole segments, oldest first, where they do not fit.
        before: Positions that a voice takes before all of it.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is bad, or the prompt is too long.
    """
    check_max_frames(max_frames, config=config)
    max_seq_len = config.backbone.max_seq_len
    turn = encode_text(tokenizer, text, speaker, config=config)
    texts, sounds, lengths = [], [], []
    for index, segment in enumerate(context):
        name = f"context[{index}]"
        if not isinstance(segment, Segment):
            raise TypeError(f"{name} must be a Segment, got {type(segment).__name__}")
        texts.append(
            encode_text(
                tokenizer, segment.text, segment.speaker, config=config, name=f"{name}.text"
            )
        )
        sound, length = _check_sound(segment, name, config)
        sounds.append(sound)
        lengths.append(len(texts[-1][0]) + length)

    limit, dropped = max_seq_len - max_frames - before, 0
    positions = sum(lengths) + len(turn[0])
    while truncate_context and positions >= limit and dropped < len(lengths):
        positions -= lengths[dropped]
        dropped += 1
    if positions >= limit:
        raise ValueError(_too_long(positions, len(turn[0]), max_frames, max_seq_len, before))
    if dropped:
        logger.info("left out the oldest %d of %d context turns to fit", dropped, len(lengths))

    parts = []
    for text_part, sound in zip(texts[dropped:], sounds[dropped:], strict=True):
        parts += [text_part, _encode_sound(codec, sound, config)]
    parts.append(turn)
    frames = np.concatenate([frames for frames, _ in parts])
    if len(frames) != positions:
        raise ValueError(
            f"the codec gave {len(frames) - positions:+,} frames more than one per "
            f"{SAMPLES_PER_FRAME:,} samples: it is not Mimi"
        )
    return Prompt(frames, np.concatenate([mask for _, mask in parts]), dropped)


def _too_long(positions: int, own: int, max_frames: int, max_seq_len: int, voice: int) -> str:
    # In the caller's words: a position is a text token or 80 ms of audio, asked for or in the context.
    message = (
        f"the text ({own:,} positions) and the context ({positions - own:,}) do not fit beside "
        f"max_audio_length_ms={max_frames * FRAME_MS:,} ({max_frames:,}): the model holds "
        f"{max_seq_len=:,} positions{f', of which the voice takes {voice:,}' if voice else ''}"
    )
    room = max_seq_len - voice
    excess = positions - (room - max_frames) + 1
    remedies = []
    if positions - own >= excess:
        remedies.append(f"drop {excess:,} positions of context (truncate_context drops the oldest)")
    elif own < room - 1:
        remedies.append("shorten the text")
    if positions < room - 1:
        most = (room - 1 - positions) * FRAME_MS
        remedies.append(f"lower max_audio_length_ms to at most {most:,}")
    return f"{message}; {' or '.join(remedies) or 'say it in several turns'}"
