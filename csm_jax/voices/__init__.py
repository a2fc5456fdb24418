"""Voices by name: recorded turns as codes and text, and the directory they are kept in.

A voice is what a request may put before its own context: one or more turns with their audio, already
encoded, so that neither the recordings nor Mimi's encoder are needed to speak with it. The model does
not know the name; `Voice.key` tells two voices apart by what the model reads.
"""

from csm_jax.voices.files import VoiceFileError
from csm_jax.voices.library import UnknownVoiceError, VoiceLibrary, default_directory
from csm_jax.voices.recordings import (
    MAX_SECONDS,
    check_recordings,
    encode_voice,
    make_provenance,
)
from csm_jax.voices.voice import Voice, VoiceTurn, check_name, voice_prompt

__all__ = [
    "MAX_SECONDS",
    "UnknownVoiceError",
    "Voice",
    "VoiceFileError",
    "VoiceLibrary",
    "VoiceTurn",
    "check_name",
    "check_recordings",
    "default_directory",
    "encode_voice",
    "make_provenance",
    "voice_prompt",
]
