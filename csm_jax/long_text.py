"""Long texts, spoken in pieces: each a request of its own that hears the last pieces before it.

    text ─normalise─▶ split_text ─▶ chunks ─▶ speak_chunks ─▶ SpokenChunk, SpokenChunk, ... ─▶ join_chunks

The model learned from turns of conversation and holds some 160 s of text and sound together, so a page
is not one turn. What a piece hears are the codes of those before it, not their audio: no encoding,
and no watermark in what the model reads. Every piece carries the watermark for itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from csm_jax import text as texts
from csm_jax.config import CSMConfig
from csm_jax.pipeline import GenerationError
from csm_jax.prompt import Segment, check_text, segment_positions
from csm_jax.request import MOST_FRAMES, Request
from csm_jax.runaway import Flags, frame_cap
from csm_jax.synthesizer import Result, redraw_seed

if TYPE_CHECKING:
    from csm_jax.pipeline import Generator, Progress
    from csm_jax.voices import Voice

logger = logging.getLogger(__name__)

_MARKS = 10  # tokens around a text: its begin and end, and the speaker in brackets
_FAULTS = {
    Flags.REPETITION: "repeats itself",
    Flags.SILENCE: "is silent for long",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class SpokenChunk:
    """A piece of a text and what became of it.

    Attributes:
        speaker: Who says it.
        text: What is said.
        pause: Samples of silence before it.
        audio: float32 [W]; empty if the model ended at once.
        codes: int32 [n, C].
        fault: What is wrong with it, if anything is; it was drawn again without success.
    """

    speaker: int
    text: str
    pause: int
    audio: np.ndarray
    codes: np.ndarray
    fault: str | None

    @property
    def segment(self) -> Segment:
        """The piece as context for what follows; only if it has audio."""
        return Segment(speaker=self.speaker, text=self.text, codes=self.codes)


def speak_long(
    generator: Generator,
    text: str,
    speaker: int,
    *,
    max_characters: int | None = texts.DEFAULT_MAX_CHARACTERS,
    normalise: bool = True,
    language: str = "en",
    **options: Any,
) -> np.ndarray:
    """Returns a text of any length as audio, float32 `[W]` at the generator's sample rate.

    A text that is one piece sounds as `Generator.generate` makes it, unless it runs away.

    Args:
        generator: What speaks.
        text: What to say.
        speaker: Speaker id.
        max_characters: As `split_text`.
        normalise: As `split_text`.
        language: As `split_text`.
        options: As `speak_chunks`.

    Raises:
        TypeError, ValueError, GenerationError: As `split_text` and `speak_chunks`.
    """
    chunks = split_text(
        text,
        max_characters=max_characters,
        normalise=normalise,
        language=language,
        config=generator.config,
    )
    return join_chunks(speak_chunks(generator, chunks, speaker, **options))


def split_text(
    text: str,
    *,
    max_characters: int | None = texts.DEFAULT_MAX_CHARACTERS,
    normalise: bool = True,
    language: str = "en",
    config: CSMConfig | None = None,
) -> list[texts.Chunk]:
    """Returns the pieces in which a text is spoken; one, and as it is, if it is no longer than a piece.

    Args:
        text: What to say.
        max_characters: The most of a piece; None makes all of it one.
        normalise: Whether to write it the way it is said (`csm_jax.text.normalise`).
        language: Of the text; used to normalise it.
        config: Sizes of a model, which may hold only shorter ones: its positions are shared by text,
            a token a character at worst, and speech (`csm_jax.runaway.frame_cap`).

    Raises:
        TypeError, ValueError: The text cannot be spoken, the language is not known, or
            `max_characters` is too small.
    """
    check_text(text, "the text")
    if normalise:
        text = texts.normalise(text, language=language)
    if max_characters is None:
        return [texts.Chunk(text, 0)]
    while True:
        pieces = [texts.Chunk(text, 0)]
        if len(text) > max_characters:
            pieces = texts.chunks(text, max_characters=max_characters)
        if config is None or max_characters < 2 * texts.LEAST_MAX_CHARACTERS:
            return pieces
        if all(_positions(piece.text) < config.backbone.max_seq_len for piece in pieces):
            return pieces
        max_characters //= 2


def _positions(text: str) -> int:
    return len(text) + _MARKS + min(frame_cap(text), MOST_FRAMES)


def speak_chunks(
    generator: Generator,
    chunks: Sequence[texts.Chunk],
    speaker: int,
    *,
    voice: Voice | None = None,
    context: Sequence[Segment] = (),
    context_chunks: int = 2,
    seed: int = 0,
    redraws: int = 1,
    max_audio_length_ms: float | None = None,
    on_progress: Progress | None = None,
    **settings: Any,
) -> Iterator[SpokenChunk]:
    """Yields each piece of a text as soon as it is spoken.

    A piece that ends at once, is flagged by `csm_jax.runaway`, or reaches the length that its text
    can need is drawn again. If that does not help, it stays, is no context for others, and is
    logged as a warning.

    Args:
        generator: What speaks.
        chunks: What to say: `split_text`.
        speaker: Speaker id.
        voice: A voice before the context.
        context: What came before, for every piece.
        context_chunks: How many of the last pieces follow the context; fewer where they do not fit.
        seed: That of the first piece; those of the others are made of it.
        redraws: How often a piece is drawn again.
        max_audio_length_ms: Longest audio of a piece; None takes what its text can need, and
            90 s at most.
        on_progress: Called with the frames so far, and the most there can be.
        settings: The other fields of `Request`. With `truncate_context` the oldest of context and
            pieces are left out where they do not fit.

    Raises:
        TypeError, ValueError: Bad input in any piece, raised by this call before anything is spoken.
        GenerationError: The model's scores were not finite.
    """
    for name, value in (("context_chunks", context_chunks), ("redraws", redraws)):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    requests = [
        Request(
            text=chunk.text,
            speaker=speaker,
            context=context,
            voice=voice,
            seed=_chunk_seed(seed, index),
            max_audio_length_ms=max_audio_length_ms,
            **settings,
        )
        for index, chunk in enumerate(chunks)
    ]
    reading = _Reading(
        generator=generator,
        requests=requests,
        lengths=generator.prompt_lengths(requests),
        pauses=[chunk.pause_ms * generator.sample_rate // 1000 for chunk in chunks],
        context_chunks=context_chunks,
        redraws=redraws,
        # A length that was asked for is reached on purpose.
        cap_is_fault=max_audio_length_ms is None,
        on_progress=on_progress,
    )
    return reading.run()


def join_chunks(spoken: Iterable[SpokenChunk]) -> np.ndarray:
    """Returns the audio of all pieces, float32 `[W]`, with the pauses between them."""
    parts = [np.zeros(0, np.float32)]
    for piece in spoken:
        parts += [np.zeros(piece.pause, np.float32), piece.audio]
    return np.concatenate(parts)


def _chunk_seed(seed: int, index: int) -> int:
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} piece {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclass(kw_only=True)
class _Reading:
    """The pieces of one text on their way."""

    generator: Generator
    requests: Sequence[Request]
    lengths: Sequence[int]
    pauses: Sequence[int]
    context_chunks: int
    redraws: int
    cap_is_fault: bool
    on_progress: Progress | None
    frames: int = 0

    def run(self) -> Iterator[SpokenChunk]:
        """Yields the pieces."""
        heard: list[Segment] = []
        pause, begun = 0, False
        for index, request in enumerate(self.requests):
            recent = self._fitting(index, heard)
            result, fault = self._draw(
                index, dataclasses.replace(request, context=[*request.context, *recent])
            )
            self.frames += len(result.codes)
            spoken = len(result.codes) > 0
            piece = SpokenChunk(
                speaker=request.speaker,
                text=request.text,
                pause=pause if begun and spoken else 0,
                audio=np.zeros(0, np.float32) if result.audio is None else result.audio,
                codes=result.codes,
                fault=fault,
            )
            if spoken and fault is None:
                heard.append(piece.segment)
            # Around a piece that is missing, the longer of its two pauses.
            pause = self.pauses[index] if spoken else max(pause, self.pauses[index])
            begun = begun or spoken
            yield piece

    def _fitting(self, index: int, heard: Sequence[Segment]) -> list[Segment]:
        """Returns the last pieces that a piece hears."""
        recent = list(heard[len(heard) - min(self.context_chunks, len(heard)) :])
        request, config = self.requests[index], self.generator.config
        if request.truncate_context:  # the prompt drops the oldest of all
            return recent
        room = config.backbone.max_seq_len - request.max_frames - self.lengths[index]
        tokenizer = self.generator.tokenizer
        sizes = [segment_positions(tokenizer, segment, config=config) for segment in recent]
        while sizes and sum(sizes) >= room:
            del sizes[0], recent[0]
        return recent

    def _draw(self, index: int, request: Request) -> tuple[Result, str | None]:
        """Returns the best draw of a piece, and what is wrong with it."""
        many = len(self.requests) > 1
        name = f"piece {index + 1} of {len(self.requests)}" if many else "the speech"
        result, fault = self._once(index, request)
        for attempt in range(1, self.redraws + 1):
            if fault is None:
                break
            logger.info("%s %s: it is drawn again", name, fault)
            seed = redraw_seed(request.seed, attempt)
            other, other_fault = self._once(index, dataclasses.replace(request, seed=seed))
            if other_fault is None or not len(result.codes):
                result, fault = other, other_fault
        if fault is not None:
            left_out = "" if len(result.codes) else " and is left out"
            logger.warning(
                "%s %s%s (%r); another seed may do", name, fault, left_out, request.text[:40]
            )
        return result, fault

    def _once(self, index: int, request: Request) -> tuple[Result, str | None]:
        later = sum(each.max_frames for each in self.requests[index + 1 :])

        def on_progress(done: int, most: int) -> None:
            if self.on_progress is not None:
                self.on_progress(self.frames + done, self.frames + most + later)

        [result] = self.generator.generate_results(
            [request], stop_repetition=True, on_progress=on_progress
        )
        if result.error is not None:
            raise GenerationError(f"{result.error} (in {request.text[:40]!r})", [None], [0])
        return result, self._fault(result)

    def _fault(self, result: Result) -> str | None:
        if not len(result.codes):
            return "ended at once, without audio"
        if result.flags:
            return " and ".join(_FAULTS.get(flag, flag) for flag in result.flags)
        if self.cap_is_fault and result.finish_reason == "length":
            return "went on to the end of its time"
        return None
