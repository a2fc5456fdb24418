"""Other forms of data, in and out."""

from __future__ import annotations

import csv
import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from csm_jax.data.arguments import FORMS as NAMES
from csm_jax.data.conversations import as_conversation
from csm_jax.data.importers import FORMS, Options, lines_of
from csm_jax.data.parquet import codec_of, export, read_rows, read_table
from csm_jax.data.shards import Shards
from tests.support.data import CODEC, some_lines, tokenize, write_clip, write_lines


def imported(form: str, source: Path, **options: Any) -> list[dict[str, Any]]:
    found = list(
        lines_of(form, [source], Options(target=options.pop("target", source.parent), **options))
    )
    for line in found:
        as_conversation(line, source.parent)  # every line is of the schema
    return found


def turns(line: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [
        (
            m["role"],
            m["content"][0]["text"],
            {k: v for k, v in m["content"][1].items() if k != "type"},
        )
        for m in line["messages"]
    ]


def test_the_command_line_knows_every_form() -> None:
    assert set(NAMES) == set(FORMS)


ROWS = [
    {"path": "a.wav", "text": "One."},
    {"path": "b.wav", "text": "Two.", "start": 1.5, "end": 2.5, "speaker": 30},
]
WANTED = [
    [("speaker_999", "One.", {"url": "a.wav"})],
    [("speaker_30", "Two.", {"url": "b.wav", "start": 1.5, "end": 2.5})],
]


def write_table(path: Path) -> Path:
    columns = ["path", "text", "start", "end", "speaker"]
    values = [[row.get(name) for name in columns] for row in ROWS]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [columns, *(["" if v is None else v for v in r] for r in values)]
            )
    elif path.suffix == ".sql":
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(f"CREATE TABLE data ({', '.join(columns)})")
            database.executemany("INSERT INTO data VALUES (?, ?, ?, ?, ?)", values)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = {name: [row[i] for row in values] for i, name in enumerate(columns)}
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    elif path.suffix == ".jsonl":
        write_lines(path, ROWS)
    elif path.name == "columns.json":  # as pandas writes them
        table = {
            name: {str(i): row[j] for i, row in enumerate(values)} for j, name in enumerate(columns)
        }
        path.write_text(json.dumps(table))
    else:
        path.write_text(json.dumps(ROWS))
    return path


@pytest.mark.parametrize(
    "name", ["x.json", "columns.json", "x.jsonl", "x.csv", "x.sql", "x.parquet"]
)
def test_sesame_finetune(tmp_path: Path, name: str) -> None:
    found = imported("sesame-finetune", write_table(tmp_path / name))
    assert [turns(line) for line in found] == WANTED
    [first, _] = imported("sesame-finetune", tmp_path / name, speaker=3, lang="en")
    assert (first["messages"][0]["role"], first["lang"]) == ("speaker_3", "en")


def test_csm_mlx(tmp_path: Path) -> None:
    one = {"text": "One.", "audio_path": "a.wav", "speaker_id": 2}
    two = {"text": "Two.", "audio_path": "/clips/b.wav"}
    (tmp_path / "x.json").write_text(json.dumps([one, [one, two]]))
    first = ("speaker_2", "One.", {"url": "a.wav"})
    assert [turns(line) for line in imported("csm-mlx", tmp_path / "x.json")] == [
        [first],
        [first, ("speaker_0", "Two.", {"url": "/clips/b.wav"})],
    ]


@pytest.mark.parametrize("key", ["path", "url", "audio"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_transformers(tmp_path: Path, key: str, wrapped: bool) -> None:
    chat = [
        {
            "role": str(i),
            "content": [{"type": "text", "text": text}, {"type": "audio", key: f"{text}.wav"}],
        }
        for i, text in enumerate("ab")
    ]
    given: Any = {"messages": chat} if wrapped else chat
    (tmp_path / "x.json").write_text(json.dumps([given]))
    write_lines(tmp_path / "x.jsonl", [given])
    wanted = [[("speaker_0", "a", {"url": "a.wav"}), ("speaker_1", "b", {"url": "b.wav"})]]
    for name in ("x.json", "x.jsonl"):
        assert [turns(line) for line in imported("transformers", tmp_path / name)] == wanted


def test_ljspeech(tmp_path: Path) -> None:
    folder = tmp_path / "LJ"
    (folder / "wavs").mkdir(parents=True)
    (folder / "metadata.csv").write_text(
        'LJ001-0001|In 1456, "Dr." Fust|In fourteen fifty-six, "Doctor" Fust\nLJ001-0002|Plain\n\n',
        encoding="utf-8",
    )
    found = imported("ljspeech", folder, target=tmp_path, speaker=4)
    assert [line["id"] for line in found] == ["LJ001-0001", "LJ001-0002"]
    assert [turns(line) for line in found] == [
        [("speaker_4", 'In fourteen fifty-six, "Doctor" Fust', {"url": "LJ/wavs/LJ001-0001.wav"})],
        [("speaker_4", "Plain", {"url": "LJ/wavs/LJ001-0002.wav"})],
    ]


def test_a_row_that_csv_cannot_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('path,text\na.wav,One.\nb.wav,"' + "never closed " * 20_000)
    with pytest.raises(ValueError, match=r"x\.csv: row 2 cannot be read: field larger than"):
        imported("sesame-finetune", path)


def test_webdataset_numbers_speakers_by_name(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.flac", 5)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, speaker in enumerate(["ann", "bob", "ann", "7"]):
            (tmp_path / "x.json").write_text(
                json.dumps({"text": f"t{i}", "speaker": speaker, "language": "zh"})
            )
            tar.add(tmp_path / "x.json", f"k{i}.json")
            tar.add(clip, f"k{i}.flac")
    names: dict[str, int] = {}
    found = imported("webdataset", tmp_path / "x.tar", speakers=names)
    assert [turns(line) for line in found] == [
        [(f"speaker_{number}", f"t{i}", {"url": f"x.tar#k{i}.flac"})]
        for i, number in enumerate([0, 1, 0, 7])
    ]
    assert names == {"ann": 0, "bob": 1}
    assert {line["lang"] for line in found} == {"zh"}
    # The lines are read like any other.
    path = write_lines(tmp_path / "x.jsonl", found)
    assert tokenize(path, tmp_path / "out")["counts"]["frames"] == 20


@pytest.mark.parametrize(
    ("form", "name", "content", "complaint"),
    [
        ("sesame-finetune", "x.pkl", "", "a pickle can run anything"),
        ("sesame-finetune", "x.json", "{", "is not JSON"),
        ("sesame-finetune", "x.json", '[{"text": "a"}]', "row 1 has no path"),
        (
            "sesame-finetune",
            "x.json",
            '[{"text": "a", "path": "b", "start": "x"}]',
            "start must be seconds",
        ),
        (
            "sesame-finetune",
            "x.json",
            '[{"text": "a", "path": "b", "speaker": 1.5}]',
            "whole number",
        ),
        ("sesame-finetune", "x.sql", "no database", "is no SQLite file"),
        ("csm-mlx", "x.json", '{"a": 1}', "must hold a JSON list"),
        ("csm-mlx", "x.json", '["a"]', "entry 1 must be an object"),
        ("csm-mlx", "x.json", "[[]]", "entry 1 has no messages"),
        ("transformers", "x.json", '[{"a": 1}]', "entry 1 must be a chat"),
        ("transformers", "x.json", '[[{"role": "assistant"}]]', "must have a role such as"),
        ("transformers", "x.jsonl", "\n{", "line 2 is not JSON"),
        ("ljspeech", "x.csv", "", "is not a folder"),
        ("webdataset", "x.tar", "no tar", "cannot be read as a tar"),
    ],
)
def test_what_is_not_of_its_form(
    tmp_path: Path, form: str, name: str, content: str, complaint: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        imported(form, tmp_path / name)


# --- Parquet -----------------------------------------------------------------------------------


def test_parquet_out_and_in_gives_the_same_conversations(tmp_path: Path) -> None:
    manifest = tokenize(some_lines(tmp_path, 20), tmp_path / "out")
    assert export(tmp_path / "out", tmp_path / "x.parquet") == 20
    assert codec_of(tmp_path / "x.parquet") == CODEC
    again = tokenize(
        tmp_path / "x.parquet", tmp_path / "again", codec=object()
    )  # nothing to encode
    for name in ("frames", "trained_frames", "positions", "langs", "conversations"):
        assert again["counts"][name] == manifest["counts"][name]
    one, other = Shards(tmp_path / "out"), Shards(tmp_path / "again")
    for before, after in zip(
        one.read(range(20), facts=True), other.read(range(20), facts=True), strict=True
    ):
        assert before.facts == after.facts
        for a, b in zip(before.turns, after.turns, strict=True):
            assert a.text.tolist() == b.text.tolist()
            assert a.codes.tolist() == b.codes.tolist()
            assert (a.trained, a.weight) == (b.trained, b.weight)


def test_parquet_of_other_programs(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    flat, nested = [1, 2] * 32, [[1] * 32, [2] * 32]
    for name, codes in (("flat", flat), ("nested", nested)):
        table = pyarrow.table({"texts": [["a"], ["b", "c"]], "codes": [[codes], [codes]]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        first, second = read_rows(tmp_path / f"{name}.parquet")
        assert isinstance(first, dict)
        assert first["messages"][0]["role"] == "speaker_0"
        assert len(first["messages"][0]["content"][1]["codes"]) == 2
        assert "must be of one length, got 2, 1" in str(second)
    with pytest.raises(ValueError, match="has no column texts and no codes"):
        list(read_rows(write_table(tmp_path / "x.parquet")))
    (tmp_path / "y.parquet").write_text("no")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        list(read_table(tmp_path / "y.parquet"))


def test_export_writes_a_whole_file_or_none(tmp_path: Path) -> None:
    tokenize(some_lines(tmp_path, 3), tmp_path / "out")

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out", tmp_path / "x.parquet", stop)
    assert not list(tmp_path.glob("*x.parquet*"))
    for target, complaint in (
        (tmp_path / "x.csv", r"must end in \.parquet"),
        (tmp_path / "no" / "x.parquet", "there is no directory"),
    ):
        with pytest.raises((ValueError, OSError), match=complaint):
            export(tmp_path / "out", target)
