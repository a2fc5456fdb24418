"""The examples run as a user runs them, against a model directory with random weights."""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from csm_jax.audio import read_audio

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example in this process, which has imported and compiled what they share."""

    def run(name: str, *words: str) -> str:
        script = str(ROOT / "examples" / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with contextlib.suppress(SystemExit):
            runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


SHORT = ("--max-audio-length-ms", "320")


def test_say(run: Callable[..., str], random_model: Path, tmp_path: Path) -> None:
    run("say.py", "Hello.", "--model", str(random_model), *SHORT)
    audio, rate = read_audio(tmp_path / "say.wav")
    assert (len(audio), rate) == (4 * 1920, 24_000)
    assert audio.std() > 1e-3


def test_dialogue(run: Callable[..., str], random_model: Path, tmp_path: Path) -> None:
    out = run("dialogue.py", "--model", str(random_model), *SHORT)
    assert out.count("(0.32 s)") == 4
    assert len(read_audio(tmp_path / "dialogue.wav")[0]) == 4 * 4 * 1920


def test_stream(run: Callable[..., str], random_model: Path, tmp_path: Path) -> None:
    words = ("--chunk-frames", "2", "--max-audio-length-ms", "320")
    out = run("stream.py", "Hello.", "--model", str(random_model), *words)
    assert "first audio after" in out
    assert len(read_audio(tmp_path / "stream.wav")[0]) == 4 * 1920


def test_shard(run: Callable[..., str], random_model: Path) -> None:
    out = run("shard.py", "--model", str(random_model), "--tensor", "2", *SHORT)
    assert "mesh: {'data': 4, 'tensor': 2}" in out
    assert "(64, 128) on each device" in out  # q_proj is [128, 128]
    assert out.count("0.32 s") == 4


def test_research(run: Callable[..., str], tmp_path: Path) -> None:
    words = ("--rule", "mlp=none", "--rule", "decoder_mlp=none", "--trace", str(tmp_path / "trace"))
    out = run("research.py", *words)
    before, after = out.split("with {'mlp': None, 'decoder_mlp': None}")
    assert "(text_vocab, embed) as P('tensor', None)" in before
    assert "(mlp, embed) as P('tensor', None)" in before
    assert "(mlp, embed) as P(None, None)" in after
    # 2 layers of attention and MLP, and 31 steps of 2 decoder layers' MLPs; then attention alone.
    assert "all-reduce: 132 in a chunk of 2 frames, 66 per frame" in before
    assert "all-reduce: 4 in a chunk of 2 frames, 2 per frame" in after
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_train_step(run: Callable[..., str]) -> None:
    out = run("train_step.py", "--mesh", "data=2,fsdp=4", "--steps", "3")
    assert "q_proj: float32[128,128@fsdp]" in out
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0] - 1


def test_demo(run: Callable[..., str], tmp_path: Path) -> None:
    out = run("demo.py", "--out", str(tmp_path / "out"))
    assert out.count("$ csm-jax generate --model demo") == 2
    assert out.count("real-time factor") == 2
    assert out.count("  heard  ") == 5
    # What it says of itself is understood.
    assert "voice" in out.split("heard")[1].splitlines()[0]
    for name in ("sentence.wav", "dialogue.wav", "turn-04.wav"):
        audio, rate = read_audio(tmp_path / "out" / name)
        assert len(audio) > rate // 2
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_about_sharding_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 7
    exec("\n".join(blocks), {})
    out = capsys.readouterr().out
    assert "float32[512@tensor,128]" in out
    assert "{'all-gather': 3, 'all-reduce': 132}" in out
    assert "codebook_scan" in out
    assert "ShardingTypeError" in out


def test_the_page_about_training_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "research-training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})
    frames, *steps, flops = capsys.readouterr().out.splitlines()
    assert frames == "30"
    losses = [float(step.split()[1]) for step in steps]
    assert losses[2] < losses[1] < losses[0] - 1
    assert flops.startswith("7.65")
