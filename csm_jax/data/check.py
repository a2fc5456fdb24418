"""Reads training data to the end, audio included, and tells all that is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from csm_jax.config import CSMConfig
from csm_jax.data.conversations import Conversation, SchemaError
from csm_jax.data.prepare import prepare, read_parts
from csm_jax.data.sources import Source
from csm_jax.data.survey import DEFAULT_SPLIT, problems_of
from csm_jax.prompt import TextTokenizer


@dataclass(kw_only=True)
class Findings:
    """What a source holds.

    Attributes:
        items: All, bad ones included.
        bad: How many of them are bad.
        kinds: Good ones of each kind.
        splits: Of the good ones of kind "speech", how many of each split.
        langs: Likewise of each language.
        turns: Of those, the messages that are kept.
        frames: Their frames of audio.
        trained_frames: Those that are trained.
        dropped: Messages of context that do not fit.
        lengths: Positions of each conversation.
    """

    items: int = 0
    bad: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    langs: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    frames: int = 0
    trained_frames: int = 0
    dropped: int = 0
    lengths: list[int] = field(default_factory=list)


def check(
    source: Source,
    *,
    tokenizer: TextTokenizer,
    config: CSMConfig,
    max_length: int,
    on_problem: Callable[[str, str], None],
    on_item: Callable[[], None] = lambda: None,
) -> Findings:
    """Returns what there is, after calling `on_problem` with where and why for all that is wrong.

    Args:
        source: Read to its end, with all its audio.
        tokenizer: Text to ids.
        config: The model's sizes.
        max_length: Positions of a row.
        on_problem: Called at once for each problem.
        on_item: Called for each item; may raise to stop.

    Raises:
        OSError, ValueError: A file cannot be read at all.
    """
    found, seen = Findings(), {}
    for item in source:
        on_item()
        problems = problems_of(item, seen)
        if item.conversation is not None:
            try:
                _add(item.conversation, found, tokenizer, config, max_length, good=not problems)
            except SchemaError as error:
                problems += error.problems
        found.items += 1
        found.bad += bool(problems)
        for problem in problems:
            on_problem(item.where, problem)
    return found


def _add(
    conversation: Conversation,
    found: Findings,
    tokenizer: TextTokenizer,
    config: CSMConfig,
    max_length: int,
    *,
    good: bool,
) -> None:
    if conversation.kind != "speech":
        read_parts(conversation, tokenizer, config=config, max_length=max_length)
        found.kinds[conversation.kind] += good
        return
    ready = prepare(conversation, tokenizer, config=config, max_length=max_length)
    if not good:
        return
    found.kinds[conversation.kind] += 1
    found.splits[conversation.split or DEFAULT_SPLIT] += 1
    found.langs[conversation.lang or ""] += 1
    found.turns += len(ready.messages)
    found.frames += ready.frames
    found.trained_frames += ready.trained_frames
    found.dropped += ready.dropped
    found.lengths.append(ready.positions)
