"""The converter from the command line."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from csm_jax.cli import main
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
    assert "%" not in there.stderr  # no bar off a terminal
    assert str(tmp_path / "d" / "model.safetensors") in there.stdout
    back = call(tmp_path / "d", tmp_path / "e", "--to", "sesame", "--dtype", "bfloat16")
    assert back.returncode == 0, back.stderr
    assert "codec" not in back.stderr
    expected = {name: array.astype(BFLOAT16) for name, array in tensors.items()}
    assert_same_bits(tensors_of(tmp_path / "e"), expected)
    again = call(tmp_path / "d", tmp_path / "e", "--to", "sesame")
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {tmp_path / 'e'} already holds")
    assert "--overwrite" in again.stderr
    assert again.stderr.count("\n") == 1
    assert "Traceback" not in again.stderr
    assert call(tmp_path / "none", tmp_path / "f", "--to", "sesame").returncode == 2


def test_a_terminal_gets_a_bar_once_work_starts(tmp_path):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    write_sesame(tmp_path / "s", small())

    def on_terminal(*arguments: object) -> str:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        try:
            subprocess.run(command(*arguments), stderr=theirs, cwd=ROOT, check=False)
        finally:
            os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # how the end of a terminal reads
            while piece := os.read(ours, 1 << 16):
                said += piece
        os.close(ours)
        return said.decode()

    assert "100%" in on_terminal(tmp_path / "s", tmp_path / "d", "--to", "csm-hf")
    again = on_terminal(tmp_path / "s", tmp_path / "d", "--to", "csm-hf")
    assert again.startswith("error: ")


def test_csm_jax_convert_speaks_as_csm_jax(tmp_path, capsys):
    write_sesame(tmp_path / "s", small())
    words = ["convert", str(tmp_path / "s"), str(tmp_path / "d"), "--to", "csm-hf"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert str(tmp_path / "d" / "model.safetensors") in captured.out
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"csm-jax: error: {tmp_path / 'd'} already holds")
    assert "--overwrite" in captured.err
    with pytest.raises(FileExistsError):
        main([*words, "--debug"])


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
