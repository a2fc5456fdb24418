"""Exports read back by what they are for, and the report."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from csm_jax.corpus.export import FORMS, export
from csm_jax.corpus.plan import Plan
from csm_jax.corpus.report import draw, read_facts, write_report
from tests.support.corpus import FakeSynthesizer, plan_of, some_rows, speak


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rows: list[Any] = [*some_rows(30), {"id": "a.b/c", "text": "Dots and bars.", "speaker": 5}]
    rows.append({"id": "x", "text": "fail"})
    made = plan_of(rows, tmp_path, shard_minutes=0.2)
    speak(made)
    return made


def spoken(plan: Plan) -> dict[str, Any]:
    rows = [row for shard in plan.shards for row in plan.read_rows(shard) if row["id"] != "x"]
    return {row["id"]: FakeSynthesizer().speak(0, row) for row in rows}


def same_audio(flac: bytes, audio: np.ndarray) -> bool:
    read, rate = soundfile.read(io.BytesIO(flac), dtype="float32")
    return rate == 24_000 and read.shape == audio.shape and np.abs(read - audio).max() < 2e-5


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def test_webdataset(plan: Plan, tmp_path: Path) -> None:
    assert export(plan, "webdataset", tmp_path / "out") == 31
    tars = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in tars] == [f"train-{i:06d}.tar" for i in range(len(tars))]
    expected = spoken(plan)
    samples: dict[str, dict[str, bytes]] = {}
    for path in tars:
        for name, data in read_tar(path).items():
            key, ending = name.split(".", 1)  # as WebDataset splits names
            samples.setdefault(key, {})[ending] = data
    assert len(samples) == 31
    for sample in samples.values():
        told = json.loads(sample["json"])
        result = expected.pop(told["id"])
        assert same_audio(sample["flac"], result.audio)
        assert np.array_equal(np.load(io.BytesIO(sample["codes.npy"])), result.codes)
    assert not expected


def test_parquet_is_read_by_datasets(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    assert export(plan, "parquet", tmp_path / "out") == 31
    files = sorted(map(str, (tmp_path / "out" / "data").iterdir()))
    assert files[0].endswith(f"train-00000-of-{len(files):05d}.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["audio"] == datasets.Audio(sampling_rate=24_000)
    expected = spoken(plan)
    for row in loaded.cast_column("audio", datasets.Audio(decode=False)):
        result = expected.pop(row["id"])
        assert same_audio(row["audio"]["bytes"], result.audio)
        assert np.array_equal(row["codes"], result.codes)
        assert row["duration"] == len(result.audio) / 24_000
        assert row["flags"] == list(result.flags)
        assert json.loads(row["synthesis"])["seed"] == row["seed"]
    assert not expected


def test_nemo(plan: Plan, tmp_path: Path) -> None:
    assert export(plan, "nemo", tmp_path / "out") == 31
    expected = spoken(plan)
    for line in (tmp_path / "out" / "manifest.json").read_text().splitlines():
        entry = json.loads(line)
        result = expected.pop(entry["id"])
        assert same_audio((tmp_path / "out" / entry["audio_filepath"]).read_bytes(), result.audio)
        assert entry["duration"] == len(result.audio) / 24_000
        assert entry["text"]
        assert isinstance(entry["speaker"], int)
    assert not expected
    assert len(list((tmp_path / "out" / "audio").rglob("*.flac"))) == 31


def test_lhotse_shar_by_its_layout(plan: Plan, tmp_path: Path) -> None:
    # The library needs torch to be imported at all; where it is installed, the next test reads with it.
    assert export(plan, "lhotse", tmp_path / "out") == 31
    expected = spoken(plan)
    out = tmp_path / "out"
    for number, path in enumerate(sorted(out.glob("cuts.*"))):
        cuts = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        recordings = list(read_tar(out / f"recording.{number:06d}.tar").items())
        codes = list(read_tar(out / f"codes.{number:06d}.tar").items())
        for i, cut in enumerate(cuts):
            result = expected.pop(cut["custom"]["synthesis"]["id"])
            (name, flac), (meta_name, meta) = recordings[2 * i : 2 * i + 2]
            assert (name, meta_name) == (f"{cut['id']}.flac", f"{cut['id']}.json")
            assert same_audio(flac, result.audio)
            assert json.loads(meta)["num_samples"] == len(result.audio)
            (name, data), (_, meta) = codes[2 * i : 2 * i + 2]
            assert name == f"{cut['id']}.npy"
            assert np.array_equal(np.load(io.BytesIO(data)), result.codes)
            assert json.loads(meta)["shape"] == list(result.codes.shape)
    assert not expected


@pytest.mark.filterwarnings("default")  # the library leaves the files it reads open
def test_lhotse_shar_by_the_library(plan: Plan, tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    export(plan, "lhotse", tmp_path / "out")
    expected = spoken(plan)
    for cut in lhotse.CutSet.from_shar(in_dir=tmp_path / "out"):
        result = expected.pop(cut.custom["synthesis"]["id"])
        assert np.abs(cut.load_audio()[0] - result.audio).max() < 2e-5
        assert np.array_equal(cut.load_codes(), result.codes)
    assert not expected


@pytest.mark.parametrize("form", FORMS)
def test_an_unfinished_or_damaged_corpus_is_not_exported(
    plan: Plan, tmp_path: Path, form: str
) -> None:
    shard = plan.shards[1]
    path = plan.shard_dir / f"{shard.name}.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        export(plan, form, tmp_path / "out")
    (plan.shard_dir / f"{shard.name}.json").unlink()
    with pytest.raises(ValueError, match=r"1 of \d+ shards are not there yet, such as shard-00001"):
        export(plan, form, tmp_path / "out")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["corpus", "manifest.jsonl"]
    assert export(plan, form, tmp_path / "out", partial=True) == 31 - shard.rows
    with pytest.raises(FileExistsError, match="is there already"):
        export(plan, form, tmp_path / "out")


@pytest.mark.parametrize(("form", "package"), [("parquet", "pyarrow")])
def test_a_missing_library_is_named_with_its_command(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        export(plan, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the report --------------------------------------------------------------------------------


def test_the_report_holds_its_plots_and_no_link(plan: Plan, tmp_path: Path) -> None:
    write_report(plan.directory, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 4
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert "it would not" in text
    assert "<td>row-003</td>" in text


def test_the_report_counts_what_there_is(plan: Plan) -> None:
    facts = read_facts(plan.directory)
    assert sorted(facts.seconds) == sorted(len(r.audio) / 24_000 for r in spoken(plan).values())
    assert facts.reasons == {"eos": 31}
    assert facts.flags == {"silence": 3}
    assert facts.flagged == len(facts.flagged_rows) == 3
    assert (facts.failed, facts.errors) == (1, {"it would not": 1})
    assert len(facts.shards) == len(plan.shards)
    busy = sum(shard["busy_s"] for shard in facts.shards)
    first = min(shard["started"] for shard in facts.shards)
    assert 0 < busy <= max(shard["finished"] for shard in facts.shards) - first + 1e-6


def test_the_report_escapes_what_rows_say(tmp_path: Path) -> None:
    plan = plan_of([{"id": "<script>", "text": "flag"}, {"text": "Hm."}], tmp_path)
    speak(plan)
    write_report(plan.directory, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


def test_a_report_of_failures_alone(tmp_path: Path) -> None:
    plan = plan_of([{"text": "fail"}], tmp_path)
    speak(plan)
    assert len(draw(read_facts(plan.directory))) == 4


def test_a_report_needs_commits_and_matplotlib(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no committed shard"):
        write_report(tmp_path, tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        write_report(plan.directory, tmp_path / "report.html")
    (plan.shard_dir / "shard-00000.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        write_report(plan.directory, tmp_path / "report.html")
