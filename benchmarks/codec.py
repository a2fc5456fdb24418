"""Speed of Mimi on this machine: ours beside moshi on PyTorch, the published size, random weights.

    python benchmarks/codec.py
    python benchmarks/codec.py --rounds 3 --json benchmarks/results/codec-NAME.json

Contenders take turns, round by round; a ratio is the median of the rounds' ratios. Compilation and the
first call of every contender are not counted. The last line printed is the whole result as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # shared with the other benchmarks and the parity tests

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.bench import machine, timed  # noqa: E402
from csm_jax.bridge.mimi import TorchMimi  # noqa: E402
from csm_jax.codec import Codec  # noqa: E402
from csm_jax.mimi.codec import JaxMimi  # noqa: E402
from csm_jax.mimi.config import mimi  # noqa: E402
from tests.support.mimi import moshi_model, random_params  # noqa: E402

SECONDS = 10
BATCH = 8
STREAMED_FRAMES = 25
DECODE_GFLOP_PER_S = 5.4
"""Multiplications and additions of the decoder and its transformer per second of audio, counted from
their shapes: 2.06 and 0.63 thousand million multiply-adds."""


def tasks(codes: np.ndarray, audio: np.ndarray) -> dict[str, tuple[Callable[[Codec], Any], float]]:
    """Returns what is measured by name: the work, and the seconds of audio in it."""

    def stream(codec: Codec) -> None:
        with codec.open_stream() as decoder:
            for frame in codes[:STREAMED_FRAMES]:
                decoder.decode(frame[None])

    return {
        "decode": (lambda codec: codec.decode(codes), SECONDS),
        "encode": (lambda codec: codec.encode(audio), SECONDS),
        "stream by frame": (stream, STREAMED_FRAMES * 0.08),
        f"decode batch of {BATCH}": (
            lambda codec: codec.decode_batch([codes] * BATCH),
            SECONDS * BATCH,
        ),
    }


def matrix_gflops() -> float:
    """Returns the thousand million operations per second of a large float32 matrix product."""
    a, b = jnp.ones((1024, 2048)), jnp.ones((2048, 2048))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    jax.block_until_ready(product(a, b))
    best = min(timed(lambda: jax.block_until_ready(product(a, b))) for _ in range(10))
    return 2 * 1024 * 2048 * 2048 / best / 1e9


def measure(rounds: int) -> dict[str, Any]:
    """Returns seconds per second of audio of both, and their ratio, for every task."""
    config = mimi()
    params = random_params(config)
    contenders = {
        "ours": JaxMimi(config, params),
        "moshi": TorchMimi(moshi_model(config, params)),
    }
    rng = np.random.default_rng(0)
    codes = rng.integers(0, config.codebook_size, (SECONDS * 25 // 2, 32), dtype=np.int32)
    audio = rng.normal(0, 0.1, SECONDS * config.sample_rate).astype(np.float32)
    rows: dict[str, Any] = {}
    for name, (work, seconds) in tasks(codes, audio).items():
        for codec in contenders.values():
            work(codec)
        laps: dict[str, list[float]] = {each: [] for each in contenders}
        for _ in range(rounds):
            for each, codec in contenders.items():
                laps[each].append(timed(lambda c=codec, w=work: w(c)) / seconds)
        rows[name] = {
            **{each: statistics.median(times) for each, times in laps.items()},
            "p95": {each: float(np.quantile(times, 0.95)) for each, times in laps.items()},
            "ratio": statistics.median(
                theirs / mine for mine, theirs in zip(laps["ours"], laps["moshi"], strict=True)
            ),
        }
    return rows


def main() -> None:
    """Measures, and prints a card and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()

    result = {"machine": machine(), "matrix_gflops": matrix_gflops(), "mimi": measure(args.rounds)}
    print(f"Mimi, published size, float32, seconds per second of audio ({args.rounds} rounds)")
    for name, row in result["mimi"].items():
        print(
            f"  {name:<18} ours {row['ours']:.4f}   moshi {row['moshi']:.4f}   "
            f"ours is {row['ratio']:.2f}x as fast"
        )
    rows = result["mimi"]
    for name in ("decode", f"decode batch of {BATCH}"):
        rate = DECODE_GFLOP_PER_S / rows[name]["ours"]
        share = rate / result["matrix_gflops"]
        print(f"  {name}: {rate:.0f} GFLOP/s, {share:.0%} of a large matrix product's")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
