"""What `make demo` runs: the small model inside the package says a sentence and a dialogue, and is listened to.

The commands it prints are those a user would give; with the published weights only `--model` is another.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from csm_jax import cli, hub
from csm_jax.audio import read_audio
from csm_jax.dialogue import read_dialogue
from csm_jax.eval.recognisers import PocketSphinx

DIALOGUE = Path(__file__).with_name("demo_dialogue.jsonl")


def draw(paths: Sequence[Path], titles: Sequence[str], picture: Path) -> None:
    """Writes waveform and spectrogram of sound files as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = [read_audio(path) for path in paths]
    widths = [len(audio) / rate for audio, rate in columns]
    figure, axes = plt.subplots(
        2, len(paths), figsize=(13, 5), sharex="col", squeeze=False, layout="constrained",
        width_ratios=widths,
    )  # fmt: skip
    for (wave, spectrum), (audio, rate), title in zip(axes.T, columns, titles, strict=True):
        wave.plot(np.arange(len(audio)) / rate, audio, linewidth=0.4)
        wave.set(title=title, ylim=(-1, 1))
        spectrum.specgram(audio, NFFT=1024, Fs=rate, noverlap=768, vmin=-140)
        spectrum.set(xlabel="time (s)", ylim=(0, 8000))
    axes[0, 0].set_ylabel("amplitude")
    axes[1, 0].set_ylabel("frequency (Hz)")
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def main() -> int:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="directory")
    parser.add_argument("--text", default="Hello, world. This is my voice.")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    sentence, dialogue = args.out / "sentence.wav", args.out / "dialogue.wav"
    spoken = [(sentence, args.text)]
    for i, (_, text) in enumerate(read_dialogue(DIALOGUE), start=1):
        spoken.append((args.out / f"turn-{i:02d}.wav", text))
    for path in (dialogue, *(path for path, _ in spoken)):
        path.unlink(missing_ok=True)  # a turn without audio would be heard in an earlier run's file
    commands = (
        [args.text, "-o", str(sentence)],
        ["--dialogue", str(DIALOGUE), "-o", str(dialogue), "--turns-dir", str(args.out)],
    )
    for words in commands:
        command = ["generate", "--model", hub.DEMO, "--temperature", "0.6", *words]
        print(f"\n$ csm-jax {shlex.join(command)}")
        if status := cli.main(command):
            return status

    listen(spoken)
    picture = args.out / "demo.png"
    draw((sentence, dialogue), ("the sentence", "the dialogue"), picture)
    print(f"\nsound    {sentence}\n         {dialogue}\npicture  {picture}")
    return 0


def listen(spoken: Sequence[tuple[Path, str]]) -> None:
    """Prints what a recogniser, which expects nothing but the model's words, hears in recordings."""
    words = sorted(hub.locate(hub.DEMO).vocabulary() or ())
    recogniser = PocketSphinx([words], language_model_kind="unigram")
    print(f"\nwhat {recogniser.name} hears:")
    for path, text in spoken:
        heard = recogniser.hear(*read_audio(path)) if path.exists() else ""
        print(f"  said   {text}\n  heard  {heard}")


if __name__ == "__main__":
    sys.exit(main())
