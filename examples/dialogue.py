"""Two speakers, each turn with all earlier ones as context: `python examples/dialogue.py --model DIR`.

Where the model directory has `prompts/conversational_a.wav` and `_b.wav`, each with its transcript in
a `.txt` beside it, they set the two voices. (The published recordings come without transcripts.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from csm_jax import Segment, load_csm_1b
from csm_jax.audio import read_audio, write_audio

LINES = (
    "Did you hear the rain last night?",
    "I did, and I left the window open.",
    "So that is why the cat is wet.",
    "She blames me, as she always does.",
)


def voices(model: Path) -> list[Segment]:
    """Returns the recordings that set the voices of speakers 0 and 1, as far as they are there."""
    found = []
    for speaker, name in enumerate(("conversational_a", "conversational_b")):
        sound, text = (model / "prompts" / f"{name}.{suffix}" for suffix in ("wav", "txt"))
        if sound.is_file() and text.is_file():
            audio, rate = read_audio(sound)
            found.append(Segment(speaker, text.read_text("utf-8").strip(), audio, rate))
    return found


def main() -> None:
    """Writes the dialogue as one sound file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("sesame/csm-1b"))
    parser.add_argument("--output", default="dialogue.wav")
    parser.add_argument("--max-audio-length-ms", type=float, default=10_000)
    args = parser.parse_args()

    generator = load_csm_1b(args.model)
    prompts, turns = voices(args.model), []
    for number, line in enumerate(LINES):
        audio = generator.generate(
            line, number % 2, [*prompts, *turns], args.max_audio_length_ms, seed=number
        )
        print(f"[{number % 2}] {line}  ({len(audio) / generator.sample_rate:.2f} s)")
        if len(audio):
            turns.append(Segment(number % 2, line, audio, generator.sample_rate))
    sound = [turn.audio for turn in turns] or [np.zeros(0, np.float32)]
    write_audio(args.output, np.concatenate(sound), generator.sample_rate)


if __name__ == "__main__":
    main()
