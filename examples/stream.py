"""Writes speech to a file while it is being made: `python examples/stream.py "Hello." --model DIR`.

The file grows with every piece, so a player can follow it.
"""

from __future__ import annotations

import argparse
import time

import soundfile

from csm_jax import load_csm_1b


def main() -> None:
    """Streams one text and prints when the first sound was there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default="This is heard before it is finished.")
    parser.add_argument("--model", default="sesame/csm-1b")
    parser.add_argument("--output", default="stream.wav")
    parser.add_argument("--chunk-frames", type=int, default=6, help="80 ms each")
    parser.add_argument("--max-audio-length-ms", type=float, default=10_000)
    args = parser.parse_args()

    generator = load_csm_1b(args.model)
    started, first, samples = time.perf_counter(), None, 0
    chunks = generator.stream(
        args.text,
        speaker=0,
        max_audio_length_ms=args.max_audio_length_ms,
        chunk_frames=args.chunk_frames,
    )
    with soundfile.SoundFile(
        args.output, "w", samplerate=generator.sample_rate, channels=1
    ) as file:
        for chunk in chunks:
            if first is None:
                first = time.perf_counter() - started
                print(f"first audio after {first:.2f} s")
            file.write(chunk)
            file.flush()
            samples += len(chunk)
            print(f"  {samples / generator.sample_rate:6.2f} s of audio", flush=True)
    elapsed = time.perf_counter() - started
    print(f"{args.output}: {samples / generator.sample_rate:.2f} s, made in {elapsed:.2f} s")


if __name__ == "__main__":
    main()
