"""Puts recordings together to conversations: `python -m recipes.demo_voice.conversations --speech DIR`.

Half of the clips stand alone; the others are turns of short conversations, so that the model learns to speak
after what was said before, in the same voice or the other. It writes `SPLIT.jsonl` beside the tars, which
`csm-jax data tokenize` reads.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from csm_jax.corpus.files import place
from csm_jax.data.sounds import read_member, tar_members
from recipes.demo_voice.text import SPLITS, Split

_TURNS, _WEIGHTS = (1, 2, 3), (0.70, 0.20, 0.10)  # of a conversation


def write_conversations(speech: Path, split: Split) -> Path:
    """Returns the manifest of a split that it writes: every clip of its tars once, in their order.

    Raises:
        FileNotFoundError: There are no tars of this split.
        OSError: It cannot be written.
    """
    tars = sorted(speech.glob(f"{split}-*.tar"))
    if not tars:
        raise FileNotFoundError(f"{speech} has no {split}-*.tar: make the speech first")
    path = speech / f"{split}.jsonl"
    lines = (json.dumps(each) + "\n" for tar in tars for each in _conversations(tar, split))
    place(path, "".join(lines).encode())
    return path


def _conversations(tar: Path, split: Split) -> Iterator[dict[str, Any]]:
    # Drawn anew for every tar: more speech changes nothing of what was written before.
    rng = random.Random(f"demo voice/conversations/{tar.name}")
    turns = (_turn(tar, name) for name in tar_members(tar) if name.endswith(".json"))
    count = 0
    while messages := list(islice(turns, rng.choices(_TURNS, _WEIGHTS)[0])):
        yield {"id": f"{tar.stem}-{count:04d}", "split": split, "messages": messages}
        count += 1


def _turn(tar: Path, name: str) -> dict[str, Any]:
    told = json.loads(read_member(tar, name))
    sound = f"{tar.name}#{name.removesuffix('.json')}.wav"
    return {
        "role": f"speaker_{told['speaker']}",
        "content": [{"type": "text", "text": told["text"]}, {"type": "audio", "url": sound}],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if something is missing or cannot be written."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split(":")[0], prog="recipes.demo_voice.conversations"
    )
    parser.add_argument("--speech", type=Path, required=True, help="what the speech stage made")
    args = parser.parse_args(argv)
    try:
        for split in SPLITS:
            if split != "test":
                print(write_conversations(args.speech, split))
    except (ValueError, OSError) as error:
        print(f"conversations: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
