"""Writes shards so that each is there whole or does not count; `csm_jax.data.shards` has the files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csm_jax.corpus.files import PART, Staged, place, publish, sha256_of
from csm_jax.data.examples import Example, encode_record
from csm_jax.data.shards import (
    COMMIT,
    FORMAT,
    MANIFEST,
    PLAN,
    RECORDS,
    REJECTED,
    VERSION,
    array_record_module,
    read_json,
    shard_name,
)

_OPTIONS = "group_size:1,uncompressed"  # read one by one; codes hardly compress
_SCHEMA = {
    "record": "csm_jax.data.examples, version 1",
    "text": "int32 token ids of [speaker]text with begin and end tokens",
    "codes": "uint16 [frames, codebooks], without end frames",
}


def write_shard(
    directory: Path,
    number: int,
    examples: Sequence[Example],
    *,
    fingerprint: str,
    consumed: int,
    dropped: int,
    rejected: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Returns the commit of a shard, after writing both its files so that they are there or do not count.

    Args:
        directory: Where.
        number: Of the shard, from 0.
        examples: In the source's order.
        fingerprint: Of the plan.
        consumed: How many conversations of the source are behind it when it ends.
        dropped: Messages of context that were left out to fit.
        rejected: Those of them that were left out since the shard before: `where` and `error`.

    Raises:
        OSError: It could not be written; no file under a temporary name is left.
    """
    target = directory / f"{shard_name(number)}{RECORDS}"
    staged = _stage_records(target, [encode_record(example) for example in examples])
    turns = [turn for example in examples for turn in example.turns]
    trained = [turn for turn in turns if turn.trained]
    found = {
        "fingerprint": fingerprint,
        "records": len(examples),
        "frames": sum(len(turn.codes) for turn in turns),
        "trained_frames": sum(len(turn.codes) for turn in trained),
        "positions": sum(example.positions for example in examples),
        "size": staged.size,
        "sha256": staged.sha256,
        "consumed": consumed,
        "dropped": dropped,
        "rejected": [dict(each) for each in rejected],
        "langs": dict(Counter(str(example.facts.get("lang") or "") for example in examples)),
        "max_text_id": max((int(turn.text.max()) for turn in turns), default=0),
        "turns": {
            "turns": [len(example.turns) for example in examples],
            "text": [len(turn.text) for turn in turns],
            "frames": [len(turn.codes) for turn in turns],
            "trained": [int(turn.trained) for turn in turns],
        },
    }
    try:
        publish([staged])
        place(directory / f"{shard_name(number)}{COMMIT}", _json(found))
    finally:
        staged.discard()
    return found


def _stage_records(target: Path, records: Sequence[bytes]) -> Staged:
    module = array_record_module()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}{PART}")
    try:
        # Made by us first: the library's own error on a directory that cannot be written says little.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            writer = module.ArrayRecordWriter(str(temporary), _OPTIONS)
            for record in records:
                writer.write(record)
            writer.close()
            reader = module.ArrayRecordReader(str(temporary))
            there = reader.num_records()
            reader.close()
        except (
            RuntimeError,
            ValueError,
        ) as error:  # how the library reports what the system refuses
            raise OSError(errno.EIO, str(error)) from error
        if there != len(records):
            raise OSError(errno.EIO, f"{there:,} of {len(records):,} records are in the file")
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return Staged(
            target=target,
            temporary=temporary,
            size=temporary.stat().st_size,
            sha256=sha256_of(temporary),
        )
    except OSError as error:
        _forget(temporary)
        raise type(error)(
            error.errno, f"cannot write {target}: {error.strerror or error}"
        ) from error
    except BaseException:  # Ctrl-C must not leave it behind either
        _forget(temporary)
        raise


def _forget(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_plan(directory: Path, plan: Mapping[str, Any]) -> str:
    """Returns the fingerprint of what is to be tokenised, after writing it or finding it there.

    Args:
        directory: Made if it is not there.
        plan: All that the shards' content depends on.

    Raises:
        ValueError: The directory holds something else, or other tokens.
        OSError: It cannot be written.
    """
    fingerprint = hashlib.sha256(_json(dict(plan))).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLAN
    if path.exists():
        before = read_json(path)
        if before.get("fingerprint") != fingerprint:
            old = before.get("plan", {})
            changed = sorted(name for name in {*plan, *old} if plan.get(name) != old.get(name)) or [
                "format"
            ]
            raise ValueError(
                f"{directory} holds tokens of something else (differing in {', '.join(changed)}): give "
                "another directory, or remove this one"
            )
        return fingerprint
    if any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty and holds no tokens: give another directory")
    place(
        path,
        _json({"format": FORMAT, "version": VERSION, "plan": plan, "fingerprint": fingerprint}),
    )
    return fingerprint


def read_commits(directory: Path, fingerprint: str) -> list[dict[str, Any]]:
    """Returns the commits from the first shard to the last one that is whole, in their order.

    Raises:
        ValueError: A commit is damaged or of other tokens.
    """
    found: list[dict[str, Any]] = []
    while (path := directory / f"{shard_name(len(found))}{COMMIT}").exists():
        commit = read_json(path)
        if commit.get("fingerprint") != fingerprint:
            raise ValueError(f"{path} is of other tokens than {directory / PLAN}")
        records = path.with_suffix(RECORDS)
        if not records.is_file() or records.stat().st_size != commit["size"]:
            break
        found.append(commit)
    return found


def remove_unfinished(directory: Path, whole: int) -> None:
    """Removes what a run that was stopped left behind: temporary files, and shards from `whole` on."""
    for path in directory.iterdir():
        number = path.name.removeprefix("shard-").split(".")[0]
        after = path.name.startswith("shard-") and number.isdigit() and int(number) >= whole
        if path.name.endswith(PART) or after:
            path.unlink(missing_ok=True)


def write_manifest(
    directory: Path, commits: Sequence[Mapping[str, Any]], *, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the manifest of finished tokens, after writing it and the list of what was left out.

    Args:
        directory: Of the shards.
        commits: Of all of them.
        plan: As `write_plan` was given it.

    Raises:
        OSError: It cannot be written.
    """
    rejected = [each for commit in commits for each in commit["rejected"]]
    if rejected:
        place(directory / REJECTED, b"".join(_json(each, indent=None) for each in rejected))
    turns = {name: sum(len(c["turns"][name]) for c in commits) for name in ("turns", "text")}
    totals = {
        name: sum(commit[name] for commit in commits)
        for name in ("frames", "trained_frames", "positions", "dropped")
    }
    langs = sum((Counter(commit["langs"]) for commit in commits), Counter())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "schema": _SCHEMA,
        "fingerprint": commits[0]["fingerprint"],
        **plan,
        "counts": {
            "conversations": turns["turns"],
            "turns": turns["text"],
            "trained_turns": sum(sum(commit["turns"]["trained"]) for commit in commits),
            **totals,
            "rejected": len(rejected),
            "langs": dict(sorted(langs.items())),
            "max_text_id": max((commit["max_text_id"] for commit in commits), default=0),
        },
        "shards": [
            {
                "name": f"{shard_name(i)}{RECORDS}",
                **{name: commit[name] for name in ("records", "frames", "size", "sha256")},
                "index_sha256": sha256_of(directory / f"{shard_name(i)}{COMMIT}"),
            }
            for i, commit in enumerate(commits)
        ],
    }
    place(directory / MANIFEST, _json(manifest))
    return manifest


def _json(value: Mapping[str, Any], indent: int | None = 1) -> bytes:
    # One key a line, so that people can read it; lists of numbers stay on theirs.
    if indent is None:
        return json.dumps(value, ensure_ascii=False, sort_keys=True).encode() + b"\n"
    lines = (
        f"{json.dumps(name)}: {json.dumps(part, ensure_ascii=False, sort_keys=True)}"
        for name, part in value.items()
    )
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode()
