"""A corpus to test with: a synthesizer that needs no model, and a command that a test can kill."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.corpus.plan import Plan, make_plan, read_plan, row_seed
from csm_jax.corpus.run import run_shards

IDENTITY: dict[str, Any] = {
    "model": {"checkpoint": "m"},
    "tokenizer": "t",
    "voices": {"ann": "v1", "bob": "v2"},
    "options": {"watermark": True},
}
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Result:
    id: Hashable
    audio: np.ndarray | None
    codes: np.ndarray
    finish_reason: str = "eos"
    flags: tuple[str, ...] = ()
    redraws: int = 0
    error: str | None = None


class FakeSynthesizer:
    """Speaks noise that is a function of the row; results come out of order, as from real slots."""

    def __init__(self, slots: int = 4, delay_s: float = 0.0):
        self.slots, self.delay_s = slots, delay_s
        self.spoken: list[str] = []
        self.most_held = 0

    def slot_use(self) -> float:
        return 0.9

    def run(self, requests: Iterable[tuple[Hashable, Any]]) -> Iterator[Result]:
        todo, held = iter(requests), []
        while True:
            while len(held) < self.slots and (taken := next(todo, None)) is not None:
                held.append(taken)
            if not held:
                return
            self.most_held = max(self.most_held, len(held))
            row_id, row = held.pop(row_seed(SEED, held[0][1]) % len(held))
            if self.delay_s:
                time.sleep(self.delay_s)
            self.spoken.append(row["id"])
            yield self.speak(row_id, row)

    def speak(self, row_id: Hashable, row: dict[str, Any]) -> Result:
        noise = np.random.default_rng(row_seed(SEED, row))
        frames = 1 + len(row["text"]) // 8
        codes = noise.integers(0, 2048, (frames, 32)).astype(np.int32)
        if "fail" in row["text"]:
            return Result(
                id=row_id, audio=None, codes=codes[:0], finish_reason="error", error="it would not"
            )
        if "nothing" in row["text"]:
            return Result(id=row_id, audio=np.zeros(0, np.float32), codes=codes[:0])
        audio = (0.1 * noise.standard_normal(frames * 1920)).astype(np.float32)
        flags = ("silence",) if "flag" in row["text"] else ()
        reason = "length" if "long" in row["text"] else "eos"
        return Result(id=row_id, audio=audio, codes=codes, finish_reason=reason, flags=flags)


def as_row(row: dict[str, Any]) -> tuple[dict[str, Any], Sequence[str]]:
    """The row is the request, and every recording sounds the same."""
    return row, ["0" * 64 for _ in row.get("context", ())]


def write_manifest(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"row-{i:03d}",
            "text": "word " * (1 + i % 13) + ("flag" if i % 10 == 3 else "."),
            "speaker": i % 2,
            "voice": "ann" if i % 3 else "bob",
            "lang": "en",
        }
        for i in range(count)
    ]


def plan_of(
    rows: Iterable[Any], where: Path, *, shard_minutes: float = 0.1, **changed: Any
) -> Plan:
    manifest = write_manifest(where / "manifest.jsonl", rows)
    return make_plan(
        manifest,
        where / "corpus",
        identity={**IDENTITY, **changed},
        launch={},
        seed=SEED,
        shard_minutes=shard_minutes,
    )


def speak(plan: Plan, synthesizer: FakeSynthesizer | None = None, **options: Any) -> Any:
    shards = options.pop("shards", range(len(plan.shards)))
    return run_shards(plan, shards, lambda: synthesizer or FakeSynthesizer(), as_row, **options)


def contents(directory: Path) -> dict[str, bytes]:
    """All that a run writes, without what tells one run from another."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.parent.name == "shards" and path.suffix == ".json":
            commit = json.loads(data)
            assert commit.pop("run")["finished"] > 0
            data = json.dumps(commit).encode()
        found[path.relative_to(directory).as_posix()] = data
    return found


def digest(directory: Path) -> str:
    return hashlib.sha256(repr(contents(directory)).encode()).hexdigest()


if __name__ == "__main__":  # what the kill test kills
    print("begins", flush=True)
    speak(read_plan(Path(sys.argv[1])), FakeSynthesizer(delay_s=float(sys.argv[2])))
