"""Speaks one text: `python examples/say.py "Hello from Sesame." --model DIR`."""

from __future__ import annotations

import argparse

from csm_jax import load_csm_1b
from csm_jax.audio import write_audio


def main() -> None:
    """Writes the text as a sound file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default="Hello from Sesame.")
    parser.add_argument("--model", default="sesame/csm-1b")
    parser.add_argument("--output", default="say.wav")
    parser.add_argument("--max-audio-length-ms", type=float, default=10_000)
    args = parser.parse_args()

    generator = load_csm_1b(args.model)
    audio = generator.generate(
        text=args.text,
        speaker=0,
        context=[],
        max_audio_length_ms=args.max_audio_length_ms,
    )
    write_audio(args.output, audio, generator.sample_rate)
    print(f"{args.output}: {len(audio) / generator.sample_rate:.2f} s")


if __name__ == "__main__":
    main()
