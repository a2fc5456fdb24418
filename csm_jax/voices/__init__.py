"""Voices by name: recorded turns as codes and text, or trained vectors, and the directory they are kept in.

A voice is what a request may put before its own context: turns with their audio, already encoded, so that
neither the recordings nor Mimi's encoder are needed to speak with it, or inputs of the backbone that were
trained. The model does not know the name; `Voice.key` tells two voices apart by what the model reads.
"""

from csm_jax.voices.files import VoiceFileError, read_voice, write_voice
from csm_jax.voices.library import UnknownVoiceError, VoiceLibrary, default_directory, find_voice
from csm_jax.voices.prefix import MODEL_KEY, model_hash, prefix_voice
from csm_jax.voices.recordings import (
    MAX_SECONDS,
    check_recordings,
    encode_voice,
    make_provenance,
)
from csm_jax.voices.voice import Voice, VoiceTurn, check_name, voice_prompt

__all__ = [
    "MAX_SECONDS",
    "MODEL_KEY",
    "UnknownVoiceError",
    "Voice",
    "VoiceFileError",
    "VoiceLibrary",
    "VoiceTurn",
    "check_name",
    "check_recordings",
    "default_directory",
    "encode_voice",
    "find_voice",
    "make_provenance",
    "model_hash",
    "prefix_voice",
    "read_voice",
    "voice_prompt",
    "write_voice",
]
