"""What the engine is given for a request: text, context and voice as frames."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.engine import Job
from csm_jax.prompt import EncodeCache, TextTokenizer, build_prompt
from csm_jax.request import Request, check_settings
from csm_jax.slots import Frames
from csm_jax.voices import Voice, voice_prompt

if TYPE_CHECKING:
    from csm_jax.codec import Codec

_VOICE_PROMPTS = 64  # kept on the host, about 0.1 MB each


class JobMaker:
    """Makes jobs for one model; remembers the context audio and the voices it saw last.

    Safe to share between threads.
    """

    def __init__(self, config: CSMConfig, tokenizer: TextTokenizer, codec: Codec) -> None:
        self.config = config
        self._tokenizer, self._encoder = tokenizer, EncodeCache(codec)
        self._voices: OrderedDict[str, Frames] = OrderedDict()
        self._lock = threading.Lock()

    def job(self, request: Request, *, segment_capacity: int) -> Job:
        """Returns the job of a request.

        Args:
            request: What to say.
            segment_capacity: Positions of a voice that can be shared; a longer one becomes part of
                the request's own prompt.

        Raises:
            TypeError, ValueError: The request is bad, or too long for the model.
        """
        check_settings(request)
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
            before=0 if voice is None else len(voice[0]),
        )
        own = (prompt.frames, prompt.mask)
        if voice is None or request.voice is None:
            return Job(request=request, prompt=own)
        if len(voice[0]) <= segment_capacity:
            return Job(request=request, prompt=own, voice_key=request.voice.key, voice=voice)
        whole = (np.concatenate([voice[0], own[0]]), np.concatenate([voice[1], own[1]]))
        return Job(request=request, prompt=whole)

    def _voice_prompt(self, voice: Voice) -> Frames:
        with self._lock:
            if voice.key not in self._voices:
                self._voices[voice.key] = voice_prompt(self._tokenizer, voice, config=self.config)
            self._voices.move_to_end(voice.key)
            while len(self._voices) > _VOICE_PROMPTS:
                self._voices.popitem(last=False)
            return self._voices[voice.key]
