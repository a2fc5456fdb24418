"""The model that training begins with: the demo voice's sizes, random weights, its tokenizer and codec.

`python -m recipes.demo_voice.base --codec CODEC --out DIR` writes a model directory that
`csm-jax data tokenize` and `csm-jax train --scratch` read.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csm_jax.config import CSMConfig, LlamaConfig, csm_1b
from recipes.demo_voice import tokenizer

CODEC = Path("build/demo_voice/codec/codec.safetensors")
OUT = Path("build/demo_voice/base")

NUM_CODEBOOKS = 8
CODEBOOK_SIZE = 512
MAX_POSITIONS = 512
"""Of a conversation: 25 s of speech and its text."""


def config() -> CSMConfig:
    """Returns the demo voice's sizes: 4 million parameters, CSM in everything but size."""
    return CSMConfig(
        backbone=_llama(layers=5, dim=192, mlp=576, positions=MAX_POSITIONS),
        decoder=_llama(layers=2, dim=128, mlp=384, positions=NUM_CODEBOOKS),
        text_vocab_size=len(tokenizer.CHARACTERS) + 2,
        audio_vocab_size=CODEBOOK_SIZE + csm_1b().audio_vocab_size - csm_1b().codebook_size,
        codebook_size=CODEBOOK_SIZE,
        num_codebooks=NUM_CODEBOOKS,
        tie_codebooks_embeddings=True,
    )


def _llama(*, layers: int, dim: int, mlp: int, positions: int) -> LlamaConfig:
    return dataclasses.replace(
        csm_1b().backbone,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=dim // 4,
        embed_dim=dim,
        intermediate_dim=mlp,
        max_seq_len=positions,
        rope_base=10_000.0,  # CSM-1B's own is for 2,048 positions and more
    )


def build(codec: Path, out: Path, *, seed: int) -> CSMConfig:
    """Returns the sizes of the model directory that it writes.

    Args:
        codec: Mimi's weights, of `recipes.demo_voice.codec`.
        out: The directory; an earlier one is replaced.
        seed: Of the weights.

    Raises:
        FileNotFoundError: There is no codec.
        OSError: It cannot be written.
    """
    import jax

    from csm_jax import hub, weights
    from csm_jax.model import init_params

    if not codec.is_file():
        raise FileNotFoundError(f"no codec at {codec}: train it first (recipes.demo_voice.codec)")
    sizes = config()
    params: dict[str, Any] = init_params(sizes, jax.random.key(seed), dtype="float32")
    weights.save_checkpoint(out, sizes, params, layout="transformers", overwrite=True)
    tokenizer.write_tokenizer(out / hub.TOKENIZER)
    shutil.copyfile(codec, out / hub.MIMI)
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if something is missing or cannot be written."""
    from csm_jax.model import num_params

    parser = argparse.ArgumentParser(description=__doc__, prog="recipes.demo_voice.base")
    parser.add_argument("--codec", type=Path, default=CODEC, help=f"(default: {CODEC})")
    parser.add_argument("--out", type=Path, default=OUT, help=f"directory (default: {OUT})")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args(argv)
    try:
        sizes = build(args.codec, args.out, seed=args.seed)
    except OSError as error:
        print(f"base: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {num_params(sizes):,} random parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
