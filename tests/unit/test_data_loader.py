"""Batches: the same for every process count, after every resume, and of every conversation once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_jax.config import tiny
from csm_jax.data.batch import Batch
from csm_jax.data.loader import TrainData
from tests.support.data import CODEC, TOKENIZER, some_lines, tokenize

LENGTH = 256
FIELDS = [field.name for field in dataclasses.fields(Batch)]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tokens")
    tokenize(some_lines(where, 60), where / "out")
    return where / "out"


def opened(tokens: Path, **options: Any) -> TrainData:
    return TrainData(tokens, config=tiny(), max_length=LENGTH, **options)


def batches(data: TrainData, **options: Any) -> Any:
    given: dict[str, Any] = {
        "seed": 3, "epochs": 2, "rows": 2, "accumulation": 2, "process_index": 0, "process_count": 1,
    }  # fmt: skip
    return data.batches(**{**given, **options})


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    return {name: np.asarray(getattr(batch, name)) for name in FIELDS}


def assert_same(one: Batch, other: Batch) -> None:
    for name, array in arrays(one).items():
        np.testing.assert_array_equal(array, np.asarray(getattr(other, name)), err_msg=name)


def conversations(batch: Batch) -> list[tuple[int, ...]]:
    """The text ids of each conversation of a batch, which tell which one it is."""
    found = arrays(batch)
    frames = found["frames"].reshape(-1, LENGTH, 33)
    segments = found["segments"].reshape(-1, LENGTH)
    return [
        tuple(frames[row][segments[row] == segment][:, -1].tolist())
        for row in range(len(frames))
        for segment in range(1, segments[row].max() + 1)
    ]


def test_what_an_opened_directory_tells(tokens: Path) -> None:
    data = opened(tokens)
    assert (data.codec_hash, data.tokenizer_hash) == (CODEC, TOKENIZER)
    assert data.num_examples == 60
    counts = json.loads((tokens / "manifest.json").read_text())["counts"]
    assert data.num_positions == counts["positions"]
    assert data.num_frames == counts["frames"]
    [*all_batches] = data.eval_batches(rows=4, process_index=0, process_count=1)
    assert data.num_trained_frames == sum(int(np.sum(b.trained)) for b in all_batches)


def test_every_epoch_has_every_conversation_once_in_an_order_of_its_own(tokens: Path) -> None:
    data = opened(tokens)
    [*one] = batches(data, epochs=1)
    [*two] = batches(data, epochs=2)
    found = [each for batch in one for each in conversations(batch)]
    assert len(found) == 60
    assert len(set(found)) == 60
    both = [each for batch in two for each in conversations(batch)]
    assert both[:60] == found
    assert sorted(both[60:]) == sorted(found)
    assert both[60:] != found
    # Who shares a row with whom changes as well, not only the rows' order.
    first, second = ({frozenset(row.tolist()) for row in data.epoch_rows(3, e)} for e in (0, 1))
    assert first != second
    [*other_seed] = batches(data, epochs=1, seed=4)
    assert [each for batch in other_seed for each in conversations(batch)] != found


def test_batches_have_their_full_size_and_the_last_is_filled_with_empty_rows(tokens: Path) -> None:
    data = opened(tokens)
    steps = data.steps(seed=3, epochs=2, rows_per_step=4)
    iterator = batches(data)
    found = list(iterator)
    assert len(found) == len(iterator) == steps
    for batch in found:
        assert np.shape(batch.frames) == (2, 2, LENGTH, 33)
        assert np.shape(batch.weight) == (2, 2, LENGTH)
    rows = sum(len(data.epoch_rows(3, epoch)) for epoch in range(2))
    used = sum(int((arrays(batch)["segments"].max(axis=-1) > 0).sum()) for batch in found)
    assert used == rows
    assert rows % 4  # or nothing would have been filled
    assert steps == -(-rows // 4)


def test_epochs_are_made_when_they_are_reached(tokens: Path) -> None:
    data = opened(tokens)
    iterator = batches(data, epochs=1_000_000_000)  # as many as some number of steps may take
    for one, other in zip(itertools.islice(iterator, 5), batches(opened(tokens)), strict=False):
        assert_same(one, other)
    assert iterator.state()["step"] == 5


def test_fill_is_of_the_last_batch(tokens: Path) -> None:
    iterator = batches(opened(tokens))
    for batch in itertools.islice(iterator, 3):
        assert iterator.fill == pytest.approx((arrays(batch)["segments"] > 0).mean())
    assert iterator.fill > 0.9


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_resumed_run_has_the_same_batches(tokens: Path, stop: int) -> None:
    whole = list(batches(opened(tokens)))
    first = batches(opened(tokens))
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.state()))  # whatever was prefetched meanwhile
    second = batches(opened(tokens))
    next(second)  # it need not be fresh
    second.restore(state)
    rest = list(second)
    assert len(rest) == len(whole) - stop
    for one, other in zip(whole[stop:], rest, strict=True):
        assert_same(one, other)


def test_the_state_at_the_end_is_the_end(tokens: Path) -> None:
    first = batches(opened(tokens))
    list(first)
    second = batches(opened(tokens))
    second.restore(first.state())
    assert list(second) == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"rows": 3}, "rows was 2, is 3"),
        ({"accumulation": 1}, "accumulation was 2, is 1"),
    ],
)
def test_a_state_of_other_batches_is_refused(
    tokens: Path, changed: dict[str, int], complaint: str
) -> None:
    state = batches(opened(tokens)).state()
    with pytest.raises(ValueError, match=complaint):
        batches(opened(tokens), **changed).restore(state)
    with pytest.raises(ValueError, match="is at step 99"):
        batches(opened(tokens)).restore({**state, "step": 99})
    data = TrainData(tokens, config=tiny(), max_length=LENGTH, prefix_positions=4)
    with pytest.raises(ValueError, match="prefix_positions was 0, is 4"):
        batches(data).restore(state)


def test_two_processes_make_the_global_batches_of_one(tokens: Path) -> None:
    [*alone] = batches(opened(tokens), rows=4)
    parts = [
        list(batches(opened(tokens), rows=2, process_index=i, process_count=2)) for i in range(2)
    ]
    assert len(alone) == len(parts[0]) == len(parts[1])
    for whole, first, second in zip(alone, *parts, strict=True):
        for name, array in arrays(whole).items():
            halves = [np.asarray(getattr(part, name)) for part in (first, second)]
            np.testing.assert_array_equal(array, np.concatenate(halves, axis=1))
    # So a run may go on with another number of processes.
    state = batches(opened(tokens), rows=4).state()
    batches(opened(tokens), rows=2, process_index=1, process_count=2).restore(state)


def test_evaluation_reads_all_once_in_the_order_of_the_shards(tokens: Path) -> None:
    data = opened(tokens)
    [*alone] = data.eval_batches(rows=4, process_index=0, process_count=1)
    assert all(np.shape(batch.frames) == (4, LENGTH, 33) for batch in alone)
    found = [each for batch in alone for each in conversations(batch)]
    assert sorted(found) == sorted(
        tuple(
            itertools.chain(
                *([*turn.text.tolist(), *[0] * (len(turn.codes) + 1)] for turn in e.turns)
            )
        )
        for e in data.examples(range(60))
    )
    assert (
        found[0]
        == conversations(next(iter(data.eval_batches(rows=1, process_index=0, process_count=1))))[0]
    )
    parts = [list(data.eval_batches(rows=3, process_index=i, process_count=2)) for i in range(2)]
    assert len(parts[0]) == len(parts[1])
    again = [each for pair in zip(*parts, strict=True) for b in pair for each in conversations(b)]
    assert again == found


def test_a_prefix_shortens_what_fits(tokens: Path) -> None:
    data = opened(tokens, prefix_positions=16)
    assert data.num_positions == opened(tokens).num_positions + 16 * 60
    batch = next(batches(data))
    found = arrays(batch)
    starts = (found["positions"] == 0) & (found["segments"] > 0)
    free = (found["positions"] < 16) & (found["segments"] > 0)
    assert starts.sum() == len(conversations(batch))
    assert free.sum() == 16 * starts.sum()
    assert not found["mask"][free].any()
    assert not found["trained"][free].any()


def test_a_shorter_row_drops_old_context_and_refuses_the_rest(tokens: Path) -> None:
    whole = opened(tokens)
    longest = int(np.argmax([e.positions for e in whole.examples(range(60))]))
    most = max(
        sum(t.positions for t in e.turns[[t.trained for t in e.turns].index(True) :])
        for e in whole.examples(range(60))
    )
    data = TrainData(tokens, config=tiny(), max_length=most)
    assert data.num_positions < whole.num_positions
    assert max(e.positions for e in data.examples(range(60))) == most
    [*rows] = data.eval_batches(rows=1, process_index=0, process_count=1)
    assert sum(int((arrays(batch)["segments"] > 0).sum()) for batch in rows) == data.num_positions
    [before], [after] = whole.examples([longest]), data.examples([longest])
    assert [t.trained for t in after.turns] == [t.trained for t in before.turns][
        -len(after.turns) :
    ]
    assert data.num_trained_frames == whole.num_trained_frames
    with pytest.raises(
        ValueError, match=r"conversations do not fit into \d+ positions: conversation"
    ):
        TrainData(tokens, config=tiny(), max_length=most - 1)


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def copied(tokens: Path, tmp_path: Path) -> Path:
    shutil.copytree(tokens, tmp_path / "copy")
    return tmp_path / "copy"


def test_missing_and_damaged_files(copied: Path) -> None:
    shard, index = copied / "shard-00001.array_record", copied / "shard-00001.json"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"shard-00001\.array_record has .* bytes, but manifest"):
        opened(copied)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.array_record is missing"):
        opened(copied)
    shard.write_bytes(data)
    index.write_text(index.read_text().replace('"consumed": ', '"consumed": 1'))
    with pytest.raises(ValueError, match=r"shard-00001\.json is not the file"):
        opened(copied)
    (copied / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        opened(copied)
    (copied / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="it is not finished; run the same"):
        opened(copied)
    with pytest.raises(FileNotFoundError, match="no directory"):
        opened(copied / "nothing")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_codebooks": 8}, "8 codebooks, but the model has 32"),
        ({"codebook_size": 2048}, "codes up to 2,047, but the model's end at 255"),
        (
            {"counts": {"max_text_id": 600}},
            "text ids up to 600, but the model has text_vocab_size=512",
        ),
        ({"version": 9}, "version 9; this program reads"),
    ],
)
def test_tokens_of_another_model(copied: Path, change: dict[str, Any], complaint: str) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    for name, value in change.items():
        manifest[name] = {**manifest[name], **value} if isinstance(value, dict) else value
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=complaint):
        opened(copied)


def test_numbers_out_of_range(tokens: Path) -> None:
    with pytest.raises(ValueError, match="max_seq_len"):
        TrainData(tokens, config=tiny(), max_length=4096)
    with pytest.raises(ValueError, match="prefix_positions=256 must be below"):
        opened(tokens, prefix_positions=256)
    with pytest.raises(ValueError, match="process_index=2 is not one of"):
        batches(opened(tokens), process_index=2, process_count=2)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        batches(opened(tokens), rows=0)
