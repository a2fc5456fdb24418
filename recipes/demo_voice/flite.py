"""One sentence read by flite: found, asked, trimmed and levelled."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from csm_jax.audio import read_audio
from csm_jax.config import SAMPLE_RATE

VOICES = ("rms", "awb")
"""Of flite; the speaker's number is the place here."""
BEFORE_S, AFTER_S = 0.040, 0.120
"""What is kept before the first sound and after the last one."""
PEAKS = (0.5, 0.7)
"""Between these, and there as near to a common loudness as can be."""

_RUMBLE_HZ = (30.0, 60.0)  # gone below the first, kept above the second
_TOP = (0.93, 1.0)  # of half flite's rate: kept below the first, gone above the second
_BLOCK_S = 0.1  # recordings are filled up to a multiple of it

_LOUDNESS = 0.12  # RMS of what is not silence
_STEP_S = 0.005
_SILENT = 0.01  # a step is silent whose RMS is below this share of the loudest one's
_FADE_IN_S, _FADE_OUT_S = 0.005, 0.060


def levelling() -> dict[str, object]:
    """Returns the numbers by which recordings are filtered, trimmed and levelled, by name."""
    return {
        "rumble_hz": list(_RUMBLE_HZ),
        "top": list(_TOP),
        "loudness": _LOUDNESS,
        "silent": _SILENT,
        "steps_s": [_BLOCK_S, _STEP_S, _FADE_IN_S, _FADE_OUT_S],
    }


def find_flite() -> str:
    """Returns the path of flite, which has the voices.

    Raises:
        FileNotFoundError: There is none on PATH, or one without them.
    """
    flite = shutil.which("flite")
    if flite is None:
        raise FileNotFoundError(
            "the program flite is not on PATH: install it (Debian and Ubuntu: apt install flite)"
        )
    listed = subprocess.run([flite, "-lv"], capture_output=True, text=True, check=False).stdout
    missing = [voice for voice in VOICES if voice not in listed.partition(":")[2].split()]
    if missing:
        raise FileNotFoundError(
            f"{flite} lacks the voices {', '.join(missing)} (it says {listed.strip()!r}): install flite 2.2, "
            "as Debian and Ubuntu package it"
        )
    return flite


def version_of(flite: str) -> str:
    """Returns what flite says of its version."""
    said = subprocess.run([flite, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in said.splitlines() if "version" in line), "unknown")


def speak(flite: str, text: str, *, voice: str, stretch: float, folder: Path) -> np.ndarray:
    """Returns how a voice of flite reads a text, trimmed and levelled: float32 [W] at 24 kHz.

    Args:
        flite: Path of the program.
        text: What is read.
        voice: Its name.
        stretch: How much slower than the voice's own speed.
        folder: Of temporary files.

    Raises:
        RuntimeError: flite made no recording, or a silent one.
    """
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".wav") as file:
        command = [flite, "-voice", voice, "--setf", f"duration_stretch={stretch:.2f}"]
        ended = subprocess.run(
            [*command, "-t", text, "-o", file.name],
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            if ended.returncode:
                raise ValueError(f"exit status {ended.returncode}")
            audio, rate = read_audio(file.name)
            return trim(at_sample_rate(audio, rate))
        except ValueError as error:
            raise RuntimeError(
                f"flite made no recording of {text!r} in the voice {voice}: {error}; "
                f"{ended.stderr.strip() or 'it said nothing'}"
            ) from error


def at_sample_rate(audio: np.ndarray, rate: int) -> np.ndarray:
    """Returns a recording of a lower rate at 24 kHz, float32 [W], with silence after it.

    What lies below speech goes, the constant that flite adds above all. Nothing appears above the
    recording's own band: the mirror images of a short filter are faint, and yet all that a codec would
    hear there.

    Args:
        audio: float32 [W].
        rate: Its hertz, a multiple of 10.
    """
    block = round(_BLOCK_S * rate)
    blocks = (
        len(audio) // block + 2
    )  # at least one of silence, as the end runs on into the beginning
    spectrum = np.fft.rfft(np.pad(audio.astype(np.float64), (0, blocks * block - len(audio))))
    hertz = np.arange(spectrum.size) / (blocks * _BLOCK_S)
    top = rate / 2
    spectrum *= _ramp(hertz, *_RUMBLE_HZ) * (1 - _ramp(hertz, _TOP[0] * top, _TOP[1] * top))
    samples = blocks * round(_BLOCK_S * SAMPLE_RATE)
    return (np.fft.irfft(spectrum, samples) * (SAMPLE_RATE / rate)).astype(np.float32)


def _ramp(hertz: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns 0 below `low`, 1 above `high`, and half a cosine between them."""
    return 0.5 - 0.5 * np.cos(np.pi * np.clip((hertz - low) / (high - low), 0, 1))


def trim(audio: np.ndarray) -> np.ndarray:
    """Returns speech that begins `BEFORE_S` before its first sound and ends `AFTER_S` after its last one,
    faded in and out, of a common loudness.

    Args:
        audio: float32 [W] at 24 kHz.

    Raises:
        ValueError: It is silent.
    """
    first, last = sounding(audio)
    before, after = round(BEFORE_S * SAMPLE_RATE), round(AFTER_S * SAMPLE_RATE)
    found = np.pad(audio, (before, after))[first : last + before + after].astype(np.float32)
    fade_in, fade_out = round(_FADE_IN_S * SAMPLE_RATE), round(_FADE_OUT_S * SAMPLE_RATE)
    found[:fade_in] *= np.linspace(0, 1, fade_in, dtype=np.float32)
    found[-fade_out:] *= np.linspace(1, 0, fade_out, dtype=np.float32)
    loudness = np.sqrt(np.mean(np.square(found[before:-after])))
    peak = np.abs(found).max()
    return found * np.float32(np.clip(_LOUDNESS / loudness, PEAKS[0] / peak, PEAKS[1] / peak))


def sounding(audio: np.ndarray) -> tuple[int, int]:
    """Returns where the first sound of speech at 24 kHz begins and the last one ends, in samples.

    Raises:
        ValueError: It is silent.
    """
    step = round(_STEP_S * SAMPLE_RATE)
    steps = audio[: len(audio) // step * step].reshape(-1, step)
    power = np.sqrt(np.mean(np.square(steps), axis=1, dtype=np.float64))
    if not power.size or not power.max():
        raise ValueError("it is silent")
    (loud,) = np.nonzero(power > _SILENT * power.max())
    return int(loud[0]) * step, int(loud[-1] + 1) * step
