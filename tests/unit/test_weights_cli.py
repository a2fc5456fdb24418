"""The converter from the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.checkpoints import BFLOAT16, assert_same_bits, small, tensors_of, write_sesame

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "convert_weights.py"), *map(str, arguments)]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_command_line(tmp_path):
    tensors = write_sesame(tmp_path / "s", small())
    there = call(tmp_path / "s", tmp_path / "d", "--to", "transformers", "--from", "sesame")
    assert there.returncode == 0, there.stderr
    assert "the export holds no codec" in there.stderr
    assert "100%" in there.stderr
    assert str(tmp_path / "d" / "model.safetensors") in there.stdout
    back = call(tmp_path / "d", tmp_path / "e", "--to", "sesame", "--dtype", "bfloat16")
    assert back.returncode == 0, back.stderr
    assert "codec" not in back.stderr
    expected = {name: array.astype(BFLOAT16) for name, array in tensors.items()}
    assert_same_bits(tensors_of(tmp_path / "e"), expected)
    again = call(tmp_path / "d", tmp_path / "e", "--to", "sesame")
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'e'} already holds")
    assert "Traceback" not in again.stderr
    assert call(tmp_path / "none", tmp_path / "f", "--to", "sesame").returncode == 2


def test_ctrl_c_says_one_line(tmp_path):
    write_sesame(tmp_path / "s", small())
    # The run is held at its first progress report, so that the signal meets it at work.
    script = (
        "import argparse, sys, time\n"
        "from csm_jax.weights import cli, convert\n"
        "original = convert.convert_checkpoint\n"
        "def slow(*args, progress, **options):\n"
        "    def hold(count, total):\n"
        "        print('working', flush=True)\n"
        "        time.sleep(60)\n"
        "    return original(*args, progress=hold, **options)\n"
        "convert.convert_checkpoint = slow\n"
        "parser = argparse.ArgumentParser()\n"
        "cli.add_arguments(parser)\n"
        f"sys.exit(cli.run(parser.parse_args([{str(tmp_path / 's')!r}, {str(tmp_path / 'd')!r}, "
        "'--to', 'csm-hf'])))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["s"]


def test_help_is_quick_and_needs_no_jax():
    start = time.monotonic()
    result = call("--help")
    assert time.monotonic() - start < 5  # about 0.5 s on an idle machine
    assert "--from" in result.stdout
    code = "import sys; from csm_jax.weights import cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
