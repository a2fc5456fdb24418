"""Training steps of csm_jax beside those of transformers' CSM on torch: same weights, clips and optimiser.

    python benchmarks/train.py                 # a model of 34 million parameters, about ten minutes on 2 cores

Both make full fine-tuning steps (AdamW) in float32 over the same clips of log-normal length. csm_jax packs
them into rows; transformers has a padded batch, as its own training has. Each objective is timed in both:
the decoder on all frames, and on one frame in 16 (in transformers by its label -101). On a CPU both keep the
memory that they free (`csm_jax.host_memory`), as `csm-jax train` does, and neither computes activations again.
Compilation and the first step are not counted; the time is the median of the steps. The last line is the
result as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the reference lives with the tests

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.bench import machine  # noqa: E402
from benchmarks.report import report  # noqa: E402
from csm_jax.config import FRAME_RATE, CSMConfig, csm_1b  # noqa: E402
from csm_jax.data.packing import pack  # noqa: E402
from csm_jax.host_memory import keep_freed_memory  # noqa: E402
from csm_jax.model import num_params  # noqa: E402
from csm_jax.train.loss import LossConfig  # noqa: E402
from csm_jax.train.methods import Full, divide  # noqa: E402
from csm_jax.train.step import StepConfig, init_state, make_step, place  # noqa: E402
from tests.parity import inputs  # noqa: E402
from tests.parity.reference import transformers as reference  # noqa: E402
from tests.support import training  # noqa: E402

OPTIMIZER = training.optimizer(1e-5, 1000)


def medium() -> CSMConfig:
    """Returns a model between tiny and CSM-1B: its codebooks and codes, a fraction of its width."""
    full = csm_1b()
    return dataclasses.replace(
        full,
        text_vocab_size=4096,
        backbone=dataclasses.replace(
            full.backbone, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=64, embed_dim=256,
            intermediate_dim=1024, max_seq_len=2048,
        ),
        decoder=dataclasses.replace(
            full.decoder, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, embed_dim=128,
            intermediate_dim=512,
        ),
    )  # fmt: skip


def clips(config: CSMConfig, count: int, seed: int) -> list[list[training.Turn]]:
    """Returns conversations of one turn: log-normal, 3.5 s in the middle, at most 20 s, text to match."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(rng.lognormal(np.log(3.5), 0.6, count), 0.6, 20.0)
    return [
        [
            training.random_turn(
                config, text=3 + round(3.5 * s), audio=round(s * FRAME_RATE), rng=rng
            )
        ]
        for s in seconds
    ]


def length(talk: list[training.Turn]) -> int:
    """Returns the positions of a conversation."""
    return sum(len(turn.text) + len(turn.codes) + 1 for turn in talk)


def times(step: Callable[[], None], count: int) -> list[float]:
    """Returns the seconds of each step, the first left out."""
    step()
    laps = []
    for _ in range(count):
        begun = time.perf_counter()
        step()
        laps.append(time.perf_counter() - begun)
    return laps


def ours(
    config: CSMConfig, weights: Any, talks: list[Any], args: argparse.Namespace, ratio: int
) -> Callable[[], None]:
    """Returns a step of csm_jax, packed."""
    rows = pack(np.array([length(talk) for talk in talks]), args.max_length)
    batch = training.stack(
        [
            training.join(
                [
                    training.row(config, [talks[i] for i in row], length=args.max_length)
                    for row in rows
                ]
            )
        ]
    )
    params = jax.tree.map(lambda x: jax.numpy.asarray(x.numpy()), inputs.to_params(config, weights))
    trainable, frozen = divide(
        Full(), params, config=config, key=jax.random.key(0), dtype="float32"
    )
    step = make_step(
        StepConfig(
            model=config,
            method=Full(),
            loss=LossConfig(amortization_ratio=ratio, decoder_loss_weight=1.0, remat=args.remat),
            optimizer=OPTIMIZER,
            dtype="float32",
            seed=0,
        )
    )
    state = init_state(trainable, OPTIMIZER)
    batch = place(batch, accumulated=True)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return run


def theirs(config: CSMConfig, weights: Any, talks: list[Any], ratio: int) -> Callable[[], None]:
    """Returns a step of transformers, padded."""
    import torch

    model = reference.build(config, {name: x.clone() for name, x in weights.items()}).train()
    trained = [p for name, p in model.named_parameters() if not name.startswith("codec_model.")]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    longest = max(map(length, talks))
    batch = training.join([training.row(config, [talk], length=longest) for talk in talks])
    frames, mask = torch.from_numpy(batch.frames).long(), torch.from_numpy(batch.mask)
    attended = torch.from_numpy(batch.segments > 0).long()
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        labels = torch.where(torch.from_numpy(batch.trained)[..., None], frames[..., :-1], -100)
        if ratio > 1:
            end = (frames[..., :-1] == 0).all(dim=-1)
            kept = (torch.rand(labels.shape[:2], generator=generator) < 1 / ratio) | end
            labels[..., 1:] = torch.where(kept[..., None], labels[..., 1:], -100)
        text = model.embed_text_tokens(frames[..., -1])
        audio = model.backbone_model.embed_tokens(frames[..., :-1])
        inputs_embeds = torch.where(mask[..., -1:], text, audio)
        model(inputs_embeds=inputs_embeds, attention_mask=attended, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns frames per second of both, for both objectives."""
    keep_freed_memory()
    config = medium()
    weights = inputs.random_weights(config, seed=0)
    talks = clips(config, args.clips, args.seed)
    frames = sum(len(turn.codes) for talk in talks for turn in talk)
    found: dict[str, Any] = {}
    for name, ratio in (("all frames", 1), ("one in 16", 16)):
        laps = {
            "csm_jax": times(ours(config, weights, talks, args, ratio), args.steps),
            "transformers": times(theirs(config, weights, talks, ratio), args.steps),
        }
        rate = {who: frames / statistics.median(each) for who, each in laps.items()}
        found[name] = {
            "frames_per_s": rate,
            "step_s": laps,
            "times_as_fast": rate["csm_jax"] / rate["transformers"],
        }
    return {
        "params": num_params(config),
        "machine": machine(),
        "clips": len(talks),
        "frames": frames,
        "max_length": args.max_length,
        "objectives": found,
    }


def card(result: dict[str, Any]) -> str:
    """Returns the result for people."""
    lines = [
        f"training steps · {result['params'] / 1e6:,.0f} M parameters, float32 · {result['clips']} clips, "
        f"{result['frames']:,} frames a step · {result['machine']['cpu']} × {result['machine']['cores']}"
    ]
    for name, each in result["objectives"].items():
        rate = each["frames_per_s"]
        lines.append(
            f"  decoder on {name:10s}  csm_jax {rate['csm_jax']:8.1f} frames/s · transformers "
            f"{rate['transformers']:8.1f} · {each['times_as_fast']:.2f}×"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints a card and one JSON line, and returns the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=64, help="of one step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps each")
    parser.add_argument("--max-length", type=int, default=512, help="positions of a packed row")
    parser.add_argument("--remat", choices=("none", "minimal", "full"), default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    return report("train", lambda: measure(args), card, argv=argv, path=args.json)


if __name__ == "__main__":
    main()
