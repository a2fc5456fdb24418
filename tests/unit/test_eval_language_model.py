"""Language models whose probabilities add up, and dictionaries cut to their words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from csm_jax.eval.language_model import END, START, bigram, dictionary, read_pronunciations, unigram

SENTENCES = [["a", "b"], ["a", "c", "b"], ["b"], []]


def parse(text: str) -> tuple[dict[str, tuple[float, float]], dict[tuple[str, str], float]]:
    """Returns (probability, back-off weight) by word, and the probabilities of pairs."""
    sections = dict(re.findall(r"\\(data|\d-grams):?\\?\n(.*?)\n\n", text, re.DOTALL))
    counts = dict(re.findall(r"ngram (\d)=(\d+)", sections["data"]))
    ones, twos = {}, {}
    for line in sections["1-grams"].splitlines():
        log, word, *weight = line.split("\t")
        ones[word] = (10 ** float(log), 10 ** float(weight[0]) if weight else 1.0)
    for line in sections.get("2-grams", "").splitlines():
        log, words = line.split("\t")
        twos[tuple(words.split())] = 10 ** float(log)
    assert int(counts["1"]) == len(ones)
    assert int(counts.get("2", 0)) == len(twos)
    assert text.endswith("\\end\\\n")
    return ones, twos


def test_after_every_word_the_probabilities_add_up_to_one() -> None:
    ones, twos = parse(bigram(SENTENCES))
    assert set(ones) == {START, END, "a", "b", "c"}
    for before in (START, "a", "b", "c"):
        whole = sum(
            twos.get((before, word), ones[before][1] * ones[word][0])
            for word in ones
            if word != START
        )
        assert whole == pytest.approx(1.0, abs=1e-4)


def test_a_bigram_is_that_worked_by_hand() -> None:
    ones, twos = parse(bigram(SENTENCES))
    # 9 words with the ends: a 2, b 3, c 1, end 3. After "a": b once, c once of 2; 0.5 taken from each.
    assert ones["b"][0] == pytest.approx(3 / 9, abs=1e-5)
    assert ones["a"][1] == pytest.approx(0.5, abs=1e-5)
    assert twos["a", "b"] == pytest.approx(0.5 / 2 + 0.5 * 3 / 9, abs=1e-5)
    assert twos[START, "b"] == pytest.approx(0.5 / 3 + (2 * 0.5 / 3) * 3 / 9, abs=1e-5)
    assert ("c", "a") not in twos


def test_a_unigram_finds_all_words_equally_likely() -> None:
    ones, twos = parse(unigram(["b", "a", "b"]))
    assert not twos
    assert {word: round(p, 4) for word, (p, _) in ones.items() if word != START} == {
        "a": 0.3333,
        "b": 0.3333,
        END: 0.3333,
    }


def test_without_words_there_is_no_model() -> None:
    with pytest.raises(ValueError, match="needs sentences with words"):
        bigram([[]])
    with pytest.raises(ValueError, match="sentences of several words"):
        bigram([["one"], ["two"]])
    with pytest.raises(ValueError, match="needs words"):
        unigram([])


def test_a_dictionary_has_the_words_and_all_their_variants(tmp_path: Path) -> None:
    path = tmp_path / "d.dict"
    path.write_text(";;; a comment\na AH\na(2) EY\n\nB B IY\n# another\n")
    known = read_pronunciations(path)
    assert known == {"a": ["AH", "EY"], "b": ["B IY"]}
    assert dictionary(["b", "a", "a"], known) == "a AH\na(2) EY\nb B IY\n"
    assert dictionary(["b", "a"], {"b": ["B"]}, known) == "a AH\na(2) EY\nb B\n"


def test_words_without_a_pronunciation_are_all_listed() -> None:
    with pytest.raises(ValueError, match=r"2 words have no pronunciation .*: bb, zz; .*--pronun"):
        dictionary(["zz", "a", "bb"], {"a": ["AH"]})


@pytest.mark.parametrize("content", [b"a AH\nb\n", b"\xff\xfe\n"])
def test_a_bad_dictionary_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.dict"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.dict is no pronunciation dictionary"):
        read_pronunciations(path)
    with pytest.raises(FileNotFoundError, match="no pronunciations at"):
        read_pronunciations(tmp_path / "none")
