"""The benchmarks run, at sizes at which their figures mean nothing but their counts do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine, slot_use, voices


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_slot_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--slots", "8", "--requests", "40", "--chunks", "2", "8", "--host-slots", "4"]
    slot_use.main([*words, "--json", str(tmp_path / "out.json")])
    result = last_line(capsys)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    ways = result["ways"]
    assert ways["chunks of 2"]["slot_use"] > ways["chunks of 8, look-ahead"]["slot_use"]
    assert result["host_us_per_chunk"]["median"] > 0


@pytest.mark.slow
def test_engine(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "tiny", "--slots", "2", "--requests", "5", "--static-batches", "2"]
    engine.main([*words, "--median-seconds", "0.9", "--longest-seconds", "1.2"])
    result = last_line(capsys)
    assert 0.5 < result["slot_use"] <= 1
    assert result["recompilations"] == 0
    assert set(result["rates"]) == {"end to end", "codes", "codec", "watermark", "FLAC files"}
    # transformers runs hundreds of small torch calls for a frame; ours runs one program for all slots.
    assert result["codes_over"]["transformers float32, static batches, codes"] > 3
    # Two batches of 2 and one of 1: only full ones are run, and a part of one counts no more.
    assert result["static_batches"] == 2


@pytest.mark.slow
def test_engine_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "tiny", "--slots", "2", "--requests", "3", "--reference", "none"]
    engine.main([*words, "--median-seconds", "0.8", "--longest-seconds", "0.8"])
    result = last_line(capsys)
    assert list(result["static_rates"]) == ["static batches, codes"]
    assert result["audio_s"] == pytest.approx(3 * 0.8)


@pytest.mark.slow
def test_voices(capsys: pytest.CaptureFixture[str]) -> None:
    voices.main(["--size", "tiny", "--slots", "2", "--steps", "34"])
    result = last_line(capsys)
    every, shared = result["ways"].values()
    assert every["audio_s"] == shared["audio_s"] == pytest.approx(2 * 34 * 0.08)
    # Rows of 1 and of 62 frames came first, so that one ended at once and its slot took the voice's first
    # request. The voice is read once: one prefill more, and prompts shorter by its text and its 125 frames.
    assert (every["prefills"], shared["prefills"]) == (1, 2)
    assert every["positions"] - shared["positions"] > 126


def test_forced_lengths_are_what_is_asked_for() -> None:
    requests = engine.make_requests(200, median=2.0, longest=8.0, seed=0)
    frames = [request.max_frames for request in requests]
    assert min(frames) >= 10  # 0.8 s
    assert max(frames) <= 100
    assert engine.audio_s(requests) == pytest.approx(sum(frames) * 0.08)
    assert 2.0 < engine.audio_s(requests) / 200 < 2.8
