"""Speech by the hour on this machine: engine, codec, watermark and FLAC files, beside static batches.

    python benchmarks/engine.py                      # CSM-1B's size, random weights, about ten minutes on 2 cores
    python benchmarks/engine.py --size tiny          # to see that it runs
    python benchmarks/engine.py --reference none     # ours alone, without torch; on an accelerator always

Random weights do not end an utterance, so every request's length is forced by its own cap: log-normal
(`benchmarks/slot_use.py`), clipped. All contenders speak the same requests with the same weights, in one
process:

- the engine, end to end and codes alone; the stages behind it, each alone, on the same codes;
- static batches of as many rows as the engine has slots: the same engine, given the next batch when the
  last one has ended;
- transformers' `generate`, static batches likewise, each run to its longest row: codes only and greedy,
  which favours it, for ours sample and end in files.

Both static contenders take turns, batch by batch, and may be given fewer batches than there are
(`--static-batches`): a rate does not need them all. A rate counts the requests' audio, nothing beyond their
ends. Compilation is not counted. The last line printed is the whole result as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the random weights live with the tests

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.bench import SIZES, WINDOW, machine, read_bandwidth, timed  # noqa: E402
from benchmarks.report import report  # noqa: E402
from benchmarks.slot_use import CHARACTERS_PER_S, lognormal_seconds  # noqa: E402
from csm_jax.array_typing import Params  # noqa: E402
from csm_jax.audio import write_audio  # noqa: E402
from csm_jax.config import FRAME_MS, SAMPLE_RATE, CSMConfig, default_dtype  # noqa: E402
from csm_jax.jobs import JobMaker  # noqa: E402
from csm_jax.mimi.codec import JaxMimi  # noqa: E402
from csm_jax.mimi.config import mimi, tiny_mimi  # noqa: E402
from csm_jax.mimi.params import init_params as init_mimi  # noqa: E402
from csm_jax.model import frame_cost, init_params, num_params  # noqa: E402
from csm_jax.prompt import TextTokenizer  # noqa: E402
from csm_jax.request import Request  # noqa: E402
from csm_jax.stages import DecodeStage  # noqa: E402
from csm_jax.synthesizer import Result, Synthesizer  # noqa: E402
from csm_jax.synthesizer_settings import SynthesizerSettings, default_settings  # noqa: E402
from csm_jax.watermark import JaxWatermarker  # noqa: E402
from csm_jax.watermark_key import DEFAULT_KEY  # noqa: E402
from tests.support import model_directory, tokenizer  # noqa: E402

_WORDS = ("the", "speech", "of", "what", "we", "hear", "and", "say", "over", "all", "in", "time")


# --- what is spoken -------------------------------------------------------------------------------


def some_text(characters: int, *, seed: int) -> str:
    """Returns words of about so many characters."""
    rng = np.random.default_rng(seed)
    text = ""
    while len(text) < characters:
        text += str(rng.choice(_WORDS)) + " "
    return text.strip() + "."


def make_requests(count: int, *, median: float, longest: float, seed: int) -> list[Request]:
    """Returns requests of forced lengths."""
    seconds = lognormal_seconds(np.random.default_rng(seed), count, median=median, longest=longest)
    return [
        Request(
            text=some_text(round(CHARACTERS_PER_S * length), seed=i),
            speaker=0,
            seed=i,
            # In the middle of the last frame, where rounding does not reach.
            max_audio_length_ms=FRAME_MS * max(1, round(1000 * length / FRAME_MS)) + FRAME_MS / 2,
        )
        for i, length in enumerate(seconds)
    ]


def audio_s(requests: Iterable[Request]) -> float:
    """Returns the seconds of audio that are asked for."""
    return sum(request.max_frames for request in requests) * FRAME_MS / 1000


# --- the parts ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """What speaks. All weights are random; codec and watermark have the published sizes but for tiny."""

    config: CSMConfig
    params: Params
    torch_weights: dict[str, Any] | None
    codec: JaxMimi
    watermarker: JaxWatermarker

    @property
    def jobs(self) -> JobMaker:
        """Makes prompts with a small tokenizer, of about a token per three characters."""
        return JobMaker(
            self.config,
            TextTokenizer(tokenizer.build_tokenizer(vocab_size=self.config.text_vocab_size)),
            self.codec,
        )

    def synthesizer(self, settings: SynthesizerSettings) -> Synthesizer:
        """Returns a warm synthesizer."""
        made = Synthesizer(
            jobs=self.jobs,
            params=self.params,
            codec=self.codec,
            watermarker=self.watermarker,
            settings=settings,
        )
        made.warm_up()
        return made


def build(size: str, dtype: str, *, with_torch: bool, scratch: Path) -> Parts:
    """Returns random parts.

    Args:
        size: Of `SIZES`.
        dtype: Of the model's weights.
        with_torch: Make the weights in torch, for a reference to share.
        scratch: An empty directory.
    """
    config = SIZES[size]()
    weights = None
    if with_torch:
        import torch

        from tests.parity import inputs

        weights = inputs.random_weights(config, seed=0, dtype=getattr(torch, dtype))
        params = jax.tree.map(
            lambda tensor: jax.device_put(jnp.from_dlpack(tensor.contiguous()), jax.devices()[0]),
            inputs.to_params(config, weights),
        )
    else:
        params = init_params(config, jax.random.key(0), dtype=dtype)
    sizes = mimi() if size != "tiny" else tiny_mimi()
    sizes = dataclasses.replace(sizes, codebook_size=config.codebook_size)
    model_directory._write_watermark(scratch / "watermark", seed=0)
    return Parts(
        config=config,
        params=params,
        torch_weights=weights,
        codec=JaxMimi(sizes, init_mimi(sizes, jax.random.key(1))),
        watermarker=JaxWatermarker.from_dir(scratch / "watermark"),
    )


# --- the runs -------------------------------------------------------------------------------------


def to_files(
    synthesizer: Synthesizer, requests: Sequence[Request], directory: Path
) -> list[Result]:
    """Returns the results of all requests once their files are on the disk."""
    results = []
    with ThreadPoolExecutor(1) as writer:
        written = []
        for result in synthesizer.run(enumerate(requests)):
            if result.error is not None or result.audio is None:
                raise RuntimeError(f"request {result.id}: {result.error}")
            path = directory / f"{result.id}.flac"
            written.append(writer.submit(write_audio, path, result.audio, SAMPLE_RATE))
            results.append(result)
        for each in written:
            each.result()
    return results


def codes_alone(synthesizer: Synthesizer, requests: Sequence[Request]) -> None:
    """Makes the requests' codes and no audio."""
    for request in requests:
        synthesizer.submit(request, decode=False)
    while synthesizer.busy:
        synthesizer.pump()


def decode_all(parts: Parts, settings: SynthesizerSettings, codes: Sequence[np.ndarray]) -> None:
    """Decodes all codes as the synthesizer does."""
    stage = DecodeStage[int](parts.codec.open_rows(settings.codec_rows, settings.codec_frames))
    for i, each in enumerate(codes):
        stage.push(i, each, last=True)
    while stage.busy:
        stage.run(flush=True)


def stages(
    parts: Parts, settings: SynthesizerSettings, results: Sequence[Result], directory: Path
) -> dict[str, float]:
    """Returns the seconds that each stage behind the model takes alone for all results."""
    codes = [result.codes for result in results]
    audio = [result.audio for result in results if result.audio is not None]
    rows = settings.codec_rows

    def mark() -> None:
        for start in range(0, len(audio), rows):
            parts.watermarker.embed_batch(audio[start : start + rows], SAMPLE_RATE, DEFAULT_KEY)

    def write() -> None:
        for i, each in enumerate(audio):
            write_audio(directory / f"again-{i}.flac", each, SAMPLE_RATE)

    return {
        "codec": timed(lambda: decode_all(parts, settings, codes)),
        "watermark": timed(mark),
        "FLAC files": timed(write),
    }


def transformers_batch(
    parts: Parts, jobs: JobMaker, dtype: str
) -> Callable[[Sequence[Request]], None]:
    """Returns a function that speaks a batch with transformers' `generate`, to its longest row."""
    import torch

    from tests.parity.inputs import Prompt
    from tests.parity.reference.transformers import TransformersReference

    weights = {
        name: tensor.to(getattr(torch, dtype))
        for name, tensor in (parts.torch_weights or {}).items()
    }
    reference = TransformersReference(parts.config, weights)

    def run(batch: Sequence[Request]) -> None:
        prompts = [Prompt(*jobs.job(request, segment_capacity=0).prompt) for request in batch]
        most = max(request.max_frames for request in batch)
        codes = reference.generate_text(prompts, most)
        # Random weights do not end by themselves; if they did, the time would be of less work.
        if codes.shape[1] < most:
            raise RuntimeError(f"the reference ended after {codes.shape[1]} of {most} frames")

    return run


def static_turns(
    contenders: dict[str, Callable[[Sequence[Request]], None]],
    batches: Sequence[Sequence[Request]],
) -> dict[str, float]:
    """Returns each contender's seconds of audio per second, batch by batch in turns."""
    spent = dict.fromkeys(contenders, 0.0)
    for batch in batches:
        for name, run in contenders.items():
            spent[name] += timed(lambda run=run, batch=batch: run(batch))
    made = sum(audio_s(batch) for batch in batches)
    return {name: made / seconds for name, seconds in spent.items()}


# --- the roofline ---------------------------------------------------------------------------------


def matrix_peak(dtype: str, size: int) -> float:
    """Returns operations per second of a large square product."""
    a, b = (jnp.ones((size, size), dtype) for _ in range(2))
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    jax.block_until_ready(product(a, b))
    best = min(timed(lambda: jax.block_until_ready(product(a, b))) for _ in range(10))
    return 2 * size**3 / best


def roofline(config: CSMConfig, dtype: str, *, slots: int) -> dict[str, float | str]:
    """Returns the most audio per second that this device could make of full slots, and why not more.

    Every step is taken to read the smallest window; longer rows read more.
    """
    cpu = jax.default_backend() == "cpu"
    small = num_params(config) < 10**8
    bandwidth = read_bandwidth(0.25 if small else 1.0 if cpu else 8.0)
    peak = matrix_peak(dtype if not cpu else "float32", 1024 if small else 2048 if cpu else 8192)
    cost = frame_cost(config, itemsize=jnp.dtype(dtype).itemsize, window=WINDOW)
    reading = (cost.weight_bytes + slots * cost.cache_bytes) / bandwidth
    computing = slots * cost.flops / peak
    return {
        "bandwidth": bandwidth,
        "peak_flops": peak,
        "bound": "reading" if reading > computing else "arithmetic",
        "audio_s_per_s": slots * FRAME_MS / 1000 / max(reading, computing),
    }


# --- all of it ------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Returns all figures."""
    parts = build(args.size, args.dtype, with_torch=args.reference != "none", scratch=scratch)
    requests = make_requests(
        args.requests, median=args.median_seconds, longest=args.longest_seconds, seed=args.seed
    )
    total = audio_s(requests)
    settings = default_settings(
        parts.config, slots=args.slots, capacity=args.capacity, voice_bytes=0
    )
    synthesizer = parts.synthesizer(settings)
    compiled = synthesizer.compilations
    begun, stats = time.perf_counter(), dataclasses.replace(synthesizer.stats)
    results = to_files(synthesizer, requests, scratch)
    end_to_end = time.perf_counter() - begun
    now = synthesizer.stats
    use = (now.frames - stats.frames) / (now.slot_frames - stats.slot_frames)
    made = sum(len(result.codes) for result in results) * FRAME_MS / 1000
    if abs(made - total) > FRAME_MS / 2000:
        raise RuntimeError(f"{total:.2f} s were asked for, and {made:.2f} s made")

    rates = {"end to end": total / end_to_end}
    rates["codes"] = total / timed(lambda: codes_alone(synthesizer, requests))
    for name, seconds in stages(parts, settings, results, scratch).items():
        rates[name] = total / seconds
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    batches = [requests[i : i + args.slots] for i in range(0, len(requests), args.slots)]
    contenders: dict[str, Callable[[Sequence[Request]], None]] = {
        "static batches, codes": lambda batch: codes_alone(synthesizer, batch)
    }
    if args.reference != "none":
        name, _, dtype = args.reference.partition("-")
        run = transformers_batch(parts, parts.jobs, dtype)
        run([dataclasses.replace(r, max_audio_length_ms=2.5 * FRAME_MS) for r in batches[0]])
        contenders[f"{name} {dtype}, static batches, codes"] = run
    static = static_turns(contenders, batches[: args.static_batches])
    limit = roofline(parts.config, args.dtype, slots=args.slots)
    return {
        "size": args.size,
        "dtype": args.dtype,
        "params": num_params(parts.config),
        "machine": machine(),
        "slots": args.slots,
        "requests": args.requests,
        "audio_s": total,
        "audio_s_each": total / args.requests,
        "static_batches": min(args.static_batches, len(batches)),
        "slot_use": use,
        "recompilations": synthesizer.compilations - compiled,
        "rates": rates,
        "static_rates": static,
        "end_to_end_over": {name: rates["end to end"] / rate for name, rate in static.items()},
        "codes_over": {name: rates["codes"] / rate for name, rate in static.items()},
        "roofline": limit,
        "share_of_roofline": rates["codes"] / float(limit["audio_s_per_s"]),
        "peak_rss_gib_ours": rss,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def card(result: dict[str, Any]) -> str:
    """Returns the result for people."""
    limit = result["roofline"]
    lines = [
        f"csm_jax · {result['size']} {result['dtype']} · {result['params'] / 1e6:,.0f} M random parameters · "
        f"{result['machine']['cpu']} × {result['machine']['cores']} · {result['machine']['device']}",
        f"{result['requests']} requests of {result['audio_s_each']:.1f} s on average, "
        f"{result['slots']} slots · slot use {result['slot_use']:.1%} to the last row's end · "
        f"peak memory {result['peak_rss_gib_ours']:.1f} GiB, with the reference "
        f"{result['peak_rss_gib']:.1f} GiB",
        "",
    ]
    for name, rate in result["rates"].items():
        lines.append(f"  {name:44s} {rate:10.3f} audio-s/s")
    lines[-len(result["rates"]) + 1] += (
        f"  {result['share_of_roofline']:.0%} of what {limit['bound']} allows with full slots "
        f"({limit['audio_s_per_s']:.2f})"
    )
    for name, rate in result["static_rates"].items():
        lines.append(
            f"  {name:44s} {rate:10.3f} audio-s/s  the engine is {result['codes_over'][name]:.2f}× as fast, "
            f"with audio and files {result['end_to_end_over'][name]:.2f}×"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="csm_1b", help="model size")
    parser.add_argument("--dtype", default=None, help="by default what this device runs in")
    parser.add_argument("--slots", type=int, default=8 if cpu else 128)
    parser.add_argument("--requests", type=int, default=32 if cpu else 1024)
    parser.add_argument("--median-seconds", type=float, default=2.0 if cpu else 4.9)
    parser.add_argument("--longest-seconds", type=float, default=8.0 if cpu else 25.0)
    parser.add_argument("--capacity", type=int, default=256 if cpu else 512, help="of a slot")
    parser.add_argument(
        "--static-batches", type=int, default=2, help="run by each static contender"
    )
    parser.add_argument(
        "--reference",
        choices=["transformers-float32", "transformers-bfloat16", "none"],
        default="transformers-float32" if cpu else "none",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or default_dtype(jax.default_backend())
    if not cpu and args.reference != "none":
        parser.error("the reference runs on the CPU here: give --reference none")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints a card and one JSON line, and returns the result."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        return report(
            "engine", lambda: measure(args, Path(scratch)), card, argv=argv, path=args.json
        )


if __name__ == "__main__":
    main()
