import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax.prompt import check_text
from csm_jax.text import DEFAULT_MAX_CHARACTERS, chunks, sentences
from csm_jax.text.splitting import CLAUSE_PAUSE_MS, PARAGRAPH_PAUSE_MS, SENTENCE_PAUSE_MS

few = settings(max_examples=200, derandomize=True, deadline=None)

HARD = [
    ["Dr. Smith went to Washington.", "He met Mr. Jones."],
    ["He lives in the U.S.", "She lives in the U.K. with him."],
    ["The U.S. Senate met.", "So did the U.N. General Assembly."],
    ["Pi is 3.14.", "Really."],
    ["Wait... what?", "No...", "Yes."],
    ['She said "Stop."', "Then she left."],
    ['"Is it?" he asked.', "“No.”", "She sat."],
    ["Use a tool, e.g. this one, i.e. a hammer.", "Done."],
    ["J. R. R. Tolkien wrote it.", "I agree with Albert I. Jones."],
    ["Try plan B.", "It failed."],
    ["See https://example.com/a.b?c=d.", "Then go."],
    ["1. First.", "2. Second.", "3. Third."],
    ["Hello!!!", "Are you there?!", "Yes."],
    ["At 5 p.m. Monday we left.", "At 6 a.m.", "They came."],
    ["今天天气很好。", "我们去公园吧！", "他说：“好吗？”", "好。"],
    ["Vol. 3, No. 4, p. 12.", "The end."],
    ["I work at Acme Inc.", "We sell things."],
    ["What?!", "(He said so.)", "Then he left."],
    ["This is it... and more."],
    ["Mt. Everest is high.", "St. Paul is a city on the St. Lawrence River."],
    ["Bring apples, pears, etc.", "They like fruit."],
    ["Yahoo! is a company."],
    ["See fig. 3 and eq. 4.", "Next."],
    ["It was Jan. 5 at 10.", "Snow fell."],
    ["Das ist z.B. gut.", "Ja."],
    ["यह अच्छा है।", "हाँ।"],
]


@pytest.mark.parametrize("expected", HARD, ids=lambda parts: parts[0][:25])
def test_hard_sentences(expected):
    joined = "".join(
        part if part[-1] in "。！？”" and not part.isascii() and "“No" not in part else part + " "
        for part in expected
    )
    assert sentences(joined) == expected


def test_a_blank_line_ends_a_sentence_and_a_line_end_does_not():
    assert sentences("one\ntwo\n\n three \n \nfour.") == ["one two", "three", "four."]
    assert sentences(" \n ") == []


def test_pauses_follow_what_the_cut_falls_on():
    text = "One is here. Two is here, too, I think so.\n\nThree. Four."
    assert [(c.text, c.pause_ms) for c in chunks(text, max_characters=20)] == [
        ("One is here.", SENTENCE_PAUSE_MS),
        ("Two is here,", CLAUSE_PAUSE_MS),
        ("too, I think so.", PARAGRAPH_PAUSE_MS),
        ("Three. Four.", 0),
    ]
    assert 0 < CLAUSE_PAUSE_MS < SENTENCE_PAUSE_MS < PARAGRAPH_PAUSE_MS


def test_words_stay_whole_and_a_cut_between_them_has_no_pause():
    made = chunks("a sentence without marks goes on and on until it ends.", max_characters=16)
    assert [c.text for c in made] == [
        "a sentence", "without marks", "goes on and on", "until it ends.",
    ]  # fmt: skip
    assert {c.pause_ms for c in made} == {0}
    assert [c.text for c in chunks("go incomprehensibilities", max_characters=10)] == [
        "go", "incomprehe", "nsibilitie", "s",
    ]  # fmt: skip


def test_writing_without_spaces_is_cut_at_its_marks_first():
    text = "今天天气很好，我们去公园吧，然后回家吃饭。明天下雨。"
    made = [c.text for c in chunks(text, max_characters=10)]
    assert made == ["今天天气很好，", "我们去公园吧，", "然后回家吃饭。", "明天下雨。"]
    assert [len(c.text) for c in chunks("好" * 25, max_characters=10)] == [10, 10, 5]
    assert chunks("好。" * 5, max_characters=20)[0].text == "好。" * 5


def test_pieces_of_a_paragraph_are_of_about_equal_length():
    text = " ".join(f"This is the sentence {word}." for word in "abcdefghijk")
    lengths = [len(c.text) for c in chunks(text)]
    assert len(lengths) == 2
    assert max(lengths) <= DEFAULT_MAX_CHARACTERS
    assert max(lengths) - min(lengths) < 30


def test_accents_stay_on_their_letters():
    text = "e\u0301" * 30
    for chunk in chunks(text, max_characters=11):
        assert chunk.text[0] == "e"


@pytest.mark.parametrize("limit", [9, 0, -1])
def test_too_small_a_piece_is_refused(limit):
    with pytest.raises(ValueError, match=f"at least 10, got {limit}"):
        chunks("text", max_characters=limit)


def accepted(text: str) -> bool:
    try:
        check_text(text, "text")
    except ValueError:
        return False
    return True


TEXT = (
    st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n .,!?;")).filter(accepted)
    | st.lists(
        st.sampled_from(
            ["Dr. ", "word ", "Hello. ", "No! ", "etc. ", "\n\n", " ", "。", "好的", ", ", "; ", "...", '"',
             "1. ", "U.S. ", "I", "supercalifragilistic", "-", "（", "」", "\u200d", "\u0301", "\u3000"]
        ),
        max_size=40,
    ).map("".join)
)  # fmt: skip


def squeezed(text: str) -> str:
    return "".join(text.split())


@few
@given(TEXT, st.integers(10, 80))
def test_nothing_is_lost_and_nothing_is_longer(text, limit):
    made = chunks(text, max_characters=limit)
    assert squeezed("".join(c.text for c in made)) == squeezed(text)
    assert all(0 < len(c.text) <= limit for c in made)
    assert all(c.text == " ".join(c.text.split()) for c in made)
    assert squeezed("".join(sentences(text))) == squeezed(text)
    assert not made or made[-1].pause_ms == 0


@few
@given(TEXT, st.integers(10, 80))
def test_short_words_are_never_cut(text, limit):
    words = {word for c in chunks(text, max_characters=limit) for word in c.text.split()}
    spaced = [w for w in text.split() if w.isascii() and len(w) <= limit]
    assert set(spaced) <= words


def test_a_book_is_cut_in_no_time():
    text = "Dr. Smith went home, e.g. at 5 p.m. He slept!? " * 2000 + "!?" * 60_000 + '."' * 5000
    start = time.perf_counter()
    made = chunks(text)
    assert time.perf_counter() - start < 3  # 0.2 s; a quadratic pattern takes 10
    assert squeezed("".join(c.text for c in made)) == squeezed(text)
