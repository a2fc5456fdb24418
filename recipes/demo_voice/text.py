"""What the demo voice reads: sentences of random words, and grammatical ones made from templates.

Random words in random order keep a model from guessing what comes next instead of reading it. They are
dealt like cards, so that every word is said equally often. What is held out for development and for the
last test never occurs in the training text, neither as a sentence nor within a longer one.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from recipes.demo_voice.words import GROUPS, VOCABULARY

HELD_OUT = 500
"""Sentences of each of the splits `dev` and `test`, half random and half from templates."""
MIN_WORDS, MAX_WORDS = 3, 10
"""Of a random sentence."""

Kind = Literal["random", "template"]
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("dev", "test", "train")

_SEED = "demo voice"
_RANDOM_PER_TEMPLATE = 2
_COMMA, _FULL_STOP = 0.3, 0.5  # shares of the random sentences that have them
_OPENED, _JOINED = 0.15, 0.1  # shares of the template sentences
_MAX_JOINED_WORDS = 12
_OPENERS = ("hello", "yes", "no", "sorry", "thank you", "good morning", "good evening")
_ARTICLE = re.compile(r"\ba [aeiou]")
_SLOT = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[a-z']+")
_SLOTS = {**GROUPS, "any": VOCABULARY}

# Each slot takes a word of its group, and one sentence takes no word twice into its slots.
TEMPLATES: tuple[str, ...] = (
    # Greetings.
    "hello, {name}.",
    "hello, world.",
    "hello and welcome.",
    "good {part}, {name}.",
    "good {part}, everyone.",
    "hello, my name is {name}.",
    "my name is {name} and i am {number}.",
    "welcome home, {name}.",
    "welcome, {name}, and good {part}.",
    "thank you, {name}.",
    "goodbye, {name}.",
    "good night, {name}, and thank you.",
    "goodbye, {name}, come home {when}.",
    "hello world, this is {name}.",
    "sorry, {name}, i {may} not {do} {when}.",
    # The voice about itself.
    "this is my voice.",
    "i am a {look} voice and i can {do}.",
    "this is a {look} machine and it can {do}.",
    "i am a {look} machine, not a {person}.",
    "can you {do_to_sound} my {sound}?",
    "say {any} and {any}.",
    "the word is {any}.",
    "please say the word {any} again.",
    "i can say {any}, {any} and {any}.",
    # People and what they do.
    "{we} {may} {do} {when}.",
    "{he} {may} {do} {when}.",
    "{we} {how_often} {do} in the {part}.",
    "{we} {how_often} {do} on {weekday}.",
    "{he} {may} {do_together} with {my} {person}.",
    "{we} {may} {do_together} with {my} {person} in the {place}.",
    "{name} and {name} {may} {do_together} in the {place}.",
    "{the} {person} {may} help {name} {when}.",
    "{we} {may} {do_to_person} {my} {person} {when}.",
    "let's {do_together} together {when}.",
    "let's go home together, {name}.",
    "{he} will make {makes} with {my} {person}.",
    "i think that {name} {may} {do} {when}.",
    "maybe {we} {may} {do} in the {part}.",
    "{my} {person} is from the {place}.",
    "{he} is a {kind} {job}.",
    "my {person} was a {kind} {job}.",
    "{name}, {may} you {do_together} with me {when}?",
    "where is the {kind} {person} from the {place}?",
    "what {may} {we} learn {when}?",
    "{ask} do you {do} {when}?",
    "{ask} {may} we {do_together} with the {person}?",
    "{ask} do they {do_to} the {thing}?",
    "are you {feeling}, {name}?",
    "i am {feeling} and {feeling}.",
    "we are {very} {feeling} {when}.",
    "they are {feeling} and {he} is {feeling}.",
    "{my} {person} is {very} {feeling} {when}.",
    "{he} was {very} {feeling}.",
    # Things, animals and places.
    "{we} {do_to} the {colour} {thing}.",
    "{we} {do_to} {the} {animal}.",
    "{we} {may} {do_to_person} {the} {look} {animal}.",
    "{we} {do_to_sound} {the} {sound}.",
    "do you {do_to} the {colour} {animal}?",
    "i have a {colour} {thing} and a {look} {animal}.",
    "this is a {look} {thing}.",
    "the {animal} is {colour} and {colour}.",
    "{the} {thing} is {very} {look}.",
    "{the} {sound} was {very} {look}.",
    "i think the {thing} is {look}.",
    "where is {the} {thing}?",
    "where is the {colour} {animal}?",
    "what is {the} {tells}?",
    "please tell me {the} {tells}.",
    "please give me the {colour} {thing}.",
    "please give {name} the {food}.",
    "please open the {colour} {opens}.",
    "don't open the {colour} {opens}.",
    "{we} need {food} and {food} {when}.",
    "{we} need {food} in the {part}.",
    "let's make {makes} and {makes}.",
    "is there a {look} {thing} in the {place}?",
    "there is a {look} {animal} in the {place}.",
    "the story is about a {look} {animal} and a {kind} {person}.",
    "yes, it is {colour} and {look}.",
    "no, it is not {colour}, it is {colour}.",
    "the {sky} is {air} in the {place}.",
    "the {sky} will come {when}.",
    "in {season} the {view} is {air}.",
    "one day {we} will see the {view} in {season}.",
    # Days and numbers.
    "today is {weekday}.",
    "tomorrow is {weekday}.",
    "{weekday} was a {look} day.",
    "i {may} see you on {weekday}.",
    "come home on {weekday} {part}.",
    "see you on {weekday} {part}, {name}.",
    "the time is {number} in the {part}.",
    "{name} is {number} and {name} is {number}.",
    "number {number} is {colour}.",
    "say {number}, {number} and {number}.",
    "{number}, {number}, {number}, {number}.",
    "the number is {number}, {number}, {number}.",
    "my number is {number} {number} {number} {number}.",
)
# A template with many slots has many more sentences, and every sentence is said once at most.
_WEIGHTS = tuple(1 + template.count("{") for template in TEMPLATES)


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One sentence.

    Attributes:
        text: In lower case, with commas, full stops and question marks.
        kind: How it was made.
    """

    text: str
    kind: Kind

    @property
    def words(self) -> tuple[str, ...]:
        """Its words, without punctuation."""
        return words_of(self.text)


def words_of(text: str) -> tuple[str, ...]:
    """Returns the words of a text, in lower case and without punctuation."""
    return tuple(_WORD.findall(text.lower()))


def sentences(split: Split) -> Iterator[Sentence]:
    """Yields the sentences of a split, the same ones at each call.

    `dev` and `test` have `HELD_OUT`, of both kinds in turn; `train` has no end.
    """
    return _train() if split == "train" else iter(_held_out(split))


@functools.lru_cache(maxsize=2)
def _held_out(split: Split) -> tuple[Sentence, ...]:
    rng = random.Random(f"{_SEED}/{split}")
    chosen = {each.words for each in _held_out("dev")} if split == "test" else set()
    within = set[tuple[str, ...]]().union(*map(_runs, chosen))

    def fresh(sentence: Sentence) -> bool:
        # Nor may one lie within another, of which the longer may have come first.
        runs = _runs(sentence.words)
        if sentence.words in within or not runs.isdisjoint(chosen):
            return False
        chosen.add(sentence.words)
        within.update(runs)
        return True

    spoken = filter(fresh, (each for deck in iter(lambda: _deal(rng), None) for each in deck))
    # Those of few sentences, such as a greeting by name, are all there to be learnt.
    made = filter(fresh, iter(lambda: _make(rng, fewest_slots=2), None))
    pairs = zip(islice(spoken, HELD_OUT // 2), made, strict=False)
    return tuple(sentence for pair in pairs for sentence in pair)


def _train() -> Iterator[Sentence]:
    rng = random.Random(f"{_SEED}/train")
    held_out = {each.words for split in ("dev", "test") for each in _held_out(split)}
    said: set[tuple[str, ...]] = set()

    def fresh(sentence: Sentence) -> bool:
        return sentence.words not in said and held_out.isdisjoint(_runs(sentence.words))

    while True:
        deck = _deal(rng)
        if not all(map(fresh, deck)):  # the whole deck, so that its words stay equally often said
            continue
        said.update(each.words for each in deck)
        for _ in range(len(deck) // _RANDOM_PER_TEMPLATE):
            while not fresh(sentence := _make(rng)):
                pass
            said.add(sentence.words)
            deck.append(sentence)
        rng.shuffle(deck)
        yield from deck


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    ends = range(len(words) + 1)
    return {tuple(words[first:last]) for last in ends for first in range(last)}


# --- random words ------------------------------------------------------------------------------


def _deal(rng: random.Random) -> list[Sentence]:
    """Returns sentences that have every word of the vocabulary once among them."""
    deck = list(VOCABULARY)
    rng.shuffle(deck)
    dealt = []
    while deck:
        count = rng.randint(MIN_WORDS, MAX_WORDS)
        if len(deck) <= MAX_WORDS:
            count = len(deck)
        else:  # what is left must be enough for a sentence
            count = min(count, len(deck) - MIN_WORDS)
        words, deck = deck[:count], deck[count:]
        if rng.random() < _COMMA:
            words[rng.randrange(count - 1)] += ","
        text = " ".join(words) + ("." if rng.random() < _FULL_STOP else "")
        dealt.append(Sentence(text=text, kind="random"))
    return dealt


# --- templates ---------------------------------------------------------------------------------


def _make(rng: random.Random, fewest_slots: int = 0) -> Sentence:
    text = _fill(rng, fewest_slots)
    if rng.random() < _OPENED and not text.startswith(_OPENERS):
        text = f"{rng.choice(_OPENERS)}{rng.choice(',.')} {text}"
    elif rng.random() < _JOINED:
        joined = f"{text} {_fill(rng, fewest_slots)}"
        text = joined if len(words_of(joined)) <= _MAX_JOINED_WORDS else text
    return Sentence(text=text, kind="template")


def _fill(rng: random.Random, fewest_slots: int) -> str:
    while True:
        (template,) = rng.choices(TEMPLATES, _WEIGHTS)
        if template.count("{") < fewest_slots:
            continue
        text = _fill_slots(template, rng)
        if not _ARTICLE.search(text):  # "an" is no word of ours
            return text


def _fill_slots(template: str, rng: random.Random) -> str:
    taken: set[str] = set()

    def fill(slot: re.Match[str]) -> str:
        word = rng.choice([word for word in _SLOTS[slot[1]] if word not in taken])
        taken.add(word)
        return word

    return _SLOT.sub(fill, template)
