"""A voice prompt kept for all who use it, beside the same prompt read again for every request.

    python benchmarks/voices.py                     # CSM-1B's size, random weights, about twenty minutes on 2 cores
    python benchmarks/voices.py --size tiny         # to see that it runs

One voice with a 10-s recording speaks utterances of 4.5 to 5.5 s, their lengths forced by their caps, in the same
engine with the same weights: once with the voice in a shared segment, once with no segments, so that every
request's prompt begins with the recording. Codes alone; compilation is not counted. Prefills are timed by
themselves afterwards, and their share is their number times that. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tokenizer lives with the tests

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.bench import SIZES, machine, timed  # noqa: E402
from benchmarks.engine import some_text  # noqa: E402
from benchmarks.report import report  # noqa: E402
from benchmarks.slot_use import CHARACTERS_PER_S  # noqa: E402
from csm_jax.config import FRAME_MS, CSMConfig, default_dtype  # noqa: E402
from csm_jax.engine import Engine, Job  # noqa: E402
from csm_jax.generate import Prefix  # noqa: E402
from csm_jax.jobs import JobMaker  # noqa: E402
from csm_jax.model import init_params, num_params  # noqa: E402
from csm_jax.prompt import TextTokenizer  # noqa: E402
from csm_jax.request import Request  # noqa: E402
from csm_jax.slots import Frames, Slots, SlotSizes, VoicePrompt  # noqa: E402
from csm_jax.synthesizer_settings import default_settings  # noqa: E402
from csm_jax.voices import Voice, VoiceTurn  # noqa: E402
from tests.support import tokenizer  # noqa: E402
from tests.support.codec import PlainCodec  # noqa: E402

VOICE_S, SHORTEST_S, LONGEST_S = 10.0, 4.5, 5.5


class CountingSlots(Slots):
    """Slots that remember which prompts were prefilled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefilled: list[tuple[Sequence[Frames], Sequence[int]]] = []

    def prefill(self, prompts: Sequence[Frames], segments: Sequence[int]) -> Prefix:
        """See `Slots.prefill`."""
        self.prefilled.append((prompts, segments))
        return super().prefill(prompts, segments)

    def share(self, voice: VoicePrompt, segment: int) -> bool:
        """See `Slots.share`; its time is taken as that of a prompt of the same length."""
        self.prefilled.append(([(voice.frames, voice.mask)], [-1]))
        return super().share(voice, segment)

    def prefill_s(self) -> float:
        """Returns the seconds that the prefills so far take by themselves."""
        groups: dict[int, list[tuple[Sequence[Frames], Sequence[int]]]] = {}
        for prompts, segments in self.prefilled:
            size = self.prefill_size(max(len(frames) for frames, _ in prompts))
            groups.setdefault(size, []).append((prompts, segments))
        total = 0.0
        for calls in groups.values():
            laps = [
                timed(lambda call=calls[0]: jax.block_until_ready(Slots.prefill(self, *call)))
                for _ in range(3)
            ]
            total += len(calls) * statistics.median(laps)
        return total


def make_jobs(config: CSMConfig, count: int, *, seed: int, shared: bool) -> list[Job]:
    """Returns one voice's jobs, with the voice by itself or as the beginning of each prompt."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(
        1, config.codebook_size, (round(VOICE_S * 1000 / FRAME_MS), config.num_codebooks)
    )
    turn = VoiceTurn(
        speaker=0, text=some_text(round(VOICE_S * CHARACTERS_PER_S), seed=seed), codes=codes
    )
    voice = Voice(name="voice", turns=(turn,), codebook_size=config.codebook_size, provenance={})
    maker = JobMaker(
        config,
        TextTokenizer(tokenizer.build_tokenizer(vocab_size=config.text_vocab_size)),
        # Has nothing to do: the voice is given as codes.
        PlainCodec(num_codebooks=config.num_codebooks, codebook_size=config.codebook_size),
    )
    frames = np.rint(rng.uniform(SHORTEST_S, LONGEST_S, count) * 1000 / FRAME_MS)
    return [
        maker.job(
            Request(
                text=some_text(round(float(n) * FRAME_MS / 1000 * CHARACTERS_PER_S), seed=i),
                speaker=0,
                voice=voice,
                seed=i,
                max_audio_length_ms=FRAME_MS * (float(n) + 0.5),
            ),
            segment_capacity=config.backbone.max_seq_len if shared else 0,
        )
        for i, n in enumerate(frames)
    ]


def speak(slots: Slots, jobs: Sequence[Job], *, look_ahead: bool) -> tuple[float, Engine]:
    """Returns the seconds that all jobs take, and the engine that has made them."""
    engine = Engine(slots, look_ahead=look_ahead, stop_repetition=True)
    begun = time.perf_counter()
    for job in jobs:
        engine.submit(job)
    while engine.busy:
        for update in engine.step():
            if update.error is not None or update.flags:
                raise RuntimeError(f"a row ended with {update.error or update.flags}")
    return time.perf_counter() - begun, engine


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of both ways and their ratio."""
    config = SIZES[args.size]()
    params = init_params(config, jax.random.key(0), dtype=args.dtype)
    defaults = default_settings(config, slots=args.slots)
    ways: dict[str, dict[str, float]] = {}
    for name, shared in (("read every time", False), ("shared", True)):
        jobs = make_jobs(config, args.requests, seed=args.seed, shared=shared)
        sizes = SlotSizes(
            slots=args.slots,
            capacity=args.capacity,
            chunk_frames=defaults.chunk_frames,
            prefill_rows=defaults.prefill_rows,
            segments=int(shared),
            segment_capacity=args.capacity * shared,
        )
        slots = CountingSlots(config, params, sizes)
        slots.warm_up()
        speak(slots, jobs[:1], look_ahead=defaults.look_ahead)
        slots.prefilled.clear()
        seconds, engine = speak(slots, jobs, look_ahead=defaults.look_ahead)
        made = engine.stats.frames * FRAME_MS / 1000
        ways[name] = {
            "seconds": seconds,
            "audio_s": made,
            "audio_s_per_s": made / seconds,
            "slot_use": engine.stats.slot_use,
            "positions": float(np.mean([len(job.prompt[0]) for job in jobs])),
            "prefills": len(slots.prefilled),
            "prefill_share": slots.prefill_s() / seconds,
        }
        del slots, engine
    every, shared_way = ways.values()
    return {
        "size": args.size,
        "dtype": args.dtype,
        "params": num_params(config),
        "machine": machine(),
        "slots": args.slots,
        "requests": args.requests,
        "ways": ways,
        "times_as_fast": every["seconds"] / shared_way["seconds"],
    }


def card(result: dict[str, Any]) -> str:
    """Returns the result for people."""
    lines = [
        f"csm_jax · {result['size']} {result['dtype']} · {result['params'] / 1e6:,.0f} M random parameters · "
        f"{result['machine']['cpu']} × {result['machine']['cores']} · {result['machine']['device']}",
        f"{result['requests']} utterances in {result['slots']} slots, a voice of {VOICE_S:g} s",
    ]
    for name, way in result["ways"].items():
        lines.append(
            f"  {name:16s} {way['audio_s_per_s']:9.3f} audio-s/s · prompts of {way['positions']:.0f} "
            f"positions · prefill {way['prefill_share']:.0%} of the time · slot use {way['slot_use']:.1%}"
        )
    lines.append(f"a shared voice is {result['times_as_fast']:.2f}× as fast")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints a card and one JSON line, and returns the result."""
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="csm_1b", help="model size")
    parser.add_argument("--dtype", default=default_dtype(jax.default_backend()))
    parser.add_argument("--slots", type=int, default=64 if cpu else 128)
    parser.add_argument("--requests", type=int, default=64 if cpu else 512)
    parser.add_argument(
        "--capacity", type=int, default=320, help="positions of a slot, and of the voice"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    return report("voices", lambda: measure(args), card, argv=argv, path=args.json)


if __name__ == "__main__":
    main()
