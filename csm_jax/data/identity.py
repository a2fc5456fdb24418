"""What a codec and a tokenizer are, whatever file they come from: hashes of their content.

Codes mean something to one codec only, and text ids to one tokenizer. Tokens carry both hashes, and
training compares them with those of its model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def codec_hash(source: str | Path) -> str:
    """Returns the hash of a model's Mimi: of its parameters, as they are read from any layout.

    Raises:
        FileNotFoundError, ValueError, HubError: As `csm_jax.pipeline.load_codec`.
    """
    from csm_jax import hub
    from csm_jax.pipeline import find_mimi
    from csm_jax.weights.mimi import load_mimi

    local = hub.local_path(source) is not None
    path = find_mimi(hub.locate(source)) if local else hub.locate_mimi(source)
    digest = hashlib.sha256()
    for name, leaf in _leaves(load_mimi(path)[1], ""):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name in sorted(tree):
        below = tree[name]
        if isinstance(below, Mapping):
            yield from _leaves(below, f"{path}{name}/")
        else:
            yield f"{path}{name}", below


def tokenizer_hash(path: str | Path) -> str:
    """Returns the hash of what a `tokenizer.json` makes of a text: its form and post-processor do not count.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    try:
        given = json.loads(path.read_bytes())
        model = dict(given["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    # Older files write a merge as one string.
    model["merges"] = [
        merge.split(" ", 1) if isinstance(merge, str) else merge
        for merge in model.get("merges", [])
    ]
    what = [model, *(given.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer"))]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
