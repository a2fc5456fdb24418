"""Half an hour of mixed load on a small random model: does anything grow?

    python benchmarks/soak.py                       # 30 minutes
    python benchmarks/soak.py --minutes 3           # a look
    python benchmarks/soak.py --minutes 3 --leak host     # a planted leak, which must be found
    python benchmarks/soak.py --minutes 3 --leak device

Whole requests, streams, voices, bad requests and requests that are given up go through the engine, the
codec and the watermark. Resident memory, JAX's live arrays, open files and compilations are sampled; after
the warm-up (a fifth of the time) memory may grow by 20 MB and the others not at all. Exit status 1 if it
does. The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the model lives with the tests

import jax  # noqa: E402
import numpy as np  # noqa: E402

from csm_jax import Request, load_csm_1b  # noqa: E402
from csm_jax.synthesizer import Result, Synthesizer  # noqa: E402
from csm_jax.synthesizer_settings import default_settings  # noqa: E402
from csm_jax.voices import Voice, VoiceTurn  # noqa: E402
from tests.support.model_directory import build  # noqa: E402

MOST_GROWTH_MB = 20.0
WARM_UP_SHARE = 0.2
SAMPLES = 60


def resident_mb() -> float:
    """Returns this process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def sample(synthesizer: Synthesizer, started: float) -> dict[str, float]:
    """Returns what must not grow, between two requests."""
    gc.collect()
    return {
        "minutes": (time.perf_counter() - started) / 60,
        "rss_mb": resident_mb(),
        "live_arrays": len(jax.live_arrays()),
        "live_bytes": sum(array.nbytes for array in jax.live_arrays()),
        "files": len(os.listdir("/proc/self/fd")),
        "compilations": synthesizer.compilations,
    }


def voices(count: int, num_codebooks: int) -> list[Voice]:
    """Returns random voices."""
    rng = np.random.default_rng(0)
    return [
        Voice(
            name=f"voice-{i}",
            turns=(
                VoiceTurn(
                    speaker=i,
                    text="A voice.",
                    codes=rng.integers(0, 2048, (10 + i, num_codebooks), dtype=np.int32),
                ),
            ),
            codebook_size=2048,
            provenance={"source": "random", "consent": "none needed", "created": "-"},
        )
        for i in range(count)
    ]


def requests(rng: random.Random, many: list[Voice]) -> Iterator[tuple[int, Request]]:
    """Yields requests without end, one in twenty of them bad."""
    for i in range(sys.maxsize):
        words = " ".join(rng.choices(["one", "two", "three", "four"], k=rng.randint(1, 12)))
        yield (
            i,
            Request(
                text="" if rng.random() < 0.05 else words,
                speaker=rng.randint(0, 3),
                voice=rng.choice([None, *many]),
                seed=i,
                max_audio_length_ms=80 * rng.randint(1, 25),
                temperature=rng.choice([0.0, 0.9]),
                top_p=rng.choice([1.0, 0.9]),
            ),
        )


def round_of_load(
    synthesizer: Synthesizer, rng: random.Random, source: Iterator[tuple[int, Request]]
) -> int:
    """Runs some requests of every kind, and returns how many ended."""
    ended = 0
    tickets: list[int] = []
    for _ in range(rng.randint(1, 12)):
        number, request = next(source)
        try:
            ticket = synthesizer.submit(request, id=number, streamed=rng.random() < 0.3)
        except ValueError:
            ended += 1
            continue
        tickets.append(ticket)
    while synthesizer.busy:
        ended += sum(isinstance(output, Result) for output in synthesizer.pump())
        if tickets and rng.random() < 0.02:
            synthesizer.cancel(rng.choice(tickets))
    return ended


def verdict(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Returns by how much each figure grew after the warm-up, and whether that is allowed.

    Memory is compared as the medians of the first and the last fifth, so that one sample does not decide.
    """
    end = samples[-1]["minutes"]
    kept = [s for s in samples if s["minutes"] >= WARM_UP_SHARE * end]
    fifth = max(1, len(kept) // 5)
    growth = {
        name: float(
            np.median([s[name] for s in kept[-fifth:]]) - np.median([s[name] for s in kept[:fifth]])
        )
        for name in ("rss_mb", "live_arrays", "live_bytes", "files", "compilations")
    }
    good = growth["rss_mb"] <= MOST_GROWTH_MB and all(
        growth[name] <= 0 for name in ("live_arrays", "live_bytes", "files", "compilations")
    )
    return {"growth": growth, "good": good}


def main(argv: list[str] | None = None) -> int:
    """Runs the load and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--leak", choices=("host", "device"), help="plant a leak")
    parser.add_argument("--json", type=Path, help="also write the result and the samples here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        generator = load_csm_1b(build(Path(directory) / "model"))
        settings = default_settings(generator.config, slots=args.slots, capacity=256)
        synthesizer = generator.synthesizer(settings)
        synthesizer.warm_up()
        rng = random.Random(0)
        source = requests(rng, voices(12, generator.config.num_codebooks))
        leaked: list[Any] = []
        samples: list[dict[str, float]] = []
        ended = 0
        started = time.perf_counter()
        while (now := time.perf_counter() - started) < 60 * args.minutes:
            if len(samples) <= SAMPLES * now / (60 * args.minutes):
                samples.append(sample(synthesizer, started))
            ended += round_of_load(synthesizer, rng, source)
            if args.leak == "host":
                leaked.append(np.ones(2**22, np.uint8))
            elif args.leak == "device":
                leaked.append(jax.numpy.ones(16))
        samples.append(sample(synthesizer, started))
        result = {
            "minutes": args.minutes,
            "leak": args.leak,
            "requests": ended,
            "slot_use": synthesizer.slot_use(),
            **verdict(samples),
            "first": samples[0],
            "last": samples[-1],
        }
    for name, by in result["growth"].items():
        print(f"{name:14s} {by:+,.1f} after the warm-up")
    print(
        f"{ended:,} requests in {args.minutes:g} minutes: {'good' if result['good'] else 'GROWING'}"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(result | {"samples": samples}, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["good"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
