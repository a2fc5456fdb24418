"""A conversation made ready for a row: its text as ids, its audio read, its oldest context dropped to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.data.conversations import Conversation, Message, SchemaError
from csm_jax.data.examples import Example, TooLongError, Turn, kept_from, turn_positions
from csm_jax.data.sounds import frames_of, read_sound
from csm_jax.prompt import TextTokenizer, encode_text

WHY_NOT = {
    "preference": "a preference (it has chosen and rejected)",
    "prompt": "a prompt for reinforcement learning (its last message has no audio)",
}
"""What a line that is not for fine-tuning is called."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ready:
    """A conversation whose audio only has to be encoded.

    Attributes:
        texts: Token ids of each message.
        sounds: Its audio, float32 [W] at 24 kHz, or its codes uint16 [n, C].
        messages: What they were.
        source: The conversation.
        dropped: How many of its oldest messages were left out to fit.
    """

    texts: tuple[np.ndarray, ...]
    sounds: tuple[np.ndarray, ...]
    messages: tuple[Message, ...]
    source: Conversation
    dropped: int

    @property
    def frames(self) -> int:
        """Frames of audio."""
        return sum(frames_of(sound) for sound in self.sounds)

    @property
    def trained_frames(self) -> int:
        """Frames of audio that are trained."""
        pairs = zip(self.messages, self.sounds, strict=True)
        return sum(frames_of(sound) for message, sound in pairs if message.trained)

    @property
    def positions(self) -> int:
        """Positions of a row."""
        pairs = zip(self.texts, self.sounds, strict=True)
        return sum(turn_positions(len(text), frames_of(sound)) for text, sound in pairs)

    def example(self, codes: list[np.ndarray]) -> Example:
        """Returns the example, given each message's codes [n, C].

        Raises:
            ValueError: Some codes are not those of all of the message's audio.
        """
        for sound, own in zip(self.sounds, codes, strict=True):
            # Where text stands for more than is heard, a model learns to leave out words.
            if len(own) != frames_of(sound):
                raise ValueError(
                    f"the codec gave {len(own):,} frames for audio of {frames_of(sound):,}: it is not Mimi"
                )
        facts: dict[str, Any] = {
            "texts": [message.text for message in self.messages],
            "speakers": [message.speaker for message in self.messages],
        }
        facts |= {name: given for name in ("id", "lang") if (given := getattr(self.source, name))}
        turns = tuple(
            Turn(
                text=text,
                codes=own.astype(np.uint16),
                trained=message.trained,
                weight=self.source.weight,
            )
            for text, own, message in zip(self.texts, codes, self.messages, strict=True)
        )
        return Example(turns=turns, facts=facts)


def read_parts(
    conversation: Conversation, tokenizer: TextTokenizer, *, config: CSMConfig, max_length: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the token ids of each message, and the audio of each that has one.

    Args:
        conversation: Of any kind.
        tokenizer: Text to ids.
        config: The model's sizes.
        max_length: Positions of a row, and so the most frames of one audio.

    Raises:
        SchemaError: All that is wrong with texts and audio.
    """
    problems: list[str] = []
    texts: list[np.ndarray] = []
    sounds: list[np.ndarray] = []
    for i, message in enumerate(conversation.messages):
        try:
            frames, _ = encode_text(
                tokenizer, message.text, message.speaker, config=config, name=f"message {i}: text"
            )
            texts.append(frames[:, -1])
        except (TypeError, ValueError) as error:
            problems.append(str(error))
        if message.sound is None:
            continue
        try:
            sounds.append(
                read_sound(message.sound, conversation.base, config=config, max_frames=max_length)
            )
        except (OSError, TypeError, ValueError) as error:
            problems.append(f"message {i}: {error}")
    if problems:
        raise SchemaError(problems)
    return texts, sounds


def prepare(
    conversation: Conversation, tokenizer: TextTokenizer, *, config: CSMConfig, max_length: int
) -> Ready:
    """Returns a conversation made ready; see `read_parts`.

    Raises:
        SchemaError: It is not of kind "speech", all that is wrong with its texts and its audio, or it
            does not fit into a row.
    """
    if conversation.kind != "speech":
        raise SchemaError([f"it is {WHY_NOT[conversation.kind]}, not for fine-tuning"])
    texts, sounds = read_parts(conversation, tokenizer, config=config, max_length=max_length)
    positions = [
        turn_positions(len(text), frames_of(sound))
        for text, sound in zip(texts, sounds, strict=True)
    ]
    trained = [message.trained for message in conversation.messages]
    try:
        first = kept_from(positions, trained, max_length)
    except TooLongError as error:
        raise SchemaError([str(error)]) from error
    return Ready(
        texts=tuple(texts[first:]),
        sounds=tuple(sounds[first:]),
        messages=conversation.messages[first:],
        source=conversation,
        dropped=first,
    )
