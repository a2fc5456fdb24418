"""Error rates against cases worked by hand, and the measures of audio, codes and uncertainty."""

from __future__ import annotations

import numpy as np
import pytest

from csm_jax.eval import metrics
from csm_jax.eval.metrics import Errors, align, count_errors, repeats, words_of


def errors(said: str, heard: str) -> Errors:
    return count_errors(align(said.split(), heard.split()))


@pytest.mark.parametrize(
    ("said", "heard", "hits", "substitutions", "deletions", "insertions"),
    [
        ("the cat sat", "the cat sat", 3, 0, 0, 0),
        ("the cat sat", "", 0, 0, 3, 0),
        ("the cat sat", "the bat sat", 2, 1, 0, 0),
        ("the cat sat", "the sat", 2, 0, 1, 0),
        ("the cat sat", "the big cat sat down", 3, 0, 0, 2),
        # x for two, five missing, eight besides
        ("one two three four five six seven", "one x three four six seven eight", 5, 1, 1, 1),
        ("one", "two three four", 0, 1, 0, 2),
    ],
)
def test_word_errors_are_those_worked_by_hand(
    said: str, heard: str, hits: int, substitutions: int, deletions: int, insertions: int
) -> None:
    found = errors(said, heard)
    assert found == Errors(
        hits=hits, substitutions=substitutions, deletions=deletions, insertions=insertions
    )
    assert found.length == len(said.split())
    assert found.count == substitutions + deletions + insertions


def test_characters_are_counted_in_the_same_way() -> None:
    # kitten, sitting: k to s, e to i, g at the end
    found = count_errors(align("kitten", "sitting"))
    assert (found.substitutions, found.deletions, found.insertions, found.length) == (2, 0, 1, 6)


def test_an_alignment_goes_through_both() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        said, heard = (list(rng.choice(["a", "b", "c"], rng.integers(0, 9))) for _ in range(2))
        steps = align(said, heard)
        assert [word for step in steps for word in step.said] == said
        assert [word for step in steps for word in step.heard] == heard
        for step in steps:
            assert (step.kind == "equal") == (step.said == step.heard)
            if step.kind == "replace":
                assert len(step.said) == len(step.heard)
        assert count_errors(steps).count == distance(said, heard)


def distance(one: list[str], other: list[str]) -> int:
    """The textbook's table."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        before, row = row, [i]
        for j, right in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (left != right)))
    return row[-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World!", "hello world"),
        ("It’s 20 % of 'that'.", "it's twenty percent of that"),
        ("Dr. Smith's twenty-one cats", "doctor smith's twenty one cats"),
        ("ＦＵＬＬ width", "full width"),
        ("...", ""),
        ("", ""),
        # What the default recogniser writes stays as it is.
        ("i saw a st may no in am dr one", "i saw a st may no in am dr one"),
    ],
)
def test_words_are_compared_as_they_are_said(text: str, words: str) -> None:
    assert words_of(text) == words.split()


def test_words_of_other_languages_keep_their_letters() -> None:
    assert words_of("Über 3 Straßen!", language="de") == ["über", "drei", "straßen"]
    assert words_of("हिन्दी में", language="hi") == ["हिन्दी", "में"]  # marks belong to their letters
    with pytest.raises(ValueError, match="language must be one of"):
        words_of("a", language="xx")


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("", 0),
        ("a b c", 0),
        ("a a", 1),
        ("a a a", 2),
        ("a b a b c", 2),
        ("a b c a b", 0),
        ("the red dog the red dog ran", 3),
        ("a b a", 0),
    ],
)
def test_words_said_again_at_once_are_counted(words: str, count: int) -> None:
    assert repeats(words.split()) == count


def test_audio_facts_leave_the_silence_around_out() -> None:
    rate = 8_000
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * rate).astype(np.float32)
    parts = [np.zeros(rate // 2, np.float32), noise, np.zeros(rate, np.float32)]
    facts = metrics.audio_facts(np.concatenate(parts), rate)
    assert facts.seconds == 3.5
    assert facts.spoken_s == pytest.approx(2.0, abs=0.05)
    assert facts.trailing_silence_s == pytest.approx(1.0, abs=0.03)
    assert facts.longest_silence_s == pytest.approx(1.0, abs=0.03)
    silent = metrics.audio_facts(np.zeros(rate, np.float32), rate)
    assert (silent.spoken_s, silent.seconds) == (0.0, 1.0)


def test_codes_agree_codebook_by_codebook() -> None:
    one = np.arange(12).reshape(4, 3)
    other = one.copy()
    assert metrics.agreement(one, other).first_difference is None
    other[2, 1] += 1
    found = metrics.agreement(one, other)
    assert (found.equal, found.frames, found.first_difference) == ((4, 3, 4), 4, 2)
    longer = metrics.agreement(one[:2], one)
    assert (longer.equal, longer.frames, longer.first_difference) == ((2, 2, 2), 2, 2)
    empty = metrics.agreement(one[:0], one)
    assert (empty.equal, empty.frames, empty.first_difference) == ((0, 0, 0), 0, 0)
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[4, 2\]"):
        metrics.agreement(one, one[:, :2])


def test_the_bootstrap_is_that_of_ratios_of_sums() -> None:
    # Half of 100 sentences of one word are wrong: a binomial's 0.5 ± 1.96 · 0.05.
    low, high = metrics.bootstrap([0, 1] * 50, [1] * 100, seed=0)
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.015)
    uneven = (range(50), range(50, 100))
    assert metrics.bootstrap(*uneven, seed=3) == metrics.bootstrap(*uneven, seed=3)
    assert metrics.bootstrap(*uneven, seed=3) != metrics.bootstrap(*uneven, seed=4)
    # The same share in every sentence leaves nothing to chance, whatever their lengths.
    assert metrics.bootstrap([1, 2, 4], [5, 10, 20], seed=0) == (0.2, 0.2)
    # One long sentence that is all wrong weighs as many words as it has.
    low, high = metrics.bootstrap([90, 0], [90, 10], seed=0)
    assert (low, high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="sentences that hold something"):
        metrics.bootstrap([], [], seed=0)
    with pytest.raises(ValueError, match="sentences that hold something"):
        metrics.bootstrap([0, 0], [0, 0], seed=0)


def test_the_interval_of_a_share() -> None:
    assert metrics.wilson(200, 200) == pytest.approx((0.98116, 1.0), abs=1e-5)
    assert metrics.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert metrics.wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    for count, total in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="a share needs"):
            metrics.wilson(count, total)
