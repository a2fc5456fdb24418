"""Speed of the watermark on this machine: marking, streaming and reading, and silentcipher beside them.

    python benchmarks/watermark.py                           # 10 s at 24 kHz, published sizes, random weights
    python benchmarks/watermark.py --files DIR --reference   # ours alone, without torch
    python benchmarks/watermark.py --seconds 2 --rounds 2

Contenders take turns, round by round, on the same weights, in one process; the figure is each one's
fastest round, since a shared machine can only add time. What compiles is run once before and counted
apart. The silentcipher package is given audio at 44.1 kHz: it leaves resampling to librosa, and ours
counts its own. The last line printed is the whole result as JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the random weights live with the tests

import numpy as np  # noqa: E402

from benchmarks.bench import machine, timed  # noqa: E402
from benchmarks.report import report  # noqa: E402
from csm_jax.audio import resample  # noqa: E402
from csm_jax.config import SAMPLE_RATE  # noqa: E402
from csm_jax.watermark import JaxWatermarker, Watermarker  # noqa: E402
from csm_jax.watermark_key import DEFAULT_KEY  # noqa: E402

PUSH_SAMPLES = 1920  # what a stream of speech makes at once: one frame
NAMES = ("silentcipher", "torch-bridge")


def noise(seconds: float) -> np.ndarray:
    """Returns something to mark: low-pass noise at 24 kHz."""
    samples = round(seconds * SAMPLE_RATE)
    x = np.random.default_rng(0).standard_normal(samples + 20)
    return (0.3 * np.convolve(x, np.ones(20) / 20, "same")[:samples]).astype(np.float32)


def contenders(
    name: str, watermarker: Watermarker, audio: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Returns what to time of a `Watermarker`, by name."""

    def stream() -> None:
        opened = watermarker.open_stream(SAMPLE_RATE, DEFAULT_KEY)
        for start in range(0, audio.size, PUSH_SAMPLES):
            opened.push(audio[start : start + PUSH_SAMPLES])
        opened.flush()

    return {
        f"{name} embed": lambda: watermarker.embed(audio, SAMPLE_RATE, DEFAULT_KEY),
        f"{name} stream": stream,
        f"{name} detect": lambda: watermarker.detect(audio, SAMPLE_RATE),
    }


def package_contenders(directory: Path, audio: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Returns what to time of the silentcipher package: marking, and reading at one phase."""
    from csm_jax.watermark.interface import MESSAGE_SDR_DB
    from tests.support import silentcipher

    model = silentcipher.package_model(directory, silentcipher.HPARAMS)
    rate = silentcipher.HPARAMS["SR"]
    inside = resample(audio, SAMPLE_RATE, rate)
    key = list(DEFAULT_KEY)
    return {
        "silentcipher embed": lambda: model.encode_wav(
            inside, rate, key, message_sdr=MESSAGE_SDR_DB, calc_sdr=False
        ),
        "silentcipher read once": lambda: model.decode_wav(inside, rate, False),
    }


def measure(
    directory: Path, *, seconds: float, rounds: int, reference: list[str]
) -> dict[str, Any]:
    """Returns the figures of one directory of silentcipher's files.

    Args:
        directory: The files.
        seconds: Of audio.
        rounds: Turns of each contender.
        reference: Which of `NAMES` to run beside ours.
    """
    audio = noise(seconds)
    ours = JaxWatermarker.from_dir(directory)
    runs = contenders("csm_jax", ours, audio)
    compile_s = timed(lambda: ours.embed(audio[:SAMPLE_RATE], SAMPLE_RATE, DEFAULT_KEY))
    inside = resample(audio, SAMPLE_RATE, 44_100)
    networks, framed = ours._networks, ours._framed(inside)
    runs["csm_jax read once"] = lambda: networks.read([framed])
    if "torch-bridge" in reference:
        from csm_jax.bridge.watermark import TorchWatermarker

        runs |= contenders("torch-bridge", TorchWatermarker.from_dir(directory), audio)
    if "silentcipher" in reference:
        runs |= package_contenders(directory, audio)
    laps: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            lap = timed(run)
            if turn:  # the first compiles and warms up
                laps[name].append(lap)
    best = {name: min(done) for name, done in laps.items()}
    return {
        "machine": machine(),
        "seconds": seconds,
        "rounds": rounds,
        "compile_embed_s": compile_s,
        "best_s": best,
        "cost": {name: lap / seconds for name, lap in best.items()},
        "times_as_fast": {
            name: lap / best[f"csm_jax {name.partition(' ')[2]}"]
            for name, lap in best.items()
            if not name.startswith("csm_jax")
        },
    }


def card(result: dict[str, Any]) -> str:
    """Returns the result for people."""
    lines = [
        f"watermark · {result['seconds']:g} s at 24 kHz · {result['machine']['cpu']} × "
        f"{result['machine']['cores']} · {result['machine']['device']}",
        f"first second of audio, with compilation: {result['compile_embed_s']:.1f} s",
    ]
    for name, lap in result["best_s"].items():
        line = f"  {name:24s} {lap:8.3f} s  {result['cost'][name]:7.3f} s per second of audio"
        if name in result["times_as_fast"]:
            line += f"  csm_jax is {result['times_as_fast'][name]:.2f}× as fast"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints a card and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument(
        "--files", type=Path, help="silentcipher's files; random weights by default (needs torch)"
    )
    parser.add_argument(
        "--reference", nargs="*", choices=NAMES, default=["silentcipher"], help="run beside ours"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.files
        if directory is None:
            from tests.support import silentcipher

            directory = silentcipher.write_random(Path(scratch) / "random")
        report(
            "watermark",
            lambda: measure(
                directory, seconds=args.seconds, rounds=args.rounds, reference=args.reference
            ),
            card,
            argv=argv,
            path=None,
        )


if __name__ == "__main__":
    main()
