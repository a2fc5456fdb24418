"""Makes the model directory inside the package of a trained model: weights in float16, nothing but what is needed.

`python -m recipes.demo_voice.package --model RUN/final` writes `csm_jax/demo_voice`, which `load_csm_1b("demo")`
loads. The model card there is written by hand and stays.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from csm_jax import hub
from recipes.demo_voice.words import VOCABULARY

DTYPE = "float16"
"""Of the stored weights; both networks compute in float32 on a CPU."""
MAX_BYTES = 15_000_000
"""Of the whole directory."""


def package(model: Path, out: Path) -> int:
    """Returns the bytes of the directory that it makes, or makes again.

    Args:
        model: A model directory of `csm-jax train`, with its codec and tokenizer.
        out: The directory; other files in it, such as the model card, stay. Nothing in it changes unless
            all is made.

    Raises:
        FileNotFoundError: A part of the model is missing.
        ValueError: It is larger than `MAX_BYTES`.
        OSError: It cannot be written.
    """
    from csm_jax import weights
    from csm_jax.weights.mimi import load_mimi, save_mimi

    files = hub.locate(model)
    tokenizer, mimi = files.tokenizer(), files.mimi()
    config, params = weights.load_checkpoint(files.checkpoint.parent)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder)
        weights.save_checkpoint(made, config, params, layout="sesame", dtype=DTYPE, overwrite=True)
        save_mimi(made / hub.MIMI, *load_mimi(mimi, dtype=DTYPE), layout="moshi")
        shutil.copyfile(tokenizer, made / hub.TOKENIZER)
        (made / hub.VOCABULARY).write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        after = {path.name: path for each in (out, made) for path in each.iterdir()}
        size = sum(path.stat().st_size for path in after.values())
        if size > MAX_BYTES:
            raise ValueError(f"{out} would have {size:,} bytes, more than {MAX_BYTES:,}")
        for path in sorted(made.iterdir()):
            path.replace(out / path.name)
    return size


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if something is missing or cannot be written."""
    out = hub.local_path(hub.DEMO)
    assert out is not None  # it is never on the hub
    parser = argparse.ArgumentParser(description=__doc__, prog="recipes.demo_voice.package")
    parser.add_argument("--model", type=Path, required=True, help="model directory of the training")
    parser.add_argument("--out", type=Path, default=out, help="(default: inside csm_jax)")
    args = parser.parse_args(argv)
    try:
        size = package(args.model, args.out)
    except (OSError, ValueError) as error:
        print(f"package: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
