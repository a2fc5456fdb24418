"""What hears: recognisers that write down what is said in audio, each loaded only when it is asked for.

PocketSphinx brings its English model in its wheel, so it is the default and needs no download; with a small
vocabulary it hears well, without one it is far behind current networks. Those (faster-whisper, or a model of
transformers) are given by the path of a directory; nothing is fetched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from csm_jax.audio import resample
from csm_jax.eval import language_model

HEARING_RATE = 16_000
"""Hertz: what the models of speech recognisers are trained on."""

LanguageModel = Literal["bigram", "unigram"]

_MARGIN_S = 0.2  # of silence around an utterance, which generated speech may lack


@runtime_checkable  # the tests check annotations at run time
class Recogniser(Protocol):
    """Writes down what is said."""

    @property
    def name(self) -> str:
        """What it is, for the report."""
        ...

    def hear(self, audio: np.ndarray, sample_rate: int) -> str:
        """Returns the words in audio (float32 [W], hertz); empty where there are none.

        What it heard before changes nothing.
        """
        ...


class PocketSphinx:
    """PocketSphinx with the English model of its wheel."""

    def __init__(
        self,
        sentences: Iterable[Sequence[str]] | None = None,
        *,
        language_model_kind: LanguageModel = "bigram",
        pronunciations: language_model.Pronunciations | None = None,
    ) -> None:
        """Loads its models.

        Args:
            sentences: Sentences of words. What it can hear is then these words alone, and how they
                follow each other is as in these sentences (`bigram`), or anyhow (`unigram`). None takes
                the large vocabulary of its wheel.
            language_model_kind: See there.
            pronunciations: Of words that its dictionary lacks, or says otherwise.

        Raises:
            ImportError: pocketsphinx is not installed; the message has the command.
            ValueError: Words have no pronunciation; all are listed.
        """
        try:
            import pocketsphinx
        except ImportError as error:
            raise ImportError(
                "the default recogniser needs pocketsphinx: pip install 'csm_jax[eval]', or "
                "pip install pocketsphinx; or choose another with --recogniser"
            ) from error
        models = Path(pocketsphinx.get_model_path("en-us"))
        options: dict[str, Any] = {
            "hmm": str(models / "en-us"),
            "loglevel": "FATAL",
        }
        if sentences is None:
            self.name = "pocketsphinx, its own vocabulary"
            options |= {
                "dict": str(models / "cmudict-en-us.dict"),
                "lm": str(models / "en-us.lm.bin"),
            }
            self._decoder = pocketsphinx.Decoder(**options)
            return
        kept = [list(sentence) for sentence in sentences]
        words = {word for sentence in kept for word in sentence}
        grammar = (
            language_model.bigram(kept)
            if language_model_kind == "bigram"
            else language_model.unigram(words)
        )
        known = language_model.read_pronunciations(models / "cmudict-en-us.dict")
        chosen = language_model.dictionary(words, pronunciations or {}, known)
        self.name = f"pocketsphinx, {len(words):,} words, {language_model_kind}"
        with tempfile.TemporaryDirectory(prefix="csm-jax-eval-") as scratch:
            for name, text in (("dict", chosen), ("lm", grammar)):
                path = Path(scratch) / f"vocabulary.{name}"
                path.write_text(text, encoding="utf-8")
                options[name] = str(path)
            self._decoder = pocketsphinx.Decoder(**options)

    def hear(self, audio: np.ndarray, sample_rate: int) -> str:
        """See `Recogniser.hear`."""
        margin = np.zeros(round(_MARGIN_S * HEARING_RATE), np.float32)
        heard = np.concatenate([margin, resample(audio, sample_rate, HEARING_RATE), margin])
        samples = (np.clip(heard, -1.0, 1.0) * 32_767).astype("<i2")
        self._decoder.start_utt()
        # In one piece: its spectra are then normalised by their own mean, not by those heard before.
        self._decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else found.hypstr


class FasterWhisper:
    """A Whisper model in CTranslate2's form, through the package faster-whisper."""

    def __init__(self, path: Path, *, language: str) -> None:
        """Loads the model of a directory.

        Raises:
            ImportError: faster-whisper is not installed; the message has the command.
            FileNotFoundError: There is no such directory.
        """
        _check_directory(path)
        try:
            from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "this recogniser needs the package faster-whisper: pip install faster-whisper"
            ) from error
        self.name = f"faster-whisper, {path.name}"
        self._model = WhisperModel(str(path), local_files_only=True)
        self._language = language.partition("-")[0]

    def hear(self, audio: np.ndarray, sample_rate: int) -> str:
        """See `Recogniser.hear`."""
        pieces, _ = self._model.transcribe(
            resample(audio, sample_rate, HEARING_RATE),
            language=self._language,
            beam_size=5,
            temperature=0.0,  # above it, it draws at random
            # Each piece for itself: a loop in one would go on in the next.
            condition_on_previous_text=False,
        )
        return " ".join(piece.text.strip() for piece in pieces)


RECOGNISERS = ("pocketsphinx", "faster-whisper", "transformers", "none")


def open_recogniser(
    kind: str,
    *,
    model: Path | None = None,
    sentences: Iterable[Sequence[str]] | None = None,
    language_model_kind: LanguageModel = "bigram",
    pronunciations: language_model.Pronunciations | None = None,
    language: str = "en",
) -> Recogniser | None:
    """Returns a loaded recogniser, None for `none`.

    Args:
        kind: One of `RECOGNISERS`.
        model: The directory of its model, for all but pocketsphinx, which has its own.
        sentences: See `PocketSphinx`; for it alone.
        language_model_kind: Likewise.
        pronunciations: Likewise.
        language: Of the speech.

    Raises:
        ValueError: The choices do not go together, or a word cannot be pronounced.
        FileNotFoundError: There is no such model.
        ImportError: Its package is not installed; the message has the command.
    """
    if kind not in RECOGNISERS:
        raise ValueError(f"the recogniser must be one of {', '.join(RECOGNISERS)}, got {kind!r}")
    if kind in ("faster-whisper", "transformers"):
        if model is None:
            raise ValueError(f"{kind} needs --recogniser-model DIR, the directory of its model")
        if sentences is not None:
            raise ValueError(f"--vocabulary goes with pocketsphinx; {kind} hears all words")
    elif model is not None:
        raise ValueError(f"--recogniser-model goes with faster-whisper or transformers, not {kind}")
    if kind == "pocketsphinx":
        if language.partition("-")[0] != "en":
            raise ValueError(
                f"pocketsphinx hears English, not {language!r}: choose another with --recogniser"
            )
        return PocketSphinx(
            sentences, language_model_kind=language_model_kind, pronunciations=pronunciations
        )
    if kind == "none" or model is None:
        return None
    if kind == "faster-whisper":
        return FasterWhisper(model, language=language)
    _check_directory(model)
    from csm_jax.bridge.recogniser import TransformersRecogniser

    return TransformersRecogniser(model, language=language)


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"no recogniser's model at {path}: give the directory of one")
