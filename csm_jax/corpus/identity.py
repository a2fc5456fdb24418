"""What a model is, for a fingerprint: the content of its files, wherever they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from csm_jax.corpus.files import sha256_of

Remembered = Mapping[str, Sequence[int | str]]
"""Path of a file to its size, time of change in nanoseconds, and SHA-256."""


def model_files(source: str, *, watermark: bool) -> dict[str, list[Path]]:
    """Returns the files of `model` (transformers, codec, watermark) and of `tokenizer`.

    Args:
        source: A model directory, a checkpoint file, or a hub id, whose files are fetched.
        watermark: Whether the watermark's files belong to it.

    Raises:
        FileNotFoundError, ValueError, HubError: As `csm_jax.hub.locate`.
    """
    from csm_jax import hub
    from csm_jax.weights.mimi import holds_mimi

    files = hub.locate(source)
    found = _checkpoint(files.checkpoint)
    if files.config is not None:
        found.append(files.config)
    mimi = files.mimi_beside()
    if mimi is not None or not holds_mimi(files.checkpoint):
        found.append(mimi or files.mimi())
    if watermark:
        directory = files.watermark_dir()
        found += [directory / name for name in hub.WATERMARK_FILES]
    return {"model": found, "tokenizer": [files.tokenizer()]}


def _checkpoint(path: Path) -> list[Path]:
    if path.is_dir():  # orbax
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix == ".json":  # an index, and the shards beside it
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return [path, *(path.parent / name for name in sorted(set(names)))]
    return [path]


def hash_files(
    files: Sequence[Path], remembered: Remembered
) -> tuple[str, dict[str, tuple[int, int, str]]]:
    """Returns one hash of all files' content, and what to remember of them.

    Args:
        files: In any order; their names do not count.
        remembered: Files that have not changed since are not read again.
    """
    found: dict[str, tuple[int, int, str]] = {}
    for file in files:
        path = file.resolve()
        facts = path.stat()
        size, changed = facts.st_size, facts.st_mtime_ns
        before = remembered.get(str(path), ())
        same = list(before[:2]) == [size, changed]
        found[str(path)] = (size, changed, str(before[2]) if same else sha256_of(path))
    hashes = sorted(sha256 for _, _, sha256 in found.values())
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest(), found
