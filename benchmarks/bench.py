"""Speed on this machine: prefill, frames, a batch sweep, start-up, and the PyTorch references beside them.

    python benchmarks/bench.py                      # CSM-1B's size, random weights, this machine's dtype
    python benchmarks/bench.py --size tiny          # seconds, to see that it runs
    python benchmarks/bench.py --batch 1 8 --json benchmarks/results/NAME.json

Everything is measured in one process on the same weights. Contenders take turns, round by round, and a
ratio is the median of the rounds' ratios, so that a machine whose speed drifts does not favour either.
Compilation and the first frame of every contender are not counted. A frame of the references is the time
between two calls of their backbone. The last line printed is the whole result as JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the references live with the parity tests

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.report import report  # noqa: E402
from csm_jax import generate  # noqa: E402
from csm_jax.array_typing import Params  # noqa: E402
from csm_jax.config import FRAME_MS, CSMConfig, csm_1b, default_dtype, tiny  # noqa: E402
from csm_jax.generate import DecodeState, RowSettings  # noqa: E402
from csm_jax.model import frame_cost, num_params, param_shapes  # noqa: E402
from csm_jax.sampling import SamplingParams, request_keys, sampling_params  # noqa: E402

SIZES = {"csm_1b": csm_1b, "tiny": tiny}
WINDOW = 256


class Clock:
    """Seconds between two ticks."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, *_: Any) -> None:
        self.ticks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Returns the laps, the first (with the prompt) left out."""
        return list(np.diff(self.ticks))[1:]


# --- ours ---------------------------------------------------------------------------------------


def sesames(rows: int) -> SamplingParams:
    """Returns Sesame's default settings: sampling, which costs more than greedy."""
    return sampling_params(
        temperature=[0.9] * rows, top_k=[50] * rows, top_p=[1.0] * rows, min_p=[0.0] * rows
    )


def settings(rows: int) -> RowSettings:
    """Returns what every row asks for."""
    return RowSettings(
        key=request_keys(range(rows)),
        max_frames=jnp.full((rows,), 10_000, jnp.int32),
        segment=jnp.full((rows,), -1, jnp.int32),
        sampling=sesames(rows),
        decoder_sampling=sesames(rows),
    )


def text_prompt(config: CSMConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a prompt of text ids."""
    frames = np.zeros((length, config.num_codebooks + 1), np.int32)
    frames[:, -1] = np.arange(length) % config.text_vocab_size
    mask = np.zeros(frames.shape, bool)
    mask[:, -1] = True
    return frames, mask


class Ours:
    """csm_jax at one batch size."""

    def __init__(self, config: CSMConfig, params: Params, *, rows: int, prompt: int) -> None:
        self.config, self.params, self.rows = config, params, rows
        dtype = params["backbone"]["final_norm"].dtype
        frames, mask = generate.pad_prompts([text_prompt(config, prompt)] * rows, config=config)

        def prefill() -> generate.Prefix:
            prefix = generate.prefill(params, frames, mask, config=config)
            return jax.block_until_ready(prefix)

        self.first_prefill_s = timed(prefill)
        self.prefill_s = statistics.median(timed(prefill) for _ in range(3))
        state = generate.init_state(config, batch=rows, capacity=WINDOW, dtype=dtype)
        self.state: DecodeState = generate.insert(
            state, prefill(), settings(rows), jnp.arange(rows)
        )
        self.first_frame_s = timed(self.frame)

    def frame(self) -> None:
        """Makes one frame of every row."""
        self.state, codes, _ = generate.generate_frames(
            self.params, self.state, config=self.config, num_frames=1, window=WINDOW, ranks=64
        )
        jax.block_until_ready(codes)

    def laps(self, frames: int) -> list[float]:
        """Returns the seconds of each of `frames` frames."""
        return [timed(self.frame) for _ in range(frames)]


def timed(function: Callable[[], Any]) -> float:
    """Returns the seconds a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# --- the references ---------------------------------------------------------------------------


def torch_reference(
    name: str, config: CSMConfig, weights: dict[str, Any], *, rows: int, prompt: int
) -> Callable[[int], list[float]]:
    """Returns a function that makes frames with a PyTorch implementation and gives their seconds."""
    from tests.parity import inputs

    text = inputs.random_text(config, prompt, seed=0)
    if name == "sesame":
        from tests.parity.reference.sesame import SesameReference

        sesame = SesameReference(config, weights)

        def sesame_laps(frames: int) -> list[float]:
            clock = Clock()
            hook = sesame.model.backbone.register_forward_pre_hook(clock)
            # One frame more than counted: its lap ends when the next one would begin.
            sesame.generate_one(text, frames + 2, sesame.greedy())
            hook.remove()
            return clock.laps()

        return sesame_laps
    from tests.parity.reference.transformers import TransformersReference

    theirs = TransformersReference(config, weights)

    def laps(frames: int) -> list[float]:
        clock = Clock()
        hook = theirs.model.backbone_model.register_forward_pre_hook(clock)
        theirs.generate_text([text] * rows, frames + 2)
        hook.remove()
        return clock.laps()

    return laps


# --- the machine ------------------------------------------------------------------------------


def read_bandwidth(gib: float) -> float:
    """Returns bytes per second read by the best of ten matrix-vector products and ten sums."""
    matrix = jnp.ones((int(gib * 2**30) // (4 * 4096), 4096), jnp.float32)
    vector = jnp.ones((4096,), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)
    total = jax.jit(lambda m, v: m.sum() + v[0])
    best = float("inf")
    for function in (product, total):
        jax.block_until_ready(function(matrix, vector))
        for _ in range(10):
            best = min(best, timed(lambda f=function: jax.block_until_ready(f(matrix, vector))))
    return matrix.nbytes / best


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


# --- start-up ---------------------------------------------------------------------------------


def compile_all(config: CSMConfig, dtype: str, *, rows: int, prompt: int) -> float:
    """Returns the seconds to compile what one utterance needs, from shapes alone."""
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), param_shapes(config))
    size = generate.bucket(prompt, generate.PREFILL_BUCKETS, limit=config.backbone.max_seq_len)
    columns = (rows, size, config.num_codebooks + 1)
    frames = jax.ShapeDtypeStruct(columns, jnp.int32)
    mask = jax.ShapeDtypeStruct(columns, jnp.bool_)
    state = jax.eval_shape(
        lambda: generate.init_state(config, batch=rows, capacity=WINDOW, dtype=jnp.dtype(dtype))
    )
    prefix = jax.eval_shape(
        lambda p, f, m: generate.prefill(p, f, m, config=config), params, frames, mask
    )
    slot = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def run() -> None:
        generate.prefill.lower(params, frames, mask, config=config).compile()
        generate.insert.lower(state, prefix, jax.eval_shape(lambda: settings(rows)), slot).compile()
        generate.generate_frames.lower(
            params, state, config=config, num_frames=1, window=WINDOW, ranks=64
        ).compile()

    return timed(run)


def startup(size: str, dtype: str, *, prompt: int) -> dict[str, float]:
    """Returns the compile seconds of a first and of a second process sharing one cache directory."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, __file__, "--size", size, "--dtype", dtype]
        command += ["--prompt", str(prompt), "--only-compile"]
        first, second = (
            float(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
            for _ in range(2)
        )
    return {"first_s": first, "second_s": second, "ratio": first / second}


# --- the run ----------------------------------------------------------------------------------


def summary(laps: list[float], *, rows: int) -> dict[str, float]:
    """Returns a contender's figures."""
    median = statistics.median(laps)
    return {
        "s_per_frame": median,
        "p95_s": float(np.percentile(laps, 95)),
        "frames": len(laps),
        "audio_s_per_s": rows * FRAME_MS / 1000 / median,
    }


def compare(args: argparse.Namespace, rows: int, weights: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of every contender at one batch size, and the ratios to ours."""
    from tests.parity import inputs

    config = SIZES[args.size]()
    params = jax.tree.map(
        lambda tensor: jax.device_put(jnp.from_dlpack(tensor.contiguous()), jax.devices()[0]),
        inputs.to_params(config, weights[args.dtype]),
    )
    ours = Ours(config, params, rows=rows, prompt=args.prompt)
    contenders: dict[str, Callable[[int], list[float]]] = {f"csm_jax {args.dtype}": ours.laps}
    for name in args.reference:
        kind, _, dtype = name.partition("-")
        if kind == "sesame" and rows > 1:
            continue  # Sesame's loop is for one row
        contenders[f"{kind} {dtype}"] = torch_reference(
            kind, config, weights[dtype], rows=rows, prompt=args.prompt
        )
    for laps in contenders.values():
        laps(1)
    rounds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, laps in contenders.items():
            rounds[name].append(laps(args.frames))
    mine = rounds[f"csm_jax {args.dtype}"]
    cost = frame_cost(config, itemsize=np.dtype(jnp.dtype(args.dtype)).itemsize, window=WINDOW)
    result: dict[str, Any] = {
        "rows": rows,
        "prefill_s": ours.prefill_s,
        "prefill_positions": args.prompt,
        "first_prefill_s": ours.first_prefill_s,
        "first_frame_s": ours.first_frame_s,
        "bytes_per_frame": cost.weight_bytes + rows * cost.cache_bytes,
        "contenders": {
            name: summary([lap for laps in done for lap in laps], rows=rows)
            for name, done in rounds.items()
        },
        "times_as_fast": {
            name: statistics.median(
                statistics.median(theirs) / statistics.median(own)
                for theirs, own in zip(done, mine, strict=True)
            )
            for name, done in rounds.items()
            if done is not mine
        },
    }
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of this machine, of starting up and of every batch size."""
    import torch

    from tests.parity import inputs

    config = SIZES[args.size]()
    result: dict[str, Any] = {
        "size": args.size,
        "params": num_params(config),
        "machine": machine(),
        "startup": startup(args.size, args.dtype, prompt=args.prompt),
        "read_bandwidth": read_bandwidth(1.0 if args.size == "csm_1b" else 0.25),
    }
    wanted = {args.dtype} | {name.partition("-")[2] for name in args.reference}
    made = inputs.random_weights(config, seed=0, dtype=torch.float32)
    weights = {
        dtype: made
        if dtype == "float32"
        else {name: x.to(getattr(torch, dtype)) for name, x in made.items()}
        for dtype in wanted
    }
    result["batches"] = [compare(args, rows, weights) for rows in args.batch]
    return result


def card(result: dict[str, Any]) -> str:
    """Returns the result for people."""
    bandwidth = result["read_bandwidth"]
    lines = [
        f"csm_jax · {result['size']} · {result['params'] / 1e6:,.0f} M random parameters · "
        f"{result['machine']['cpu']} × {result['machine']['cores']} · {result['machine']['device']}",
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s · compile {result['startup']['first_s']:.1f} s, "
        f"second start {result['startup']['second_s']:.1f} s "
        f"({result['startup']['ratio']:.1f}× faster)",
    ]
    for batch in result["batches"]:
        lines.append(
            f"\nbatch {batch['rows']} · prefill of {batch['prefill_positions']} positions "
            f"{batch['prefill_s']:.3f} s"
        )
        for name, figures in batch["contenders"].items():
            line = (
                f"  {name:24s} {figures['s_per_frame']:8.4f} s/frame  p95 {figures['p95_s']:8.4f}  "
                f"{figures['audio_s_per_s']:7.3f} audio-s/s"
            )
            if name in batch["times_as_fast"]:
                line += f"  csm_jax is {batch['times_as_fast'][name]:.2f}× as fast"
            else:
                share = batch["bytes_per_frame"] / figures["s_per_frame"] / bandwidth
                line += f"  {share:.0%} of the read bandwidth"
            lines.append(line)
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="csm_1b", help="model size")
    parser.add_argument("--dtype", default=None, help="ours; by default what this device runs in")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=32, help="text positions of the prompt")
    parser.add_argument("--frames", type=int, default=3, help="frames counted per round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument(
        "--reference",
        nargs="*",
        default=["sesame-float32", "transformers-float32", "transformers-bfloat16"],
        help="IMPLEMENTATION-DTYPE to run beside ours (sesame or transformers); none for ours alone",
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--only-compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or default_dtype(jax.default_backend())
    if jax.default_backend() != "cpu" and args.reference:
        parser.error("the references run on the CPU here: give --reference with no names")
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints a card and one JSON line."""
    args = parse(argv)
    if args.only_compile:
        print(compile_all(SIZES[args.size](), args.dtype, rows=1, prompt=args.prompt))
        return
    report("bench", lambda: measure(args), card, argv=argv, path=args.json)


if __name__ == "__main__":
    main()
