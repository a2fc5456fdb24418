"""Training data to test with: recordings whose codes tell which they are, and a run that can be killed."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from csm_jax.config import SAMPLE_RATE, SAMPLES_PER_FRAME, CSMConfig, tiny
from csm_jax.corpus.identity import hash_files
from csm_jax.data.examples import Example, Turn
from csm_jax.data.sources import open_source
from csm_jax.data.survey import check_survey, survey
from csm_jax.data.tokenize import Tokenizer, make_plan
from csm_jax.prompt import TextTokenizer
from tests.support.tokenizer import build_tokenizer

CODEC, TOKENIZER = "c" * 64, "t" * 64


class LevelCodec:
    """Codes that show a frame's level: (level + codebook) mod the size, and never a frame of zeros."""

    sample_rate = SAMPLE_RATE

    def __init__(self, config: CSMConfig, delay_s: float = 0.0):
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size
        self.delay_s = delay_s
        self.encoded = 0

    def encode(self, audio: np.ndarray) -> np.ndarray:
        if self.delay_s:
            time.sleep(self.delay_s)
        self.encoded += 1
        frames = -(-len(audio) // SAMPLES_PER_FRAME)
        padded = np.pad(audio, (0, frames * SAMPLES_PER_FRAME - len(audio)))
        level = np.rint(padded.reshape(frames, -1).max(axis=1) * 200).astype(np.int32)
        return (level[:, None] + np.arange(self.num_codebooks)) % self.codebook_size

    def encode_batch(self, audios: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.encode(audio) for audio in audios]


def tokenizer() -> TextTokenizer:
    return TextTokenizer(build_tokenizer())


def write_clip(
    path: Path, frames: float, *, level: float = 0.5, rate: int = SAMPLE_RATE, channels: int = 1
) -> Path:
    """Writes a recording of so many frames of 80 ms, all at one level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.full(round(frames * SAMPLES_PER_FRAME * rate / SAMPLE_RATE), level, np.float32)
    shape = samples if channels == 1 else np.stack([samples] * channels, axis=1)
    soundfile.write(path, shape, rate)
    return path


def message(speaker: int, text: str | None, url: Any = None, **audio: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [] if text is None else [{"type": "text", "text": text}]
    if url is not None or audio:
        content.append({"type": "audio", **({} if url is None else {"url": url}), **audio})
    return {"role": f"speaker_{speaker}", "content": content}


def line(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text(
        "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in lines), encoding="utf-8"
    )
    return path


def some_lines(directory: Path, count: int, *, seed: int = 0) -> Path:
    """Returns a file of conversations of 1 to 3 turns, of which the first is context now and then."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        turns = int(rng.integers(1, 4))
        messages = []
        for turn in range(turns):
            name = f"clips/{number:03d}-{turn}.wav"
            frames, level = float(rng.uniform(0.6, 9)), float(rng.integers(1, 150)) / 200
            write_clip(directory / name, frames, level=level)
            messages.append(
                message(turn % 2, "word " * int(rng.integers(1, 9)) + str(number), name)
            )
        mask = [turns == 1 or bool(rng.integers(0, 2))] + [True] * (turns - 1)
        lines.append(
            line(*messages, training_mask=mask, id=f"c{number}", lang=("en", "zh")[number % 2])
        )
    return write_lines(directory / "talks.jsonl", lines)


def tokenize(
    files: Path | Sequence[Path],
    directory: Path,
    *,
    config: CSMConfig | None = None,
    codec: Any = None,
    max_length: int = 256,
    shard_minutes: float = 0.05,
    split: str | None = None,
    skip_bad: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Returns the manifest of what the command would write, with a codec that needs no weights."""
    config = config or tiny()
    source = open_source([files] if isinstance(files, Path) else files)
    found = survey(source)
    check_survey(found, split=split, skip_bad=skip_bad)
    plan = make_plan(
        source,
        config=config,
        codec_hash=CODEC,
        tokenizer_hash=TOKENIZER,
        source_hash=hash_files(source.files, {})[0],
        max_length=max_length,
        shard_minutes=shard_minutes,
        split=split,
        skip_bad=skip_bad,
    )
    return Tokenizer(
        source,
        directory,
        tokenizer=tokenizer(),
        open_codec=lambda: codec or LevelCodec(config),
        config=config,
        plan=plan,
        total=found.items,
        **options,
    ).run()


def contents(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def example(
    *turns: tuple[int, int, bool], codebooks: int = 32, first: int = 1, weight: float = 1.0
) -> Example:
    """Returns an example of turns (text ids, frames, trained) whose numbers count up from `first`."""
    made = []
    for text, frames, trained in turns:
        codes = (first + np.arange(frames * codebooks).reshape(frames, codebooks)) % 250 + 1
        made.append(
            Turn(
                text=np.arange(first, first + text, dtype=np.int32),
                codes=codes.astype(np.uint16),
                trained=trained,
                weight=weight,
            )
        )
        first += text
    return Example(turns=tuple(made), facts={})


if __name__ == "__main__":  # what the kill test kills
    print("begins", flush=True)
    tokenize(Path(sys.argv[1]), Path(sys.argv[2]), codec=LevelCodec(tiny(), delay_s=0.04))
