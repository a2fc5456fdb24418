"""Engines over small random models, and their jobs."""

from __future__ import annotations

import dataclasses

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.engine import Engine, Job, Update
from csm_jax.request import Request
from csm_jax.slots import SlotSizes, VoicePrompt
from tests.support.model import prompt, short_config


def sizes(**changes: int) -> SlotSizes:
    """Returns sizes of a small engine."""
    given = {"slots": 4, "capacity": 256, "chunk_frames": 2, "prefill_rows": 2} | changes
    return SlotSizes(**given)


def job(
    config: CSMConfig,
    seed: int,
    *,
    frames: int = 8,
    text: int = 5,
    audio: int = 0,
    voice: int | None = None,
    **settings: float,
) -> Job:
    """Returns a job with a random prompt, and perhaps one of several random voices (`voice_prompt`)."""
    request = Request(text="x", speaker=0, seed=seed, max_audio_length_ms=80 * frames, **settings)
    return Job(
        request=request,
        prompt=prompt(config, text, audio, seed=seed),
        voice_key=None if voice is None else f"voice {voice}",
        voice=None if voice is None else voice_prompt(config, voice),
    )


def voice_prompt(config: CSMConfig, voice: int) -> VoicePrompt:
    """Returns a random voice: of turns, of vectors and turns, or of vectors, by its number."""
    frames, mask = prompt(config, 4, 5 + 17 * voice, seed=1000 + voice)
    if voice % 3 == 0:
        return VoicePrompt(frames=frames, mask=mask)
    kept, count = (len(frames), 4) if voice % 3 == 1 else (0, len(frames))
    trained = vectors(config, count, seed=voice)
    return VoicePrompt(frames=frames[:kept], mask=mask[:kept], vectors=trained)


def vectors(config: CSMConfig, count: int, *, seed: int) -> np.ndarray:
    """Returns random inputs of the backbone, about as large as embeddings."""
    dim = config.backbone.embed_dim
    return np.random.default_rng(seed).normal(0, dim**-0.5, (count, dim)).astype(np.float32)


class Collected:
    """What became of an engine's requests, by ticket."""

    def __init__(self) -> None:
        self.codes: dict[int, list[np.ndarray]] = {}
        self.last: dict[int, Update] = {}

    def take(self, updates: list[Update]) -> None:
        """Adds updates; a request must not be heard of after its end."""
        for update in updates:
            assert update.ticket not in self.last
            self.codes.setdefault(update.ticket, []).append(update.codes)
            if update.finish_reason is not None:
                self.last[update.ticket] = update

    def of(self, ticket: int) -> np.ndarray:
        """Returns all codes of a request."""
        return np.concatenate(self.codes[ticket])


def drain(engine: Engine) -> Collected:
    """Returns what becomes of everything the engine has."""
    seen = Collected()
    while engine.busy:
        seen.take(engine.step())
    return seen


def micro_config() -> CSMConfig:
    """Returns the smallest sizes that have every part, with 4 codes: a frame of zeros is no rarity."""
    sizes = short_config()
    one = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "embed_dim": 32}
    return dataclasses.replace(
        sizes,
        backbone=dataclasses.replace(sizes.backbone, **one, intermediate_dim=32),
        decoder=dataclasses.replace(sizes.decoder, **one, intermediate_dim=32, max_seq_len=3),
        text_vocab_size=32,
        num_codebooks=3,
        codebook_size=4,
        audio_vocab_size=7,
    )
