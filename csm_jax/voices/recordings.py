"""From recordings to a voice: where they come from, whether they will do, and their codes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

from csm_jax import __version__
from csm_jax.audio import check_audio, check_rate, resample
from csm_jax.config import SAMPLE_RATE, SAMPLES_PER_FRAME
from csm_jax.prompt import AudioEncoder, Segment, check_speaker, check_text
from csm_jax.voices.voice import Voice, VoiceTurn, check_name

logger = logging.getLogger(__name__)

MAX_SECONDS = 60.0
"""Most audio of a voice, all turns together: 750 of the model's 2,048 positions."""
_SHORT_SECONDS = 3.0
_LEAST_RMS = 1e-3  # -60 dB: a recording in a quiet room without anybody speaking
# Fast speech has about 20 a second; the allowance is for cuts of a word or two.
_CHARACTERS_PER_SECOND, _CHARACTERS_ALLOWANCE = 50, 50


def make_provenance(source: str, *, consent: bool) -> dict[str, str]:
    """Returns the provenance of a voice made now: source, consent, date and version.

    Args:
        source: Where the recordings come from, in free text.
        consent: Whether whoever is heard agreed to being cloned.

    Raises:
        TypeError, ValueError: No source, or no consent.
    """
    check_text(source, "the source of a voice")
    if not consent:
        raise ValueError(
            "a voice needs the consent of the person who is heard: the model's terms do not allow "
            "cloning a voice without it"
        )
    return {
        "source": source,
        "consent": "yes",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "csm_jax": __version__,
    }


def check_recordings(segments: Sequence[Segment]) -> list[np.ndarray]:
    """Returns the audio of what is to become a voice, float32 [W] at 24 kHz each.

    Raises:
        TypeError: An item is not a `Segment`, or holds something of the wrong type.
        ValueError: There are none; bad text, speaker or audio; a recording is nearly silent, or cannot
            hold its transcript; all together are too long.
    """
    if not segments:
        raise ValueError("a voice needs at least one recording")
    checked, seconds = [], 0.0
    for i, segment in enumerate(segments):
        name = f"recording {i + 1}"
        if not isinstance(segment, Segment):
            raise TypeError(f"{name} must be a Segment, got {type(segment).__name__}")
        check_speaker(segment.speaker, f"the speaker of {name}")
        text = check_text(segment.text, f"the transcript of {name}")
        rate = check_rate(segment.sample_rate, f"the sample rate of {name}")
        samples = check_audio(segment.audio, name)
        _check_sound(samples, samples.size / rate, text, name)
        seconds += samples.size / rate
        checked.append((samples, rate))
    if seconds > MAX_SECONDS:
        raise ValueError(
            f"a voice may hold {MAX_SECONDS:g} s of audio, got {seconds:,.2f} s; cut it: 5 to 15 s "
            "are enough"
        )
    return [resample(samples, rate, SAMPLE_RATE) for samples, rate in checked]


def _check_sound(samples: np.ndarray, seconds: float, text: str, name: str) -> None:
    rms = float(samples.std(dtype=np.float64))  # about the mean: a constant is no sound
    if rms < _LEAST_RMS:
        raise ValueError(
            f"{name} is nearly silent: its level is {rms:.2g} (root mean square, at least "
            f"{_LEAST_RMS:g} is needed); record it louder"
        )
    if len(text) > _CHARACTERS_PER_SECOND * seconds + _CHARACTERS_ALLOWANCE:
        raise ValueError(
            f"{name} lasts {seconds:,.1f} s and its transcript has {len(text):,} characters: nobody "
            "speaks so fast; give exactly the words that are said"
        )


def encode_voice(
    codec: AudioEncoder,
    segments: Sequence[Segment],
    *,
    name: str,
    provenance: Mapping[str, str],
) -> Voice:
    """Returns the voice in some recordings.

    Less than 3 s of audio are logged at level WARNING: a voice is then hardly recognised.

    Args:
        codec: Encodes the audio.
        segments: Who said what, and how it sounded, oldest first.
        name: What to call it.
        provenance: Where it comes from; see `make_provenance`.

    Raises:
        TypeError, ValueError: Bad name or recordings, see `check_name` and `check_recordings`.
    """
    check_name(name)
    turns = []
    for segment, audio in zip(segments, check_recordings(segments), strict=True):
        codes = codec.encode(audio)
        expected = -(-audio.size // SAMPLES_PER_FRAME)
        if len(codes) != expected:
            raise ValueError(
                f"the codec gave {len(codes):,} frames for {audio.size:,} samples, not {expected:,}, "
                f"one per {SAMPLES_PER_FRAME:,}: it is not Mimi"
            )
        turns.append(VoiceTurn(speaker=segment.speaker, text=segment.text, codes=codes))
    voice = Voice(
        name=name,
        turns=tuple(turns),
        codebook_size=codec.codebook_size,
        provenance=provenance,
    )
    if voice.seconds < _SHORT_SECONDS:
        logger.warning(
            "voice %r has only %.2f s of audio: it will hardly be recognised; 5 to 15 s are better",
            name,
            voice.seconds,
        )
    return voice
