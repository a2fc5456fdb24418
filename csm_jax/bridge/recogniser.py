"""Speech recognisers of transformers, on torch: what speech is judged with, never what makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.audio import resample

_LONG_S = 30.0  # Whisper's window; longer audio goes through it in several


class TransformersRecogniser:
    """A CTC model (wav2vec 2.0, HuBERT, ...) or an encoder with a decoder (Whisper, ...)."""

    def __init__(self, path: Path, *, language: str) -> None:
        """Loads a directory as `save_pretrained` writes it; nothing is fetched.

        Args:
            path: The directory, of model and processor.
            language: Of the speech, for models that know several.

        Raises:
            ImportError: transformers or torch is not installed; the message has the command.
            ValueError: There is no such model in the directory.
        """
        try:
            import torch
            from transformers import (
                AutoConfig,
                AutoModelForCTC,
                AutoModelForSpeechSeq2Seq,
                AutoProcessor,
            )
        except ImportError as error:
            raise ImportError(
                f"this recogniser needs the package {error.name or 'transformers'}: "
                "pip install transformers torch"
            ) from error
        self.name = f"transformers, {path.name}"
        self._torch, self._device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = torch.float16 if self._device == "cuda" else torch.float32
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            kind: Any = AutoModelForSpeechSeq2Seq if config.is_encoder_decoder else AutoModelForCTC
            self._processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True)
            model = kind.from_pretrained(path, local_files_only=True, dtype=self._dtype)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} holds no speech recogniser of transformers: {error}"
            ) from error
        self._model: Any = model.to(self._device).eval()
        self._writes = bool(config.is_encoder_decoder)
        self._rate = int(self._processor.feature_extractor.sampling_rate)
        self._options: dict[str, Any] = {}
        if self._writes and getattr(self._model.generation_config, "is_multilingual", False):
            self._options = {"language": language.partition("-")[0], "task": "transcribe"}

    def hear(self, audio: np.ndarray, sample_rate: int) -> str:
        """Returns the words in audio (float32 [W], hertz)."""
        heard = resample(audio, sample_rate, self._rate)
        shape: dict[str, Any] = {}
        options = dict(self._options)
        if self._writes and len(heard) > _LONG_S * self._rate:
            shape = {"truncation": False, "padding": "longest", "return_attention_mask": True}
            options["return_timestamps"] = True  # by which it finds where the next window begins
        inputs = self._processor(heard, sampling_rate=self._rate, return_tensors="pt", **shape)
        inputs = inputs.to(self._device, self._dtype)
        with self._torch.inference_mode():
            if self._writes:
                ids = self._model.generate(**inputs, **options)
            else:
                ids = self._model(**inputs).logits.argmax(dim=-1)
        # A CTC model's letters come with repeats and blanks, which its own decoding takes out.
        return self._processor.batch_decode(ids, skip_special_tokens=self._writes)[0].strip()
