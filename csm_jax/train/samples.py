"""Speaks sentences with the weights as they are during a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from csm_jax import hub, pipeline
from csm_jax.array_typing import Params, PyTree
from csm_jax.audio import write_audio
from csm_jax.config import CSMConfig
from csm_jax.prompt import TextTokenizer
from csm_jax.request import Request
from csm_jax.train.methods import Method, Prefix, assemble, compute_copy
from csm_jax.train.settings import RunSettings

_MOST_MS = 10_000  # weights that do not know yet when to stop would speak for minutes


class Sampler:
    """Speaks the same sentences with the same seeds again and again, into `<output_dir>/samples`."""

    def __init__(
        self, settings: RunSettings, config: CSMConfig, method: Method, dtype: str
    ) -> None:
        """Loads what turns codes into audio.

        Raises:
            FileNotFoundError, ValueError: As `csm_jax.load_csm_1b`.
        """
        files = hub.locate(settings.model_name_or_path)
        self._settings, self._config, self._method, self._dtype = settings, config, method, dtype
        self._generator = pipeline.Generator(
            config=config,
            params={},
            tokenizer=TextTokenizer.from_file(files.tokenizer()),
            codec=pipeline.load_codec(settings.model_name_or_path),
            watermarker=pipeline.load_watermarker(
                files.watermark_dir,
                settings.watermark and hub.is_watermarked(settings.model_name_or_path),
            ),
        )
        self._weights = jax.jit(self._assemble)

    def has(self, step: int) -> bool:
        """Returns whether all of a step's sentences have been spoken."""
        return self._directory(step).exists()

    def speak(self, step: int, trainable: PyTree, frozen: Params) -> list[Path]:
        """Returns the files written; a sentence that the model ends at once has none.

        Args:
            step: Steps made.
            trainable: The weights that are trained.
            frozen: The others.

        Raises:
            OSError: A file cannot be written.
        """
        from csm_jax.voices import model_hash, prefix_voice

        params, prefix = self._weights(trainable, frozen)
        voice = None
        if prefix is not None:
            voice = prefix_voice(
                f"step-{step}",
                np.asarray(prefix, np.float32),
                config=self._config,
                model=model_hash(frozen) or "",
                provenance={},
            )
        self._generator.params = params
        requests = [
            Request(
                text=text,
                speaker=self._settings.sample_speaker,
                seed=i,
                voice=voice,
                max_audio_length_ms=_MOST_MS,
            )
            for i, text in enumerate(self._settings.sample_text)
        ]
        results = self._generator.generate_results(requests)
        self._generator.params = {}
        return self._write(step, [result.audio for result in results])

    def _write(self, step: int, audios: Sequence[np.ndarray | None]) -> list[Path]:
        if jax.process_index() != 0:
            return []
        directory = self._directory(step)
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        written = []
        for i, audio in enumerate(audios):
            if audio is not None and audio.size:
                write_audio(partial / f"{i}.wav", audio, self._generator.sample_rate)
                written.append(directory / f"{i}.wav")
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(partial, directory)
        return written

    def _directory(self, step: int) -> Path:
        return self._settings.output_dir / "samples" / f"step-{step:06d}"

    def _assemble(self, trainable: PyTree, frozen: Params) -> tuple[Params, jax.Array | None]:
        copy = compute_copy(trainable, self._method, config=self._config, dtype=self._dtype)
        params, prefix = assemble(copy, frozen, self._method, config=self._config)
        return params, prefix if isinstance(self._method, Prefix) else None
