"""Conversations to shards of tokens: resumable, and the same bytes however often it was stopped.

A shard ends with the conversation that brings its audio to the length asked for, and clips are encoded
in groups that begin anew in each shard. So what a shard holds depends on the source and on where the
shard before ended, which its commit says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.codec import check_codes
from csm_jax.config import FRAME_RATE, CSMConfig, csm_1b, read_config
from csm_jax.corpus.files import Locks
from csm_jax.corpus.identity import hash_files
from csm_jax.data import commits, shards
from csm_jax.data.arguments import SHARD_MINUTES
from csm_jax.data.conversations import SchemaError
from csm_jax.data.examples import Example
from csm_jax.data.identity import codec_hash, tokenizer_hash
from csm_jax.data.parquet import codec_of
from csm_jax.data.prepare import Ready, prepare
from csm_jax.data.sounds import frames_of
from csm_jax.data.sources import Item, Source, open_source
from csm_jax.data.survey import DEFAULT_SPLIT, BadLinesError, check_survey, problems_of, survey
from csm_jax.prompt import AudioEncoder, TextTokenizer

GROUP_CLIPS, GROUP_FRAMES = 64, 7_500
"""Clips of one call of the codec, and frames (10 minutes of audio) that end a group earlier."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        done: Items behind it; `total` is all of them.
        total: Of the source.
        clips: Encoded in this run.
        seconds: Of audio, encoded in this run.
        elapsed_s: Since this run began to encode.
        done_here: Items behind it in this run.
        shards: Committed.
    """

    done: int
    total: int
    clips: int
    seconds: float
    elapsed_s: float
    done_here: int
    shards: int

    @property
    def left_s(self) -> float:
        """Seconds that are left at this rate."""
        return self.elapsed_s * (self.total - self.done) / max(self.done_here, 1)


class Tokenizer:
    """Turns a source into shards of one directory."""

    def __init__(
        self,
        source: Source,
        directory: Path,
        *,
        tokenizer: TextTokenizer,
        open_codec: Callable[[], AudioEncoder],
        config: CSMConfig,
        plan: Mapping[str, Any],
        total: int,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ):
        """Begins, or goes on where it was.

        Args:
            source: Conversations.
            directory: Where the shards go; made if it is not there.
            tokenizer: Text to ids.
            open_codec: Loads the codec; called if there is something to encode.
            config: The model's sizes.
            plan: Made by `make_plan`.
            total: Items of the source, for the progress.
            on_progress: Called often; may raise to stop. What is committed stays.

        Raises:
            ValueError: The directory holds other tokens, or is damaged.
            OSError: It cannot be written.
        """
        self.directory, self._source, self._tokenizer = directory, source, tokenizer
        self._open_codec, self._config, self._plan = open_codec, config, plan
        self._total, self._on_progress = total, on_progress
        self._fingerprint = commits.write_plan(directory, plan)
        self._commits = commits.read_commits(directory, self._fingerprint)
        if (directory / shards.MANIFEST).exists():
            for name, wrong in shards.verify(directory, shards.read_manifest(directory)):
                if wrong is not None:
                    raise ValueError(
                        f"{directory / name} {wrong}: remove {directory} and begin again"
                    )
        self._codec: AudioEncoder | None = None
        self._done = self._begun = self._commits[-1]["consumed"] if self._commits else 0
        self._clips, self._frames, self._started = 0, 0, time.monotonic()

    def run(self) -> dict[str, Any]:
        """Returns the manifest, after writing all that is missing.

        Raises:
            BadLinesError: Some lines are bad and are not to be skipped; what is committed stays.
            OSError: Something cannot be written, such as on a full disk; what is committed stays. Or
                another process is at work here.
        """
        with Locks(self.directory / shards.PLAN) as locks:
            locks.take([0])
            return self._run()

    def _run(self) -> dict[str, Any]:
        if (self.directory / shards.MANIFEST).exists():
            return shards.read_manifest(self.directory)
        commits.remove_unfinished(self.directory, len(self._commits))
        shard = _Shard()
        seen: dict[str, str] = {}
        most = int(self._plan["shard_minutes"] * 60 * FRAME_RATE)
        for number, item in enumerate(self._source):
            problems = problems_of(item, seen)
            if number < self._done:
                continue
            self._add(item, problems, shard)
            self._done += 1
            self._tell()
            if shard.frames >= most:
                self._commit(shard)
                shard = _Shard()
        if shard.ready or shard.examples or shard.rejected:
            self._commit(shard)
        if not any(commit["records"] for commit in self._commits):
            listed = [(each["where"], each["error"]) for each in shard.rejected]
            raise BadLinesError("no conversation is left: all are bad", listed)
        return commits.write_manifest(self.directory, self._commits, plan=self._plan)

    def _add(self, item: Item, problems: list[str], shard: _Shard) -> None:
        conversation = item.conversation
        if conversation is not None and self._plan["split"] not in (
            None,
            conversation.split or DEFAULT_SPLIT,
        ):
            return
        if conversation is not None and not problems:
            try:
                ready = prepare(
                    conversation,
                    self._tokenizer,
                    config=self._config,
                    max_length=self._plan["max_length"],
                )
            except SchemaError as error:
                problems = error.problems
            else:
                shard.frames += ready.frames
                shard.dropped += ready.dropped
                shard.ready.append(ready)
                clips = sum(len(each.sounds) for each in shard.ready)
                frames = sum(each.frames for each in shard.ready)
                if clips >= GROUP_CLIPS or frames >= GROUP_FRAMES:
                    self._encode(shard)
                return
        if not self._plan["skip_bad"]:
            raise BadLinesError(
                f"{item.where} is bad: {problems[0]}; correct it, or leave such lines out with "
                "`csm-jax data tokenize --skip-bad` (`csm-jax data check` lists all of them)",
                [(item.where, problem) for problem in problems],
            )
        shard.rejected.append({"where": item.where, "error": "; ".join(problems)})

    def _encode(self, shard: _Shard) -> None:
        sounds = [sound for ready in shard.ready for sound in ready.sounds]
        audios = [sound for sound in sounds if sound.ndim == 1]
        encoded = iter(self._codes(audios) if audios else [])
        codes = [next(encoded) if sound.ndim == 1 else sound for sound in sounds]
        for ready in shard.ready:
            own, codes = codes[: len(ready.sounds)], codes[len(ready.sounds) :]
            shard.examples.append(ready.example(own))
        self._clips += len(sounds)
        self._frames += sum(frames_of(sound) for sound in sounds)
        shard.ready = []

    def _codes(self, audios: list[np.ndarray]) -> list[np.ndarray]:
        if self._codec is None:
            self._codec = self._open_codec()
            self._started = time.monotonic()
        codec: Any = self._codec
        if hasattr(codec, "encode_batch"):
            found = codec.encode_batch(audios)
        else:
            found = [codec.encode(audio) for audio in audios]
        sizes = {
            "num_codebooks": self._config.num_codebooks,
            "codebook_size": self._config.codebook_size,
        }
        return [check_codes(codes, **sizes) for codes in found]

    def _commit(self, shard: _Shard) -> None:
        if shard.ready:
            self._encode(shard)
        self._tell()
        self._commits.append(
            commits.write_shard(
                self.directory,
                len(self._commits),
                shard.examples,
                fingerprint=self._fingerprint,
                consumed=self._done,
                dropped=shard.dropped,
                rejected=shard.rejected,
            )
        )
        self._tell()

    def _tell(self) -> None:
        self._on_progress(
            Progress(
                done=self._done,
                total=self._total,
                clips=self._clips,
                seconds=self._frames / FRAME_RATE,
                elapsed_s=time.monotonic() - self._started,
                done_here=self._done - self._begun,
                shards=len(self._commits),
            )
        )


class _Shard:
    """What has been read of a shard: encoded, waiting for the codec, and left out."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.ready: list[Ready] = []
        self.rejected: list[dict[str, str]] = []
        self.frames = self.dropped = 0


def make_plan(
    source: Source,
    *,
    config: CSMConfig,
    codec_hash: str,
    tokenizer_hash: str,
    source_hash: str,
    max_length: int,
    shard_minutes: float,
    split: str | None,
    skip_bad: bool,
) -> dict[str, Any]:
    """Returns all that the content of the shards depends on.

    Raises:
        ValueError: `shard_minutes` is out of range.
    """
    if not 0 < shard_minutes <= 10_000:
        raise ValueError(f"--shard-minutes must be above 0, at most 10,000, got {shard_minutes:g}")
    return {
        "source": {"files": [file.name for file in source.files], "sha256": source_hash},
        "codec_hash": codec_hash,
        "tokenizer_hash": tokenizer_hash,
        "num_codebooks": config.num_codebooks,
        "codebook_size": config.codebook_size,
        "max_length": max_length,
        "shard_minutes": shard_minutes,
        "split": split,
        "skip_bad": skip_bad,
        "speaker": source.speaker,
        "lang": source.lang,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSide:
    """What a model does with text.

    Attributes:
        config: Its sizes.
        path: Of `tokenizer.json`.
        tokenizer: Text to ids.
    """

    config: CSMConfig
    path: Path
    tokenizer: TextTokenizer


def open_text_side(model: str, max_length: int) -> TextSide:
    """Returns the sizes and the tokenizer of a model, without its weights.

    Args:
        model: A model directory, a checkpoint file, or a hub id.
        max_length: Positions of a row, checked against the model's.

    Raises:
        FileNotFoundError, ValueError, HubError: As `csm_jax.hub.locate`.
        ValueError: Rows are longer than the model holds.
    """
    from csm_jax import hub

    path = hub.locate_tokenizer(model)
    config = hub.locate_config(model)
    # A lone checkpoint has no config.json.
    sizes = csm_1b() if config is None else read_config(config)
    if not 4 <= max_length <= sizes.backbone.max_seq_len:
        raise ValueError(
            f"the maximum length must be in 4..{sizes.backbone.max_seq_len:,}, got {max_length:,}"
        )
    return TextSide(config=sizes, path=path, tokenizer=TextTokenizer.from_file(path))


def tokenize_for(
    files: Path | Sequence[Path],
    directory: Path,
    *,
    model: str,
    max_length: int,
    shard_minutes: float = SHARD_MINUTES,
    split: str | None = None,
    skip_bad: bool = False,
    speaker: int | None = None,
    lang: str | None = None,
    on_item: Callable[[], None] = lambda: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Returns the manifest of the shards that a model is trained with, after making what is missing of them.

    Args:
        files: JSON Lines, tars or Parquet (`csm_jax.data.sources`).
        directory: Where the shards go.
        model: Whose tokenizer and codec are used.
        max_length: Positions of a row.
        shard_minutes: Audio of a shard.
        split: Only lines of this split.
        skip_bad: Whether to leave bad lines out, and list them.
        speaker: Of recordings in tars that name none, 0 unless given; other sources name all.
        lang: Of lines and recordings that name none.
        on_item: Called for each item of a first reading; may raise to stop.
        on_progress: Called often; may raise to stop. What is committed stays.

    Raises:
        BadLinesError: Some lines are bad.
        OSError, ValueError, ImportError: Something is missing, damaged, or cannot be written.
    """
    listed = [files] if isinstance(files, Path) else files
    source = open_source(listed, speaker=speaker, lang=lang)
    text = open_text_side(model, max_length)
    found = survey(source, on_item)
    check_survey(found, split=split, skip_bad=skip_bad)
    codec = codec_hash(model)
    for file in source.files:
        if (made_by := codec_of(file)) not in (None, codec):
            raise ValueError(f"{file} holds codes of another codec ({made_by}) than {model}'s")
    plan = make_plan(
        source,
        config=text.config,
        codec_hash=codec,
        tokenizer_hash=tokenizer_hash(text.path),
        source_hash=hash_files(source.files, {})[0],
        max_length=max_length,
        shard_minutes=shard_minutes,
        split=split,
        skip_bad=skip_bad,
    )

    def open_codec() -> AudioEncoder:
        from csm_jax.pipeline import load_codec

        return load_codec(model)

    return Tokenizer(
        source,
        directory,
        tokenizer=text.tokenizer,
        open_codec=open_codec,
        config=text.config,
        plan=plan,
        total=found.items,
        on_progress=on_progress,
    ).run()
