import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from csm_jax import prompt as prompt_module
from csm_jax.audio import resample
from csm_jax.config import tiny
from csm_jax.prompt import (
    EncodeCache,
    Segment,
    TextTokenizer,
    build_prompt,
    check_speaker,
    check_text,
    encode_segment,
    encode_text,
    segment_positions,
)
from tests.support.tokenizer import build_tokenizer, write_tokenizer

CONFIG = tiny()
C = CONFIG.num_codebooks


class CountingCodec:
    """Codes that depend on the audio, and a count of the calls."""

    num_codebooks = C
    codebook_size = CONFIG.codebook_size

    def __init__(self):
        self.calls = []

    def encode(self, audio):
        self.calls.append(audio)
        frames = -(-len(audio) // 1920)
        padded = np.pad(audio, (0, frames * 1920 - len(audio))).reshape(frames, 1920)
        codes = (np.abs(padded[:, :C]) * 1000).astype(np.int32) % self.codebook_size
        return codes


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(path):
    return TextTokenizer.from_file(path)


def audio(frames: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random(int(frames * 1920)) - 0.5).astype(np.float32)


def segment(frames: float = 3, *, speaker: int = 0, text: str = "hello", seed: int = 0) -> Segment:
    return Segment(speaker=speaker, text=text, audio=audio(frames, seed))


def build(tokenizer, codec=None, **changes):
    arguments = {
        "context": [],
        "text": "how are you",
        "speaker": 1,
        "config": CONFIG,
        "max_frames": 125,
        "truncate_context": False,
    }
    return build_prompt(tokenizer, codec or CountingCodec(), **{**arguments, **changes})


# --- tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["[0]hello", "[12]naïve café — 你好 🙂", "[1] two  spaces\n\tand lines"]
)
def test_ids_equal_the_references_tokenizer(path, tokenizer, text):
    # The reference sets this template on the same tokenizer inside transformers.
    from tokenizers.processors import TemplateProcessing

    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    bos, eos = fast.bos_token, fast.eos_token
    fast._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos}:0 $A:0 {eos}:0",
        pair=f"{bos}:0 $A:0 {eos}:0 {bos}:1 $B:1 {eos}:1",
        special_tokens=[(bos, fast.bos_token_id), (eos, fast.eos_token_id)],
    )
    ids = tokenizer.encode(text)
    assert ids == fast.encode(text)
    plain = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    assert ids == [fast.bos_token_id, *plain, fast.eos_token_id]
    assert Tokenizer.from_file(str(path)).decode(plain) == text


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    inner = build_tokenizer()
    inner.enable_truncation(4)
    inner.enable_padding(length=300)
    inner.save(str(tmp_path / "tokenizer.json"))
    ids = TextTokenizer.from_file(tmp_path / "tokenizer.json").encode("[0]a rather long text")
    expected = TextTokenizer(build_tokenizer()).encode("[0]a rather long text")
    assert ids == expected
    assert 4 < len(ids) < 300


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]"])
def test_a_bad_tokenizer_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        TextTokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_foreign_tokenizer(tmp_path, path):
    text = path.read_text().replace("<|begin_of_text|>", "<s>")
    (tmp_path / "tokenizer.json").write_text(text)
    json.loads(text)
    with pytest.raises(ValueError, match=r"no <\|begin_of_text\|>, so it is not Llama 3's"):
        TextTokenizer.from_file(tmp_path / "tokenizer.json")


# --- text --------------------------------------------------------------------------------------


def test_text_frames(tokenizer):
    frames, mask = encode_text(tokenizer, "hello there", 7, config=CONFIG)
    ids = tokenizer.encode("[7]hello there")
    assert frames.dtype == np.int32
    assert mask.dtype == bool
    assert frames.shape == mask.shape == (len(ids), C + 1)
    np.testing.assert_array_equal(frames[:, -1], ids)
    assert not frames[:, :-1].any()
    assert mask[:, -1].all()
    assert not mask[:, :-1].any()


def test_brackets_in_a_text_are_text(tokenizer):
    frames, _ = encode_text(tokenizer, "[3] and [4] me", 0, config=CONFIG)
    assert frames[:, -1].tolist() == tokenizer.encode("[0][3] and [4] me")


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000"])
def test_empty_text(tokenizer, text):
    with pytest.raises(ValueError, match=r"^text is empty"):
        build(tokenizer, text=text)


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\0", "U+0000"),
        ("\x1b", "U+001B"),
        ("\x7f", "U+007F"),
        ("\x9b", "U+009B"),
    ],
)
def test_control_characters(tokenizer, character, name):
    with pytest.raises(
        ValueError, match=rf"^text holds the control character U\{name[1:]} at position 2"
    ):
        build(tokenizer, text=f"ab{character}c")


@pytest.mark.parametrize(
    ("character", "what"),
    [
        ("\udcff", "the byte 0xFF"),
        ("\udc80", "the byte 0x80"),
        ("\ud800", "the surrogate U\\+D800"),
    ],
)
def test_bytes_that_are_no_utf_8(tokenizer, character, what):
    with pytest.raises(ValueError, match=rf"^text is not valid UTF-8: {what} at position 2; "):
        build(tokenizer, text=f"ab{character}c")


def test_lines_tabs_and_marks_are_text():
    text = "one\ntwo\tthree\r\nfour e\u0301 \u200d \u202e"
    assert check_text(text, "text") == text


@pytest.mark.parametrize("token", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
def test_control_tokens_cannot_be_written(tokenizer, token):
    with pytest.raises(ValueError, match=r"^text: text must not contain '<\|") as info:
        build(tokenizer, text=f"hello{token}there")
    assert token in str(info.value)
    assert len(build(tokenizer, text="hello <|other|> there").frames) > 0


def test_a_tokenizer_of_another_model(tokenizer):
    small = dataclasses.replace(CONFIG, text_vocab_size=100)
    with pytest.raises(ValueError, match=r"text_vocab_size is 100: the tokenizer does not belong"):
        build(tokenizer, config=small)


def test_speakers():
    assert check_speaker(np.int64(999), "speaker") == 999
    for bad in (True, 1.0, "0", None, np.bool_(True)):
        with pytest.raises(TypeError, match="speaker must be an integer"):
            check_speaker(bad, "speaker")
    with pytest.raises(ValueError, match="0 or more, got -1"):
        check_speaker(-1, "speaker")


def test_text_must_be_a_string():
    with pytest.raises(TypeError, match="text must be a string, got bytes"):
        check_text(b"hello", "text")


# --- segments ----------------------------------------------------------------------------------


def test_segment_frames(tokenizer):
    codec, turn = CountingCodec(), segment(2.5)
    frames, mask = encode_segment(tokenizer, codec, turn, config=CONFIG)
    text, text_mask = encode_text(tokenizer, turn.text, turn.speaker, config=CONFIG)
    n = len(text)
    np.testing.assert_array_equal(frames[:n], text)
    np.testing.assert_array_equal(mask[:n], text_mask)
    assert len(frames) == n + 3 + 1
    np.testing.assert_array_equal(frames[n : n + 3, :-1], codec.encode(turn.audio))
    # The end frame: zero codes that count.
    assert not frames[-1].any()
    assert mask[n:, :-1].all()
    assert not mask[n:, -1].any()


def coded(frames: int = 3, **changes) -> Segment:
    codes = CountingCodec().encode(audio(frames))
    return Segment(**{"speaker": 0, "text": "hello", "codes": codes, **changes})


def test_codes_are_what_their_audio_would_be(tokenizer):
    codec = CountingCodec()
    for got, expected in zip(
        encode_segment(tokenizer, codec, coded(), config=CONFIG),
        encode_segment(tokenizer, CountingCodec(), segment(), config=CONFIG),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)
    mixed = build(tokenizer, codec, context=[coded(), segment(seed=1), coded(2)])
    plain = build(tokenizer, context=[segment(), segment(seed=1), segment(2)])
    np.testing.assert_array_equal(mixed.frames, plain.frames)
    np.testing.assert_array_equal(mixed.mask, plain.mask)
    assert len(codec.calls) == 1  # for the one with audio


def test_segments_have_as_many_positions_as_frames(tokenizer):
    for each in (coded(), segment(), segment(2.5), coded(7)):
        frames, _ = encode_segment(tokenizer, CountingCodec(), each, config=CONFIG)
        assert segment_positions(tokenizer, each, config=CONFIG) == len(frames)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"audio": np.zeros(1920, np.float32)},
            ValueError,
            r"context\[0\] has both audio and codes",
        ),
        ({"codes": np.zeros((3, C + 1), np.int32)}, ValueError, r"context\[0\]\.codes: codes must"),
        ({"codes": np.zeros((3, C))}, TypeError, r"context\[0\]\.codes: codes must be integers"),
        ({"codes": np.full((3, C), -1)}, ValueError, "lie outside"),
        ({"codes": np.full((3, C), CONFIG.codebook_size)}, ValueError, "lie outside"),
        ({"codes": np.zeros((0, C), np.int32)}, ValueError, r"context\[0\]\.codes is empty"),
        ({"codes": np.zeros((5000, C), np.int32)}, ValueError, r"codes lasts 400\.0 s"),
        ({"codes": None}, TypeError, r"context\[0\]\.audio must"),
    ],
)
def test_bad_codes_are_named(tokenizer, changes, error, match):
    with pytest.raises(error, match=match):
        build(tokenizer, context=[coded(**changes)])


def test_codes_are_truncated_like_audio(tokenizer):
    kept = [segment(3, text="new")]
    room = CONFIG.backbone.max_seq_len - len(build(tokenizer, context=kept).frames)
    prompt = build(tokenizer, context=[coded(), *kept], max_frames=room - 1, truncate_context=True)
    assert prompt.dropped_segments == 1
    np.testing.assert_array_equal(prompt.frames, build(tokenizer, context=kept).frames)


@pytest.mark.parametrize(
    "make", [jnp.asarray, torch.from_numpy, lambda x: x.astype(np.float64), lambda x: x.tolist()]
)
def test_segment_audio_of_every_library(tokenizer, make):
    turn = segment(2)
    expected, _ = encode_segment(tokenizer, CountingCodec(), turn, config=CONFIG)
    turn = dataclasses.replace(turn, audio=make(turn.audio))
    frames, _ = encode_segment(tokenizer, CountingCodec(), turn, config=CONFIG)
    np.testing.assert_array_equal(frames, expected)


def test_segment_audio_is_resampled(tokenizer):
    codec, recording = CountingCodec(), audio(4)
    turn = Segment(speaker=0, text="hi", audio=recording, sample_rate=44100)
    encode_segment(tokenizer, codec, turn, config=CONFIG)
    np.testing.assert_array_equal(codec.calls[0], resample(recording, 44100, 24000))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"audio": np.zeros((2, 4000), np.float32)},
            ValueError,
            r"context\[1\]\.audio must be mono",
        ),
        ({"audio": np.zeros(0, np.float32)}, ValueError, r"context\[1\]\.audio is empty"),
        ({"audio": np.full(9, np.nan)}, ValueError, r"context\[1\]\.audio holds 9 NaN"),
        ({"audio": np.zeros(9, np.int16)}, TypeError, r"context\[1\]\.audio must hold floating"),
        ({"text": " "}, ValueError, r"context\[1\]\.text is empty"),
        ({"sample_rate": 0}, ValueError, r"context\[1\]\.sample_rate must be between"),
        ({"speaker": -2}, ValueError, "speaker must be 0 or more"),
    ],
)
def test_bad_segments_are_named(tokenizer, changes, error, match):
    bad = dataclasses.replace(segment(), **changes)
    codec = CountingCodec()
    with pytest.raises(error, match=match):
        build(tokenizer, codec, context=[segment(), bad])
    assert not codec.calls


@pytest.mark.parametrize(("rate", "truncate"), [(24000, False), (44100, True)])
def test_an_hour_of_audio_is_refused_at_once(tokenizer, rate, truncate):
    codec = CountingCodec()
    hour = Segment(speaker=0, text="hi", audio=np.zeros(3600 * rate, np.float32), sample_rate=rate)
    with pytest.raises(
        ValueError, match=r"lasts 3,600\.0 s, which is 45,001 positions.*max_seq_len=2,048"
    ):
        build(tokenizer, codec, context=[hour], truncate_context=truncate)
    assert not codec.calls


# --- whole prompts -----------------------------------------------------------------------------


def test_prompt_is_the_context_in_order_then_the_turn(tokenizer):
    turns = [segment(2, seed=1), segment(3, speaker=1, text="well", seed=2)]
    prompt = build(tokenizer, context=turns)
    parts = [encode_segment(tokenizer, CountingCodec(), turn, config=CONFIG) for turn in turns]
    parts.append(encode_text(tokenizer, "how are you", 1, config=CONFIG))
    np.testing.assert_array_equal(prompt.frames, np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(prompt.mask, np.concatenate([part[1] for part in parts]))
    assert prompt.frames.dtype == np.int32
    assert prompt.dropped_segments == 0


def test_the_length_rule_is_the_references(tokenizer):
    # Sesame raises when positions >= max_seq_len - max_generation_len.
    turns = [segment(100), segment(100)]
    positions = len(build(tokenizer, context=turns).frames)
    own = len(build(tokenizer).frames)
    limit = 2048 - positions
    assert len(build(tokenizer, context=turns, max_frames=limit - 1).frames) == positions
    codec = CountingCodec()
    with pytest.raises(ValueError, match="max_seq_len") as info:
        build(tokenizer, codec, context=turns, max_frames=limit)
    assert str(info.value) == (
        f"the text ({own} positions) and the context ({positions - own}) do not fit beside "
        f"max_audio_length_ms={80 * limit:,} ({limit:,}): the model holds max_seq_len=2,048 positions; "
        "drop 1 positions of context (truncate_context drops the oldest) "
        f"or lower max_audio_length_ms to at most {80 * (limit - 1):,}"
    )
    assert not codec.calls


def test_the_remedies_work(tokenizer):
    turns = [segment(900), segment(900)]
    with pytest.raises(ValueError, match="drop") as info:
        build(tokenizer, context=turns, max_frames=500)
    lower = int(str(info.value).split("at most ")[1].replace(",", "")) // 80
    assert len(build(tokenizer, context=turns, max_frames=lower).frames)


def test_a_text_too_long_by_itself(tokenizer):
    with pytest.raises(ValueError, match=r"the text \([\d,]+ positions\).*shorten the text or"):
        build(tokenizer, text="word " * 400, max_frames=1500, truncate_context=True)
    with pytest.raises(ValueError, match="say it in several turns"):
        build(tokenizer, text="word " * 2000)


def test_truncation_drops_whole_oldest_segments(tokenizer):
    turns = [segment(300, seed=1), segment(300, seed=2), segment(300, seed=3)]
    codec = CountingCodec()
    prompt = build(tokenizer, codec, context=turns, max_frames=1400, truncate_context=True)
    expected = build(tokenizer, context=turns[1:], max_frames=1400)
    assert prompt.dropped_segments == 1
    np.testing.assert_array_equal(prompt.frames, expected.frames)
    assert len(codec.calls) == 2  # what is dropped is not encoded
    everything = build(tokenizer, context=turns, max_frames=2000, truncate_context=True)
    assert everything.dropped_segments == 3
    untouched = build(tokenizer, context=turns, truncate_context=True)
    assert untouched.dropped_segments == 0


def test_dropped_segments_are_logged_and_not_resampled(tokenizer, caplog, monkeypatch):
    resampled = []
    monkeypatch.setattr(
        prompt_module,
        "resample",
        lambda x, *rates: (resampled.append(len(x)), resample(x, *rates))[1],
    )
    turns = [
        Segment(speaker=0, text="hi", audio=np.zeros(n, np.float32), sample_rate=44100)
        for n in (900_001, 900_002, 44_101)
    ]
    with caplog.at_level("INFO", "csm_jax.prompt"):
        prompt = build(tokenizer, context=turns, max_frames=1700, truncate_context=True)
    assert (prompt.dropped_segments, resampled) == (1, [900_002, 44_101])
    assert [record.getMessage() for record in caplog.records] == [
        "left out the oldest 1 of 3 context turns to fit"
    ]
    caplog.clear()
    # Lengths are known without resampling, to the sample.
    whole = build(tokenizer, context=turns, max_frames=100)
    assert len(whole.frames) == len(prompt.frames) + len(tokenizer.encode("[0]hi")) + 257
    assert not caplog.records


@pytest.mark.parametrize("max_frames", [0, -1, 2048, 5000])
def test_max_frames_out_of_range(tokenizer, max_frames):
    said = rf"max_audio_length_ms must be between 80 and 163,760, .* got {80 * max_frames:,}"
    with pytest.raises(ValueError, match=said):
        build(tokenizer, max_frames=max_frames)


def test_a_codec_of_another_model(tokenizer):
    codec = CountingCodec()
    codec.codebook_size = 2048
    with pytest.raises(ValueError, match=r"codec gives 32 codebooks of 2,048.*32 of 256"):
        build(tokenizer, codec, context=[segment()])


def test_a_codec_with_another_frame_rate(tokenizer):
    class Twice(CountingCodec):
        def encode(self, audio):
            return np.repeat(super().encode(audio), 2, axis=0)

    with pytest.raises(ValueError, match=r"\+3 frames more"):
        build(tokenizer, Twice(), context=[segment(3)])


def test_context_must_hold_segments(tokenizer):
    with pytest.raises(TypeError):
        build(tokenizer, context=[("hi", audio(1))])


# --- cache -------------------------------------------------------------------------------------


def test_the_cache_encodes_each_recording_once(tokenizer):
    codec = CountingCodec()
    cache = EncodeCache(codec)
    turns = [segment(2, seed=1), segment(2, seed=2)]
    first = build(tokenizer, cache, context=turns)
    again = build(tokenizer, cache, context=[*turns, segment(2, seed=3)])
    assert len(codec.calls) == 3
    np.testing.assert_array_equal(first.frames, build(tokenizer, context=turns).frames)
    expected = build(tokenizer, context=[*turns, segment(2, seed=3)])
    np.testing.assert_array_equal(again.frames, expected.frames)


def test_the_cache_forgets_the_oldest():
    codec = CountingCodec()
    cache = EncodeCache(codec, max_segments=2)
    a, b, c = (audio(1, seed) for seed in range(3))
    for recording in (a, b, a, c):  # b is the least recently used when c comes
        cache.encode(recording)
    assert len(codec.calls) == 3
    cache.encode(a)
    assert len(codec.calls) == 3
    cache.encode(b)
    assert len(codec.calls) == 4


def test_the_cache_hands_out_codes_nobody_can_change():
    cache = EncodeCache(CountingCodec())
    with pytest.raises(ValueError, match="read-only"):
        cache.encode(audio(1))[0, 0] = 5
    with pytest.raises(ValueError, match="at least 1"):
        EncodeCache(CountingCodec(), max_segments=0)
