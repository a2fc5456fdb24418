"""What hears: real speech from flite where there is one, small random networks, and what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_jax.audio import read_audio
from csm_jax.eval import language_model
from csm_jax.eval.recognisers import PocketSphinx, open_recogniser
from tests.support.model_directory import vowels

SENTENCES = [
    "good morning my small friend",
    "the red house has four doors",
    "thank you for the green tea",
    "one two three four five",
    "my friend has a red door",
]
WORDS = [sentence.split() for sentence in SENTENCES]

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")


def say(text: str, path: Path) -> tuple[np.ndarray, int]:
    """Returns speech of flite."""
    subprocess.run(["flite", "-voice", "rms", "-t", text, "-o", str(path)], check=True)
    return read_audio(path)


@pytest.fixture(scope="module")
def bigram() -> PocketSphinx:
    return PocketSphinx(WORDS)


@needs_flite
def test_speech_is_heard(bigram: PocketSphinx, tmp_path: Path) -> None:
    for text in SENTENCES[:3]:
        assert bigram.hear(*say(text, tmp_path / "a.wav")) == text
    assert bigram.name == "pocketsphinx, 22 words, bigram"


@needs_flite
def test_what_was_heard_before_changes_nothing(bigram: PocketSphinx, tmp_path: Path) -> None:
    audio, rate = say("one two three four five", tmp_path / "a.wav")
    noisy = audio + np.random.default_rng(0).normal(0, 0.03, len(audio)).astype(np.float32)
    first = bigram.hear(noisy, rate)
    bigram.hear(vowels(pitch=115.0), 24_000)
    bigram.hear(0.01 * audio, rate)
    assert bigram.hear(noisy, rate) == first


@needs_flite
def test_a_unigram_expects_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(language_model, "bigram")
    recogniser = PocketSphinx(WORDS, language_model_kind="unigram")
    text = "green morning house thank five"
    heard = recogniser.hear(*say(text, tmp_path / "a.wav")).split()
    assert len(set(heard) & set(text.split())) >= 4
    assert recogniser.name.endswith("unigram")


def test_only_words_of_the_vocabulary_are_heard(bigram: PocketSphinx) -> None:
    known = {word for words in WORDS for word in words}
    assert set(bigram.hear(vowels(pitch=205.0), 24_000).split()) <= known
    for audio in (np.zeros(0, np.float32), np.zeros(100, np.float32), np.ones(8, np.float32)):
        assert set(bigram.hear(audio, 24_000).split()) <= known


def test_a_word_that_the_dictionary_lacks_may_be_given() -> None:
    words = [["hello", "csmjax"]]
    with pytest.raises(ValueError, match=r"1 words have no pronunciation .*: csmjax"):
        PocketSphinx(words)
    PocketSphinx(words, pronunciations={"csmjax": ["S IY EH S EH M JH AE K S"]})


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package, kind, model in (
        ("pocketsphinx", "pocketsphinx", None),
        ("faster_whisper", "faster-whisper", tmp_path),
        ("transformers", "transformers", tmp_path),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r"pip install .*") as error:
            open_recogniser(kind, model=model)
        assert kind in str(error.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"kind": "ears"}, "must be one of pocketsphinx"),
        ({"kind": "faster-whisper"}, "needs --recogniser-model"),
        ({"kind": "transformers", "model": Path(), "sentences": WORDS}, "--vocabulary goes with"),
        ({"kind": "pocketsphinx", "model": Path()}, "--recogniser-model goes with"),
        ({"kind": "pocketsphinx", "language": "de"}, "hears English, not 'de'"),
    ],
)
def test_choices_that_do_not_go_together(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        open_recogniser(**options)


@pytest.mark.parametrize("kind", ["faster-whisper", "transformers"])
def test_a_model_that_is_not_there(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recogniser's model at"):
        open_recogniser(kind, model=tmp_path / "none")
    assert open_recogniser("none") is None


def test_faster_whisper_is_given_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    class WhisperModel:
        def __init__(self, path: str, **options: Any) -> None:
            asked.update(path=path, **options)

        def transcribe(self, audio: np.ndarray, **options: Any) -> Any:
            asked.update(options, audio=audio)
            return iter(
                [types.SimpleNamespace(text=" Hello,"), types.SimpleNamespace(text=" you.")]
            ), None

    module = types.ModuleType("faster_whisper")
    module.__dict__["WhisperModel"] = WhisperModel
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    recogniser = open_recogniser("faster-whisper", model=tmp_path, language="de-AT")
    assert recogniser is not None
    assert recogniser.hear(np.zeros(24_000, np.float32), 24_000) == "Hello, you."
    assert (asked["path"], asked["language"]) == (str(tmp_path), "de")
    assert asked["local_files_only"] is True
    assert (asked["audio"].dtype, asked["audio"].shape) == (np.float32, (16_000,))


def write_wav2vec2(path: Path, letter: str) -> None:
    """Writes a small random CTC model that writes one letter whatever it hears."""
    import torch
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    path.mkdir()
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(path / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16_000, padding_value=0.0, do_normalize=True
    )
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(path)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(160, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    model = Wav2Vec2ForCTC(config)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[vocabulary[letter]] = 1.0
    model.save_pretrained(path)


def test_a_ctc_model_of_transformers_hears(tmp_path: Path) -> None:
    write_wav2vec2(tmp_path / "tiny", "B")
    recogniser = open_recogniser("transformers", model=tmp_path / "tiny")
    assert recogniser is not None
    assert recogniser.hear(vowels(pitch=115.0, seconds=0.5), 24_000) == "B"
    assert recogniser.name == "transformers, tiny"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no speech recogniser of transformers"):
        open_recogniser("transformers", model=tmp_path / "empty")


def write_whisper(path: Path) -> None:
    """Writes a small random Whisper that knows two letters and all it needs besides."""
    import torch
    from tokenizers import AddedToken
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "Ġa": 2, "Ġ": 3}))
    (path / "merges.txt").write_text("#version: 0.2\nĠ a\n")
    tokenizer = WhisperTokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    names = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe"]
    names += ["startoflm", "startofprev", "nospeech", "notimestamps"]
    names += [f"{0.02 * i:.2f}" for i in range(1501)]
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in names], True)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(path)
    ids = {name: tokenizer.get_vocab()[f"<|{name}|>"] for name in names}
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=32,
        pad_token_id=ids["endoftext"],
        bos_token_id=ids["endoftext"],
        eos_token_id=ids["endoftext"],
        decoder_start_token_id=ids["startoftranscript"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(path)
    told = json.loads((path / "generation_config.json").read_text())
    del told["_from_model_config"]
    told |= {
        "is_multilingual": True,
        "lang_to_id": {f"<|{name}|>": ids[name] for name in ("en", "de")},
        "task_to_id": {name: ids[name] for name in ("transcribe", "translate")},
        "no_timestamps_token_id": ids["notimestamps"],
        "max_length": 12,
    }
    (path / "generation_config.json").write_text(json.dumps(told))


def test_a_whisper_of_transformers_hears_more_than_its_window(tmp_path: Path) -> None:
    write_whisper(tmp_path / "tiny")
    recogniser = open_recogniser("transformers", model=tmp_path / "tiny", language="de-AT")
    assert recogniser is not None
    noise = np.random.default_rng(0).normal(0, 0.1, 31 * 16_000).astype(np.float32)
    assert set(recogniser.hear(noise, 16_000)) <= set("ab ")
    assert set(recogniser.hear(noise[:8_000], 16_000)) <= set("ab ")
