"""The rows of an evaluation: spoken by the engine, then heard and measured one after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from csm_jax.audio import read_audio, write_audio
from csm_jax.corpus.manifest import Row, key_of
from csm_jax.eval.manifest import fact_of
from csm_jax.eval.metrics import (
    Agreement,
    AudioFacts,
    Errors,
    align,
    audio_facts,
    count_errors,
    repeats,
    words_of,
)
from csm_jax.eval.recognisers import Recogniser
from csm_jax.runaway import Flags, is_silent

if TYPE_CHECKING:
    from csm_jax.request import Request

AUDIO = "audio"
"""Directory of what was spoken."""

Prepare = Callable[[Row], tuple["Request", Sequence[str]]]
"""Makes a request of a row, such as `csm_jax.corpus.requests.RequestMaker`; may raise ValueError,
TypeError or OSError: that row then fails alone."""


@runtime_checkable  # the tests check annotations at run time
class Synthesizer(Protocol):
    """The part of `csm_jax.synthesizer.Synthesizer` that is used here."""

    @property
    def sample_rate(self) -> int:
        """Hertz of its audio."""
        ...

    def run(self, requests: Iterable[tuple[Hashable, Any]]) -> Iterator[Any]:
        """Yields results with `id`, `audio`, `codes`, `finish_reason`, `flags`, `redraws`, `error`."""
        ...


@dataclass(kw_only=True)
class Spoken:
    """What there is of a row before it is heard.

    Attributes:
        audio: The recording; None where nothing was said, or it failed.
        finish_reason: Why it ended; None where nobody knows.
        flags: What the engine has found; None likewise.
        redraws: How often it was drawn again.
        codes: int32 [n, C], of what was spoken here.
        error: Why it failed.
    """

    audio: Path | None
    finish_reason: str | None = None
    flags: tuple[str, ...] | None = None
    redraws: int = 0
    codes: np.ndarray | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast rows were spoken, all of them together, without loading and compiling."""

    wall_s: float
    audio_s: float


@dataclass(kw_only=True)
class Measured:
    """All that is known of a row.

    Attributes:
        id: Of the row.
        speaker: Who was to speak.
        text: What was to be said.
        own: Its words.
        said: The words that it is compared with: `own`, unless texts are shuffled.
        spoken: What there is of it.
        heard: The recogniser's words, as they are compared; None without one.
        words: Errors; None without a recogniser.
        characters: Likewise, of the words with a space between them.
        repeated: Words that were heard again at once, beyond those that the text has so; likewise.
        facts: Of the recording; None where there is none.
        stopped: Whether the model ended it by itself; None where nobody knows.
        looped: Whether it repeats itself, by its codes; None likewise.
        silent: Whether there is no sound in it, or a silence of more than 3 s.
        watermarked: Whether it carries the key; None if nobody looked.
        agreement: With another model's codes; None without one.
        error: Why nothing could be measured.
    """

    id: str
    speaker: int
    text: str
    own: Sequence[str]
    said: Sequence[str]
    spoken: Spoken
    heard: Sequence[str] | None = None
    words: Errors | None = None
    characters: Errors | None = None
    repeated: int | None = None
    facts: AudioFacts | None = None
    stopped: bool | None = None
    looped: bool | None = None
    silent: bool | None = None
    watermarked: bool | None = None
    agreement: Agreement | None = None
    error: str | None = field(default=None)


def speak(
    rows: Sequence[Row],
    synthesizer: Synthesizer,
    prepare: Prepare,
    directory: Path | None,
    *,
    on_row: Callable[[float], None] = lambda seconds: None,
) -> tuple[list[Spoken], Speed]:
    """Returns what a model has spoken, in the order of the rows, and how fast.

    Args:
        rows: What to say.
        synthesizer: What speaks, compiled.
        prepare: Makes requests.
        directory: Where the audio goes, `KEY.wav`; None keeps the codes alone.
        on_row: Called after every row with the seconds of its audio; may raise to stop.

    Raises:
        OSError: A file cannot be written.
    """
    done: dict[int, Spoken] = {}
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)

    def requests() -> Iterator[tuple[int, Any]]:
        for at, row in enumerate(rows):
            try:
                request, _ = prepare(row)
            except (ValueError, TypeError, OSError) as error:
                done[at] = Spoken(audio=None, error=str(error) or type(error).__name__)
                on_row(0.0)
                continue
            yield at, request

    busy = total = 0.0
    with contextlib.closing(_generator(synthesizer.run(requests()))) as results:
        while True:
            started = time.perf_counter()
            result = next(results, None)
            busy += time.perf_counter() - started
            if result is None:
                break
            path = None
            if result.audio is not None and len(result.audio):
                seconds = len(result.audio) / synthesizer.sample_rate
                if directory is not None:
                    path = directory / f"{key_of(rows[result.id]['id'])}.wav"
                    write_audio(path, result.audio, synthesizer.sample_rate)
            else:
                seconds = 0.0
            total += seconds
            done[result.id] = Spoken(
                audio=path,
                finish_reason=result.finish_reason,
                flags=tuple(result.flags),
                redraws=result.redraws,
                codes=result.codes,
                error=result.error,
            )
            on_row(seconds)
    if lost := [row["id"] for at, row in enumerate(rows) if at not in done]:
        raise RuntimeError(f"the synthesizer gave no answer for rows {lost[:5]}")
    return [done[at] for at in range(len(rows))], Speed(wall_s=busy, audio_s=total)


def _generator(results: Iterator[Any]) -> Generator[Any, None, None]:
    # `contextlib.closing` needs something that closes, and closing this closes a generator below.
    yield from results


def recorded(row: Row, audio: Path | None) -> Spoken:
    """Returns what there is of a row that was recorded, or spoken earlier."""
    reason, flags = fact_of(row, "finish_reason"), fact_of(row, "flags")
    return Spoken(
        audio=audio,
        finish_reason=reason if isinstance(reason, str) else None,
        flags=tuple(map(str, flags)) if isinstance(flags, list) else None,
    )


def shuffled(texts: Sequence[Sequence[str]], *, seed: int) -> list[Sequence[str]]:
    """Returns the texts in another order, so that each stands where another one stood: a negative control.

    Raises:
        ValueError: More than half of them are the same.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for place in map(int, np.random.default_rng(seed).permutation(len(texts))):
        groups.setdefault(tuple(texts[place]), []).append(place)
    most = max(map(len, groups.values()), default=0)
    if 2 * most > len(texts) or not texts:
        raise ValueError(
            "texts can be shuffled between sentences only if no more than half of them are the same"
        )
    # Equal ones side by side, and all moved on by the size of the largest group.
    order = [place for group in groups.values() for place in group]
    mixed: list[Sequence[str]] = list(texts)
    for here, there in zip(order, [*order[-most:], *order[:-most]], strict=True):
        mixed[here] = texts[there]
    return mixed


def measure(
    row: Row,
    spoken: Spoken,
    *,
    own: Sequence[str],
    said: Sequence[str],
    recogniser: Recogniser | None,
    language: str,
    is_marked: Callable[[np.ndarray, int], bool] | None = None,
) -> Measured:
    """Returns all that can be known of one row.

    A recording that cannot be read, or a row that failed before, is an error of this row alone.

    Args:
        row: Of the manifest.
        spoken: What there is of it.
        own: The words of its text.
        said: The words to compare with.
        recogniser: What hears; None measures the audio alone.
        language: Of the text.
        is_marked: Whether audio, at a rate, carries the watermark; None does not look.
    """
    found = Measured(
        id=row["id"],
        speaker=row["speaker"],
        text=row["text"],
        own=own,
        said=said,
        spoken=spoken,
        error=spoken.error,
    )
    if found.error is not None:
        return found
    audio, rate = np.zeros(0, np.float32), 1
    if spoken.audio is not None:
        try:
            audio, rate = read_audio(spoken.audio, mono="mean")
        except (ValueError, OSError) as error:
            found.error = str(error) or type(error).__name__
            return found
        found.facts = audio_facts(audio, rate)
    if spoken.finish_reason is not None:
        found.stopped = spoken.finish_reason == "eos"
    if spoken.flags is not None:
        found.looped = Flags.REPETITION in spoken.flags
        found.silent = Flags.SILENCE in spoken.flags or not audio.size
    else:
        found.silent = is_silent(audio, rate)
    if is_marked is not None:
        found.watermarked = bool(audio.size) and is_marked(audio, rate)
    if recogniser is not None:
        text = recogniser.hear(audio, rate) if audio.size else ""
        heard = words_of(text, language=language) if text.strip() else []
        found.heard = heard
        found.words = count_errors(align(said, heard))
        found.characters = count_errors(align(" ".join(said), " ".join(heard)))
        found.repeated = max(0, repeats(heard) - repeats(own))
    return found
