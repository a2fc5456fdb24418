"""Batches for training from a directory of tokens: shuffled, packed, and the same after every resume.

An epoch is a function of (seed, epoch): the conversations are shuffled, packed best-fit into rows, and
the rows are shuffled. The rows of all epochs follow each other, and a step takes the next of them, so
step k can be made without the steps before it: the position is one number. Every process makes its own
rows of the same global step. Grain calls for steps ahead of time, on threads of its own.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.data.batch import Batch
from csm_jax.data.examples import Example, TooLongError, kept_from
from csm_jax.data.packing import empty_batch, fill_row, pack
from csm_jax.data.shards import Shards

_THREADS, _AHEAD = 2, 4
_EXAMPLES, _ROWS = 0, 1  # what is shuffled


class TrainData:
    """An opened directory of tokens.

    Attributes:
        fingerprint: Of the source and of all that the tokens depend on.
        codec_hash: Of the codec whose codes these are (`csm_jax.data.identity`).
        tokenizer_hash: Of the tokenizer whose ids these are.
        num_examples: Conversations.
        num_positions: Positions of all, prefixes included.
        num_frames: Frames of audio, without end frames.
        num_trained_frames: Positions of an epoch that are trained, end frames included.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config: CSMConfig,
        max_length: int,
        prefix_positions: int = 0,
    ):
        """Opens tokens for a model.

        Args:
            directory: What `csm-jax data tokenize` wrote.
            config: The model's sizes.
            max_length: Positions of a row. Conversations that are longer lose their oldest context.
            prefix_positions: Positions before each conversation, for a trained prefix.

        Raises:
            FileNotFoundError: Something is missing.
            ValueError: Something is damaged, the tokens do not fit the model, or some conversations do
                not fit into a row.
        """
        self.directory = Path(directory)
        if not 0 <= prefix_positions < max_length:
            raise ValueError(f"prefix_positions={prefix_positions} must be below {max_length=:,}")
        if max_length > config.backbone.max_seq_len:
            raise ValueError(
                f"{max_length=:,} exceeds the model's max_seq_len={config.backbone.max_seq_len:,}"
            )
        self._shards = Shards(self.directory)
        manifest = self._shards.manifest
        _check_model(self.directory, manifest, config)
        if not len(self._shards):
            raise ValueError(f"{self.directory} holds no conversations")
        self.max_length, self.prefix_positions = max_length, prefix_positions
        self.num_codebooks = config.num_codebooks
        self.fingerprint: str = manifest["fingerprint"]
        self.codec_hash: str = manifest["codec_hash"]
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self._first_turn = self._truncate(max_length - prefix_positions)
        index = self._shards.index
        numbers = np.arange(len(index.text)) - np.repeat(index.first[:-1], np.diff(index.first))
        kept = numbers >= np.repeat(self._first_turn, np.diff(index.first))
        taken = np.where(kept, index.text + index.frames + 1, 0)
        self._lengths = np.add.reduceat(taken, index.first[:-1]) + prefix_positions
        self.num_examples = len(self._shards)
        self.num_positions = int(self._lengths.sum())
        self.num_frames = int(index.frames[kept].sum())
        self.num_trained_frames = int((index.frames + 1)[kept & index.trained].sum())
        self._epochs = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._counts: dict[tuple[int | None, int], int] = {}
        self._lock = threading.Lock()

    def _truncate(self, capacity: int) -> np.ndarray:
        """Returns the first turn that is kept of each conversation."""
        index = self._shards.index
        positions = index.text + index.frames + 1
        first = np.zeros(len(self._shards), np.int64)
        failed: list[str] = []
        for number in np.flatnonzero(np.add.reduceat(positions, index.first[:-1]) > capacity):
            turns = slice(index.first[number], index.first[number + 1])
            try:
                first[number] = kept_from(
                    positions[turns].tolist(), index.trained[turns].tolist(), capacity
                )
            except TooLongError as error:
                failed.append(f"conversation {number}: {error}")
        if failed:
            more = f"; and {len(failed) - 3:,} more" if len(failed) > 3 else ""
            prefix = self.prefix_positions
            less = (
                f" (max_length={self.max_length:,} less prefix_positions={prefix:,})"
                if prefix
                else ""
            )
            raise ValueError(
                f"{self.directory}: {len(failed):,} conversations do not fit into {capacity:,} "
                f"positions{less}: {'; '.join(failed[:3])}{more}"
            )
        return first

    # --- epochs --------------------------------------------------------------------------------

    def _make_epoch(self, seed: int | None, epoch: int) -> list[np.ndarray]:
        if seed is None:
            return pack(self._lengths, self.max_length)
        order = _shuffled(self.num_examples, seed, epoch, _EXAMPLES)
        rows = [order[row] for row in pack(self._lengths[order], self.max_length)]
        return [rows[i] for i in _shuffled(len(rows), seed, epoch, _ROWS)]

    def epoch_rows(self, seed: int | None, epoch: int) -> list[np.ndarray]:
        """Returns the rows of an epoch, each the numbers of its conversations.

        Args:
            seed: Of the shuffle; None leaves the shards' order.
            epoch: From 0.
        """
        with self._lock:  # made once, not by every thread that waits for it
            rows = self._epochs(seed, epoch)
            self._counts[seed, epoch] = len(rows)
        return rows

    def count_rows(self, seed: int | None, epoch: int) -> int:
        """Returns how many rows an epoch has."""
        if (seed, epoch) not in self._counts:
            self.epoch_rows(seed, epoch)
        return self._counts[seed, epoch]

    def steps(self, *, seed: int, epochs: int, rows_per_step: int) -> int:
        """Returns how many optimiser steps all epochs are.

        Args:
            seed: Of the shuffle.
            epochs: How many.
            rows_per_step: Of all processes and accumulated micro-batches together.
        """
        _check_positive(epochs=epochs, rows_per_step=rows_per_step)
        return -(-sum(self.count_rows(seed, epoch) for epoch in range(epochs)) // rows_per_step)

    def batches(
        self,
        *,
        seed: int,
        epochs: int,
        rows: int,
        accumulation: int,
        process_index: int,
        process_count: int,
    ) -> BatchIterator:
        """Returns the batches `[accumulation, rows, T]` of this process, a step each.

        Args:
            seed: Of the shuffle.
            epochs: How many; their rows follow each other, and the last step is filled with empty ones.
            rows: Of one micro-batch of this process.
            accumulation: Micro-batches of a step.
            process_index: Which process this is.
            process_count: How many there are. The global batches depend on `rows * process_count` only.
        """
        _check_positive(epochs=epochs, rows=rows, accumulation=accumulation)
        source = _Steps(
            self,
            _Epochs(self, seed, epochs),
            shape=(accumulation, rows),
            process_index=process_index,
            process_count=process_count,
        )
        whole = {
            "data": self.fingerprint,
            "max_length": self.max_length,
            "prefix_positions": self.prefix_positions,
            "seed": seed,
            "accumulation": accumulation,
            "rows": rows * process_count,
        }
        return BatchIterator(source, whole)

    def eval_batches(self, *, rows: int, process_index: int, process_count: int) -> Iterator[Batch]:
        """Yields this process's batches `[rows, T]` of every conversation once, in the shards' order.

        Args:
            rows: Of this process; the last batches are filled with empty ones.
            process_index: Which process this is.
            process_count: How many there are; all get the same number of batches.
        """
        _check_positive(rows=rows)
        source = _Steps(
            self,
            _Epochs(self, None, 1),
            shape=(rows,),
            process_index=process_index,
            process_count=process_count,
        )
        return iter(BatchIterator(source, {}))

    def examples(self, numbers: Sequence[int], *, facts: bool = False) -> list[Example]:
        """Returns conversations without the context that does not fit."""
        return [
            Example(turns=example.turns[int(self._first_turn[number]) :], facts=example.facts)
            for number, example in zip(
                numbers, self._shards.read(numbers, facts=facts), strict=True
            )
        ]


class _Epochs:
    """The rows of some epochs, one after another; epochs are made when they are reached."""

    def __init__(self, data: TrainData, seed: int | None, epochs: int):
        self._data, self._seed, self._epochs = data, seed, epochs
        self._ends: list[int] = []
        self._lock = threading.Lock()

    def numbers(self, row: int) -> np.ndarray | None:
        """Returns the conversations of a row; None where all epochs have ended."""
        if not self.holds(row):
            return None
        epoch = bisect.bisect_right(self._ends, row)
        begin = self._ends[epoch - 1] if epoch else 0
        return self._data.epoch_rows(self._seed, epoch)[row - begin]

    def holds(self, row: int) -> bool:
        """Returns whether there is such a row."""
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                if (epoch := len(self._ends)) == self._epochs:
                    return False
                count = self._data.count_rows(self._seed, epoch)
                self._ends.append((self._ends[-1] if self._ends else 0) + count)
        return True

    def most(self) -> int:
        """Returns a number of rows that is not exceeded; all of them are not made for it."""
        return self._epochs * self._data.num_examples

    def total(self) -> int:
        """Returns the number of rows."""
        return sum(self._data.count_rows(self._seed, epoch) for epoch in range(self._epochs))


class _Steps:
    """Grain's random-access source of one process's batches; beyond the last they are empty."""

    def __init__(
        self,
        data: TrainData,
        rows: _Epochs,
        *,
        shape: tuple[int, ...],
        process_index: int,
        process_count: int,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"{process_index=} is not one of {process_count=}")
        self._data, self._rows, self._shape = data, rows, shape
        self._index, self._count = process_index, process_count
        self._rows_per_step = int(np.prod(shape)) * process_count

    def __len__(self) -> int:
        return -(-self._rows.most() // self._rows_per_step)

    def total(self) -> int:
        """Returns how many steps there are."""
        return -(-self._rows.total() // self._rows_per_step)

    def holds(self, step: int) -> bool:
        """Returns whether there is such a step."""
        return self._rows.holds(step * self._rows_per_step)

    def __getitem__(self, index: int) -> Batch:
        data, rows = self._data, self._shape[-1]
        batch = empty_batch(self._shape, data.max_length, data.num_codebooks)
        for place in np.ndindex(*self._shape):
            # Of a micro-batch, the rows of process 0 come first, then those of process 1, ...
            *micro, row = place
            first = int(index) * self._rows_per_step + sum(micro) * rows * self._count
            numbers = self._rows.numbers(first + self._index * rows + row)
            time.sleep(0)  # the trainer's thread goes first; Python would let it wait 5 ms
            if numbers is not None:
                examples = data.examples(numbers.tolist())
                fill_row(batch, place, examples, prefix_positions=data.prefix_positions)
        return batch


class BatchIterator:
    """Batches in their order, made ahead of time; it can tell where it is, and go there.

    Attributes:
        fill: Share of the last batch's positions that are not padding.
    """

    def __init__(self, source: _Steps, whole: Mapping[str, Any]):
        try:
            import grain
        except ImportError as error:
            raise ImportError(
                "reading batches needs grain: pip install 'csm_jax[train]', or pip install grain"
            ) from error
        self._source, self._whole = source, dict(whole)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        dataset = grain.MapDataset.source(source).to_iter_dataset(options)
        self._batches = iter(dataset)
        self.fill = 0.0

    def __iter__(self) -> BatchIterator:
        return self

    def __len__(self) -> int:
        """How many batches there are from the first to the last."""
        return self._source.total()

    def __next__(self) -> Batch:
        if not self._source.holds(self._batches.get_state()["next_index"]):
            raise StopIteration
        batch: Batch = next(self._batches)
        self.fill = float(np.mean(np.asarray(batch.segments) > 0))
        return batch

    def state(self) -> dict[str, Any]:
        """Returns where it is: after the batch that was returned last, whatever is prefetched."""
        return {"step": self._batches.get_state()["next_index"], "batches": dict(self._whole)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was.

        Raises:
            ValueError: The state is of other data, or of steps made otherwise.
        """
        before, now = dict(state["batches"]), self._whole
        if before != now:
            changed = [
                f"{name} was {before.get(name)}, is {now.get(name)}"
                for name in sorted({*before, *now})
                if before.get(name) != now.get(name)
            ]
            raise ValueError(
                f"the state is of other batches, so it cannot go on exactly: {'; '.join(changed)}"
            )
        step = state["step"]
        if step and not self._source.holds(step - 1):
            raise ValueError(f"the state is at step {step:,}, but there are {len(self):,}")
        self._batches.set_state({"next_index": step})

    def close(self) -> None:
        """Ends the threads."""
        self._batches.close()


def _shuffled(count: int, seed: int, epoch: int, what: int) -> np.ndarray:
    # numpy promises that the raw numbers of a bit generator stay what they are, not those of `permutation`.
    words = hashlib.sha256(json.dumps([seed, epoch, what]).encode()).digest()
    raw = np.random.PCG64(list(words)).random_raw(count)
    return np.argsort(raw, kind="stable")


def _check_model(directory: Path, manifest: Mapping[str, Any], config: CSMConfig) -> None:
    problems = []
    if manifest["num_codebooks"] != config.num_codebooks:
        problems.append(
            f"{manifest['num_codebooks']} codebooks, but the model has {config.num_codebooks}"
        )
    if manifest["codebook_size"] > config.codebook_size:
        problems.append(
            f"codes up to {manifest['codebook_size'] - 1:,}, but the model's end at "
            f"{config.codebook_size - 1:,}"
        )
    if (top := manifest["counts"]["max_text_id"]) >= config.text_vocab_size:
        problems.append(
            f"text ids up to {top:,}, but the model has text_vocab_size={config.text_vocab_size:,}"
        )
    if problems:
        raise ValueError(
            f"{directory} was not tokenised for this model: it has {'; '.join(problems)}"
        )


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
