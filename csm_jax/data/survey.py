"""A first reading of training data, without any audio: what there is, and whether it can be tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from csm_jax.data.prepare import WHY_NOT
from csm_jax.data.sources import Item, Source

DEFAULT_SPLIT = "train"
"""The split of a line that names none."""


class BadLinesError(ValueError):
    """The source has lines that cannot be used.

    Attributes:
        listed: Where, and why.
    """

    def __init__(self, message: str, listed: Sequence[tuple[str, str]]):
        super().__init__(message)
        self.listed = listed


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a first reading finds, without opening any audio.

    Attributes:
        items: Of the source, bad ones included.
        kinds: How many of each kind.
        splits: Likewise of each split.
        bad: Where, and why.
    """

    items: int
    kinds: Mapping[str, int]
    splits: Mapping[str, int]
    bad: Sequence[tuple[str, str]]


def survey(source: Source, on_item: Callable[[], None] = lambda: None) -> Survey:
    """Returns what a source holds.

    Args:
        source: Read to its end.
        on_item: Called for each item; may raise to stop.

    Raises:
        OSError, ValueError: A file cannot be read at all.
    """
    kinds: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    bad: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    items = 0
    for item in source:
        on_item()
        items += 1
        bad += [(item.where, problem) for problem in problems_of(item, seen)]
        if item.conversation is not None:
            kinds[item.conversation.kind] += 1
            splits[item.conversation.split or DEFAULT_SPLIT] += 1
    return Survey(items=items, kinds=kinds, splits=splits, bad=bad)


def problems_of(item: Item, seen: dict[str, str]) -> list[str]:
    """Returns what is wrong with an item as it stands.

    Args:
        item: Of the source.
        seen: Where each id was; this one's is added.
    """
    found = list(item.problems)
    name = None if item.conversation is None else item.conversation.id
    if name is not None and seen.setdefault(name, item.where) != item.where:
        found.append(f"id {name!r} was used before, in {seen[name]}")
    return found


def check_survey(found: Survey, *, split: str | None, skip_bad: bool) -> None:
    """Checks that a source can be tokenised.

    Raises:
        BadLinesError: It has bad lines and they are not to be skipped, or lines of another kind.
        ValueError: It is empty, or has several splits and none is named.
    """
    for kind, name in WHY_NOT.items():
        if count := found.kinds.get(kind, 0):
            raise ValueError(
                f"{count:,} lines are not for fine-tuning, each is {name}: keep them in a file of their own"
            )
    if found.bad and not skip_bad:
        where, problem = found.bad[0]
        raise BadLinesError(
            f"{len({where for where, _ in found.bad}):,} of {found.items:,} lines are bad, the first "
            f"({where}): {problem}; correct them, or leave them out with "
            "`csm-jax data tokenize --skip-bad`",
            found.bad,
        )
    if split is None and len(found.splits) > 1:
        names = ", ".join(f"{name} ({count:,})" for name, count in sorted(found.splits.items()))
        raise ValueError(
            f"the lines are of several splits, {names}: name one with "
            "`csm-jax data tokenize --split`"
        )
    if split is not None and split not in found.splits:
        raise ValueError(f"no line is of the split {split!r}; there are {sorted(found.splits)}")
    if not found.kinds:
        raise ValueError("there is no conversation in it")
