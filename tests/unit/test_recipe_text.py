"""The demo voice's words, sentences and tokenizer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from csm_jax.config import tiny
from csm_jax.prompt import TextTokenizer, encode_text
from recipes.demo_voice import text as recipe
from recipes.demo_voice.text import HELD_OUT, TEMPLATES, VOCABULARY, Sentence, sentences, words_of
from recipes.demo_voice.tokenizer import CHARACTERS, build_tokenizer, main, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train() -> list[Sentence]:
    return list(islice(sentences("train"), 20_000))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.from_file(
        write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "deep" / "tokenizer.json")
    )


def runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {
        words[first : first + count]
        for count in range(1, len(words) + 1)
        for first in range(len(words) - count + 1)
    }


# --- words and sentences -----------------------------------------------------------------------


def test_the_vocabulary_is_of_a_size_that_can_be_learnt() -> None:
    assert 150 <= len(VOCABULARY) <= 200
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


@pytest.mark.parametrize(
    "alike",
    [
        ("to", "too", "two"),
        ("for", "four"),
        ("one", "won"),
        ("ate", "eight"),
        ("know", "no"),
        ("hear", "here"),
        ("by", "buy", "bye"),
        ("red", "read"),
        ("blue", "blew"),
        ("write", "right"),
        ("see", "sea"),
        ("our", "hour", "are"),
        ("there", "their"),
        ("son", "sun"),
        ("eye", "i"),
        ("would", "wood"),
        ("flour", "flower"),
        ("new", "knew"),
    ],
)
def test_no_two_words_sound_alike(alike: tuple[str, ...]) -> None:
    assert len(set(alike) & set(VOCABULARY)) <= 1


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_held_out_split_has_both_kinds_in_turn(split: recipe.Split) -> None:
    found = list(sentences(split))
    assert len(found) == HELD_OUT >= 300
    assert [each.kind for each in found] == ["random", "template"] * (HELD_OUT // 2)
    assert len({each.words for each in found}) == HELD_OUT


def test_nothing_held_out_is_in_the_training_text(train: list[Sentence]) -> None:
    held_out = {each.words for split in ("dev", "test") for each in sentences(split)}
    assert len(held_out) == 2 * HELD_OUT
    for sentence in train:
        assert held_out.isdisjoint(runs(sentence.words)), sentence


def test_nothing_of_one_held_out_split_is_in_the_other() -> None:
    dev, test = ([each.words for each in sentences(split)] for split in ("dev", "test"))
    for one, other in ((dev, test), (test, dev), (dev, dev), (test, test)):
        wanted = set(one)
        for words in other:
            assert wanted & (runs(words) - {words} if one is other else runs(words)) == set()


def test_a_small_change_of_the_rule_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training text avoids what is held out, rather than missing it by luck."""
    monkeypatch.setattr(recipe, "_runs", lambda words: {tuple(words)[:1]})
    held_out = {each.words for split in ("dev", "test") for each in sentences(split)}
    assert any(held_out & runs(each.words) for each in islice(sentences("train"), 20_000))


def test_no_sentence_of_training_is_said_twice(train: list[Sentence]) -> None:
    assert len({each.words for each in train}) == len(train)


def test_random_sentences_say_all_words_equally_often(train: list[Sentence]) -> None:
    spoken = [each for each in train if each.kind == "random"]
    assert 0.6 < len(spoken) / len(train) < 0.7
    counts = Counter(word for each in spoken for word in each.words)
    assert set(counts) == set(VOCABULARY)
    assert max(counts.values()) - min(counts.values()) <= 1  # the last deck is cut
    assert {len(each.words) for each in spoken} == set(range(3, 11))


def test_templates_say_every_word_and_no_other(train: list[Sentence]) -> None:
    made = [each for each in train if each.kind == "template"]
    assert {word for each in made for word in each.words} == set(VOCABULARY)
    assert max(len(each.words) for each in made) <= 13
    for each in made:
        assert " a orange" not in each.text
        assert " a old" not in each.text
        assert "{" not in each.text
    assert any(each.text.startswith("hello, my name is ") for each in made)


def test_every_template_is_used(train: list[Sentence]) -> None:
    # By their beginnings, up to the first slot.
    for template in TEMPLATES:
        begin = template.split("{")[0]
        assert any(begin in each.text for each in train), template


def test_texts_hold_nothing_but_what_the_tokenizer_knows(train: list[Sentence]) -> None:
    assert set("".join(each.text for each in train)) <= set(CHARACTERS)
    assert {"?", ",", "."} <= set("".join(each.text for each in train))


def test_a_split_is_the_same_in_every_process(train: list[Sentence]) -> None:
    program = (
        "from itertools import islice; from recipes.demo_voice.text import sentences\n"
        "for s in ('dev', 'test', 'train'):\n"
        "    for each in islice(sentences(s), 300): print(each.text)"
    )
    texts = [each.text for s in ("dev", "test", "train") for each in islice(sentences(s), 300)]
    said = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == texts
    assert texts[600:] == [each.text for each in train[:300]]


def test_words_of_leaves_punctuation_out() -> None:
    assert words_of("Hello, don't open the Red book.") == (
        *("hello", "don't", "open", "the", "red", "book"),
    )


# --- tokenizer ---------------------------------------------------------------------------------


def decoded(tokenizer: TextTokenizer, text: str) -> str:
    return build_tokenizer().decode(tokenizer.encode(text), skip_special_tokens=True)


def test_a_prompt_is_one_token_per_character(tokenizer: TextTokenizer) -> None:
    config = tiny()
    frames, mask = encode_text(tokenizer, "hello, world.", 1, config=config)
    assert frames.shape == (len("[1]hello, world.") + 2, config.num_codebooks + 1)
    assert mask[:, -1].all()
    ids = frames[:, -1]
    built = build_tokenizer()
    assert [built.id_to_token(int(each)) for each in ids[[0, -1]]] == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ]
    assert "".join(built.id_to_token(int(each)) or "?" for each in ids[1:-1]) == "[1]hello, world."


def test_the_file_puts_the_end_tokens_there_by_itself() -> None:
    built = build_tokenizer()
    assert built.get_vocab_size() == len(CHARACTERS) + 2 == 45
    ids = built.encode("[0]i am").ids
    assert ids[0] == built.token_to_id("<|begin_of_text|>")
    assert ids[-1] == built.token_to_id("<|end_of_text|>")
    assert built.decode(ids) == "[0]i am"
    assert sorted(built.get_vocab().values()) == list(range(45))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Hello World", "hello world"),
        ("Don’t go!", "don't go."),
        ("twenty-one — or not; yes: no…", "twenty one, or not, yes, no."),
        ("one - two", "one, two"),
        ("Café “déjà vu”", "cafe deja vu"),
        ("a\tb\nc   d", "a b c d"),
        ("what ?", "what?"),
        ("what?! no!!", "what? no."),
        ("100 % sure #1", "100 sure 1"),
        ("(really) *very* good", "really very good"),
        ("日本 hello", " hello"),
        ("🎉", ""),
    ],
)
def test_other_marks_become_known_ones_or_nothing(
    tokenizer: TextTokenizer, text: str, read: str
) -> None:
    assert decoded(tokenizer, f"[0]{text}") == f"[0]{read}"


def test_every_text_can_be_encoded(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.integers(1, 0x10FFFF, 20)
        text = "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)
        assert set(decoded(tokenizer, text)) <= set(CHARACTERS)


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "t" / "tokenizer.json"
    assert main(["--out", str(target)]) == 0
    assert "45 tokens" in capsys.readouterr().out
    before = target.read_bytes()
    assert main(["--out", str(target)]) == 0
    assert target.read_bytes() == before
    assert main(["--out", str(target / "x")]) == 1
    assert "tokenizer.json" in capsys.readouterr().err
