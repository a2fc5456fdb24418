"""The demo voice's text tokenizer: one token per character, in the form that CSM's prompt expects.

Other marks than the model has learnt become those it knows, or nothing: any text can be asked for.
`python -m recipes.demo_voice.tokenizer --out tokenizer.json` writes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from csm_jax.prompt import BOS, EOS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OUT = Path("build/demo_voice/tokenizer.json")
CHARACTERS = " ',.?[]0123456789abcdefghijklmnopqrstuvwxyz"
"""One token each, in this order after the begin and end tokens. Digits and brackets: `[0]` is a speaker."""

# (pattern, what takes its place), one after the other on text without accents and in lower case.
_REPLACEMENTS = (
    (r"[’‘`´]", "'"),
    (r"[.!?]*\?[.!?]*", "?"),
    (r"[.!]+", "."),
    (r"\s+[-–]+\s+|[;:—]", ", "),
    (r"[-–/_\s]+", " "),
    (r"[^ ',.?\[\]0-9a-z]", ""),
    *((rf" +\{mark}", mark) for mark in ",.?"),
    (r" {2,}", " "),
)


def build_tokenizer() -> Tokenizer:
    """Returns the tokenizer, which puts the begin and end tokens around a text."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS)])
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.Lowercase(),
            *(normalizers.Replace(Regex(pattern), new) for pattern, new in _REPLACEMENTS),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        special_tokens=[(token, vocabulary[token]) for token in (BOS, EOS)],
    )
    return tokenizer


def write_tokenizer(path: str | Path) -> Path:
    """Returns `path`, after writing the tokenizer there as a `tokenizer.json`.

    Raises:
        OSError: It cannot be written.
    """
    from csm_jax.corpus.files import place

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    place(path, build_tokenizer().to_str(pretty=True).encode())
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if the file cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, prog="recipes.demo_voice.tokenizer")
    parser.add_argument("--out", type=Path, default=OUT, help=f"file (default: {OUT})")
    args = parser.parse_args(argv)
    try:
        write_tokenizer(args.out)
    except OSError as error:
        print(f"tokenizer: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(CHARACTERS) + 2} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
