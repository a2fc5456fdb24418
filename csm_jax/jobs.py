"""What the engine is given for a request: text, context and voice as frames."""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.engine import Job
from csm_jax.prompt import EncodeCache, TextTokenizer, build_prompt
from csm_jax.request import Request, check_settings
from csm_jax.slots import VoicePrompt
from csm_jax.voices import MODEL_KEY, Voice, voice_prompt

if TYPE_CHECKING:
    from csm_jax.codec import Codec

logger = logging.getLogger(__name__)

_WORD = re.compile(r"\w+(?:'\w+)*")
_VOICE_PROMPTS = 64  # kept on the host, 0.1 to 0.2 MB each


class JobMaker:
    """Makes jobs for one model; remembers the context audio and the voices it saw last.

    Safe to share between threads.
    """

    def __init__(
        self,
        config: CSMConfig,
        tokenizer: TextTokenizer,
        codec: Codec,
        *,
        model: Callable[[], str | None] = lambda: None,
        vocabulary: Collection[str] | None = None,
    ) -> None:
        """Makes no job yet.

        Args:
            config: The model's sizes.
            tokenizer: Text to ids.
            codec: Encodes the audio of contexts.
            model: Gives the model's hash (`csm_jax.voices.model_hash`), None where it is not known; asked
                when a voice comes that was trained for a model.
            vocabulary: The only words that the model knows, in small letters; None where it knows a
                language. Others in a text are logged, at level WARNING.
        """
        self.config = config
        self._tokenizer, self._encoder, self._model = tokenizer, EncodeCache(codec), model
        self._vocabulary = vocabulary
        self._voices: OrderedDict[str, VoicePrompt] = OrderedDict()
        self._lock = threading.Lock()

    def job(self, request: Request, *, segment_capacity: int) -> Job:
        """Returns the job of a request.

        Args:
            request: What to say.
            segment_capacity: Positions of a voice that can be shared; a longer one becomes part of
                the request's own prompt, which can hold no vectors.

        Raises:
            TypeError, ValueError: The request is bad, or too long for the model.
        """
        check_settings(request)
        self._note_words(request.text)
        voice = None if request.voice is None else self._voice_prompt(request.voice)
        prompt = build_prompt(
            self._tokenizer,
            self._encoder,
            context=request.context,
            text=request.text,
            speaker=request.speaker,
            config=self.config,
            max_frames=request.max_frames,
            truncate_context=request.truncate_context,
            before=0 if voice is None else len(voice),
        )
        own = (prompt.frames, prompt.mask)
        if voice is None or request.voice is None:
            return Job(request=request, prompt=own)
        if len(voice) <= segment_capacity:
            return Job(request=request, prompt=own, voice_key=request.voice.key, voice=voice)
        if voice.vectors is not None:
            raise ValueError(
                f"voice {request.voice.name!r} takes {len(voice):,} positions, but shared segments hold "
                f"{segment_capacity:,}, and trained vectors can be nowhere else: make voice_segments at "
                f"least 1 and voice_capacity at least {len(voice):,}"
            )
        whole = (np.concatenate([voice.frames, own[0]]), np.concatenate([voice.mask, own[1]]))
        return Job(request=request, prompt=whole)

    def _voice_prompt(self, voice: Voice) -> VoicePrompt:
        with self._lock:
            if voice.key not in self._voices:
                frames, mask = voice_prompt(self._tokenizer, voice, config=self.config)
                self._voices[voice.key] = VoicePrompt(
                    frames=frames, mask=mask, vectors=voice.vectors
                )
                self._note_model(voice)
            self._voices.move_to_end(voice.key)
            while len(self._voices) > _VOICE_PROMPTS:
                self._voices.popitem(last=False)
            return self._voices[voice.key]

    def _note_words(self, text: str) -> None:
        """Logs the words that the model does not know, at level WARNING."""
        if self._vocabulary is None:
            return
        words = dict.fromkeys(
            _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
        )
        if unknown := [word for word in words if word not in self._vocabulary]:
            logger.warning(
                "the model knows %d words, and not %s: expect something that sounds alike",
                len(self._vocabulary),
                ", ".join(map(repr, unknown)),
            )

    def _note_model(self, voice: Voice) -> None:
        """Logs that a voice's vectors were trained for another model, at level WARNING."""
        trained_for = voice.provenance.get(MODEL_KEY)
        if voice.vectors is None or trained_for is None:
            return
        model = self._model()
        if model not in (None, trained_for):
            logger.warning(
                "voice %r was trained for another model of these sizes (%s, this one is %s): it may "
                "not sound as it should",
                voice.name,
                trained_for,
                model,
            )
