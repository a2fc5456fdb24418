"""A voice prompt kept for all who use it, beside the same prompt read again for every request.

    python benchmarks/voices.py                     # CSM-1B's size, random weights, about twenty minutes on 2 cores
    python benchmarks/voices.py --size tiny         # to see that it runs

One voice with a 10-s recording speaks utterances of 4.5 to 5.5 s, their lengths forced by their caps, in the same
engine with the same weights: once with the voice in a shared segment, once with no segments, so that every
request's prompt begins with the recording. Both are measured in full swing: the slots are filled with rows without
a voice that end one after another, and from the first end on, every slot that becomes free takes the next request.
The two engines take their steps in turn, each waited for and timed by itself: a machine that slows down does so for
both. Codes alone; compilation is not counted. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tokenizer lives with the tests

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.bench import SIZES, machine  # noqa: E402
from benchmarks.engine import some_text  # noqa: E402
from benchmarks.report import report  # noqa: E402
from benchmarks.slot_use import CHARACTERS_PER_S  # noqa: E402
from csm_jax.array_typing import Params  # noqa: E402
from csm_jax.config import FRAME_MS, default_dtype  # noqa: E402
from csm_jax.engine import Engine, Job, Stats  # noqa: E402
from csm_jax.generate import Prefix  # noqa: E402
from csm_jax.jobs import JobMaker  # noqa: E402
from csm_jax.model import init_params, num_params  # noqa: E402
from csm_jax.prompt import TextTokenizer  # noqa: E402
from csm_jax.request import Request  # noqa: E402
from csm_jax.slots import Frames, Report, Slots, SlotSizes, VoicePrompt  # noqa: E402
from csm_jax.synthesizer_settings import default_settings  # noqa: E402
from csm_jax.voices import Voice, VoiceTurn  # noqa: E402
from tests.support import tokenizer  # noqa: E402
from tests.support.codec import PlainCodec  # noqa: E402

VOICE_S, SHORTEST_S, LONGEST_S = 10.0, 4.5, 5.5


class TimedSlots(Slots):
    """Slots that wait for what they order, and know how long they have been reading prompts.

    Attributes:
        num_prefilled: Prompts read, a shared voice's among them.
        prefill_s: Seconds it has taken.
    """

    num_prefilled: int = 0
    prefill_s: float = 0.0

    def prefill(self, prompts: Sequence[Frames], segments: Sequence[int]) -> Prefix:
        """See `Slots.prefill`."""
        begun = time.perf_counter()
        prefix = jax.block_until_ready(super().prefill(prompts, segments))
        self.prefill_s += time.perf_counter() - begun
        self.num_prefilled += len(prompts)
        return prefix

    def advance(self, longest: int, ranks: int) -> Report:
        """See `Slots.advance`."""
        return jax.block_until_ready(super().advance(longest, ranks))

    def share(self, voice: VoicePrompt, segment: int) -> bool:
        """See `Slots.share`."""
        begun = time.perf_counter()
        done = super().share(voice, segment)
        jax.block_until_ready(self._shared)
        self.prefill_s += time.perf_counter() - begun
        self.num_prefilled += 1
        return done


def make_jobs(args: argparse.Namespace, *, shared: bool) -> tuple[list[Job], list[Job]]:
    """Returns a job for each slot without a voice, which end one after another; and one voice's jobs.

    The voice is by itself where it is shared, else the beginning of each prompt.
    """
    config = SIZES[args.size]()
    rng = np.random.default_rng(args.seed)
    codes = rng.integers(
        1, config.codebook_size, (round(VOICE_S * 1000 / FRAME_MS), config.num_codebooks)
    )
    turn = VoiceTurn(
        speaker=0, text=some_text(round(VOICE_S * CHARACTERS_PER_S), seed=args.seed), codes=codes
    )
    voice = Voice(name="voice", turns=(turn,), codebook_size=config.codebook_size, provenance={})
    maker = JobMaker(
        config,
        TextTokenizer(tokenizer.build_tokenizer(vocab_size=config.text_vocab_size)),
        # Has nothing to do: the voice is given as codes.
        PlainCodec(num_codebooks=config.num_codebooks, codebook_size=config.codebook_size),
    )

    def job(frames: int, voice: Voice | None, seed: int) -> Job:
        request = Request(
            text=some_text(round(frames * FRAME_MS / 1000 * CHARACTERS_PER_S), seed=seed),
            speaker=0,
            voice=voice,
            seed=seed,
            max_audio_length_ms=FRAME_MS * (frames + 0.5),
        )
        capacity = config.backbone.max_seq_len if shared else 0
        return maker.job(request, segment_capacity=capacity)

    shortest, longest = (round(s * 1000 / FRAME_MS) for s in (SHORTEST_S, LONGEST_S))
    ends = np.linspace(1, (shortest + longest) / 2, args.slots)
    # No more than all slots, one after another, can take in so many steps.
    count = args.slots * (1 + args.steps // shortest)
    lengths = rng.integers(shortest, longest + 1, count)
    return (
        [job(round(float(n)), None, i) for i, n in enumerate(ends)],
        [job(int(n), voice, args.slots + i) for i, n in enumerate(lengths)],
    )


class Way:
    """One of the two ways, in full swing.

    Attributes:
        slots: Where the voice speaks.
        engine: That makes it speak.
        seconds: That its steps have taken.
        positions: Of a prompt, in the mean.
    """

    def __init__(self, args: argparse.Namespace, params: Params, *, shared: bool) -> None:
        config = SIZES[args.size]()
        defaults = default_settings(config, slots=args.slots)
        self.slots = TimedSlots(
            config,
            params,
            SlotSizes(
                slots=args.slots,
                capacity=args.capacity,
                chunk_frames=1,
                prefill_rows=defaults.prefill_rows,
                segments=int(shared),
                segment_capacity=args.capacity * shared,
            ),
        )
        self.slots.warm_up()
        self.engine = Engine(self.slots, look_ahead=defaults.look_ahead, stop_repetition=True)
        first, jobs = make_jobs(args, shared=shared)
        self.positions = float(np.mean([len(job.prompt[0]) for job in jobs]))
        for job in first:
            self.engine.submit(job)
        self.engine.step()
        for job in jobs:
            self.engine.submit(job)
        self.slots.num_prefilled, self.slots.prefill_s = 0, 0.0
        self.engine.stats = Stats()
        self.seconds = 0.0

    def step(self) -> None:
        """Takes a step.

        Raises:
            RuntimeError: A row failed, or was flagged.
        """
        begun = time.perf_counter()
        updates = self.engine.step()
        self.seconds += time.perf_counter() - begun
        for update in updates:
            if update.error is not None or update.flags:
                raise RuntimeError(f"a row ended with {update.error or update.flags}")

    def figures(self) -> dict[str, float]:
        """Returns what it has done, and how fast."""
        made = self.engine.stats.frames * FRAME_MS / 1000
        return {
            "seconds": self.seconds,
            "audio_s": made,
            "audio_s_per_s": made / self.seconds,
            "slot_use": self.engine.stats.slot_use,
            "positions": self.positions,
            "prefills": self.slots.num_prefilled,
            "prefill_share": self.slots.prefill_s / self.seconds,
        }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of both ways and their ratio."""
    config = SIZES[args.size]()
    params = init_params(config, jax.random.key(0), dtype=args.dtype)
    every, shared = (Way(args, params, shared=shared) for shared in (False, True))
    for i in range(args.steps):
        for way in (every, shared) if i % 2 else (shared, every):
            way.step()
    return {
        "size": args.size,
        "dtype": args.dtype,
        "params": num_params(config),
        "machine": machine(),
        "slots": args.slots,
        "steps": args.steps,
        "ways": {"read every time": every.figures(), "shared": shared.figures()},
        "times_as_fast": every.seconds / shared.seconds,
    }


def card(result: dict[str, Any]) -> str:
    """Returns the result for people."""
    lines = [
        f"csm_jax · {result['size']} {result['dtype']} · {result['params'] / 1e6:,.0f} M random parameters · "
        f"{result['machine']['cpu']} × {result['machine']['cores']} · {result['machine']['device']}",
        f"{result['steps']} frames of {result['slots']} slots in full swing, a voice of {VOICE_S:g} s",
    ]
    for name, way in result["ways"].items():
        lines.append(
            f"  {name:16s} {way['audio_s_per_s']:9.3f} audio-s/s · prompts of {way['positions']:.0f} "
            f"positions · {way['prefills']} prefills, {way['prefill_share']:.0%} of the time"
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
    parser.add_argument("--steps", type=int, default=48 if cpu else 256, help="frames of each slot")
    parser.add_argument(
        "--capacity", type=int, default=320, help="positions of a slot, and of the voice"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    return report("voices", lambda: measure(args), card, argv=argv, path=args.json)


if __name__ == "__main__":
    main()
