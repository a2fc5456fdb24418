"""What `make demo` runs: builds a model directory with random weights, speaks, and draws the result.

The commands it prints are those a user would give with the real weights.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the builder is shared with the tests

from csm_jax import cli  # noqa: E402
from csm_jax.audio import read_audio  # noqa: E402


def draw(audio_path: Path, picture_path: Path) -> None:
    """Writes waveform and spectrogram of a sound file as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    audio, rate = read_audio(audio_path)
    figure, (wave, spectrum) = plt.subplots(
        2, 1, figsize=(10, 6), sharex=True, layout="constrained"
    )
    wave.plot([i / rate for i in range(len(audio))], audio, linewidth=0.4)
    wave.set(ylabel="amplitude", title=audio_path.name)
    spectrum.specgram(audio, NFFT=1024, Fs=rate, noverlap=768, vmin=-140)
    spectrum.set(ylabel="frequency (Hz)", xlabel="time (s)")
    figure.savefig(picture_path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "demo-model")
    parser.add_argument("--max-audio-length-ms", default="4000")
    parser.add_argument("--text", default="Hello from a model that has not learned to speak.")
    args = parser.parse_args()

    from tests.support import demo

    print("building a model directory with random weights")
    demo.build(args.model, note=lambda line: print(f"  {line}"))
    args.out.mkdir(parents=True, exist_ok=True)
    wav, png = args.out / "demo.wav", args.out / "demo.png"

    command = ["generate", args.text, "--speaker", "1", "--model", str(args.model)]
    for name, transcript, _ in demo.PROMPTS:
        speaker = "0" if name.endswith("_a") else "1"
        command += ["--context", str(args.model / "prompts" / f"{name}.wav"), transcript, speaker]
    command += ["--max-audio-length-ms", args.max_audio_length_ms, "--output", str(wav)]
    print(f"speaking\n  csm-jax {shlex.join(command)}")
    status = cli.main(command)
    if status:
        return status
    draw(wav, png)
    print(f"\nsound    {wav}\npicture  {png}")
    print("It is noise: the weights are random. With the published ones, the same command speaks.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
