"""The converter's command line: `python convert_weights.py` and `csm-jax convert` share it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from csm_jax.weights.tables import CODEC_NAME, FLOAT_DTYPES, LAYOUTS, get_layout

if TYPE_CHECKING:
    from tqdm import tqdm

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
"""The shell's code for a process ended by Ctrl-C (128 + SIGINT)."""

DESCRIPTION = "Convert a CSM checkpoint between layouts and dtypes, tensor by tensor."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the converter's arguments to a parser."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="directory with config.json, *.safetensors, index *.json, ckpt.pt, or orbax directory",
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to write")
    parser.add_argument(
        "--from",
        dest="from_layout",
        choices=tuple(LAYOUTS),
        help="layout of SRC (default: told by its tensors' names; say csm-hf or csm-mlx yourself)",
    )
    parser.add_argument(
        "--to", dest="to_layout", choices=tuple(LAYOUTS), required=True, help="layout of DST"
    )
    parser.add_argument(
        "--dtype", choices=FLOAT_DTYPES, help="dtype of every model tensor (default: as in SRC)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in DST")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code of one conversion: 0, 2 for bad input (said on stderr), 130 for Ctrl-C.

    Args:
        args: Parsed by a parser that `add_arguments` was given.
    """
    try:
        convert(args)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: no unfinished checkpoint is left behind\n")
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    return 0


def convert(args: argparse.Namespace, on_progress: Callable[[], None] = lambda: None) -> None:
    """Runs one conversion, with a progress bar on a terminal, and lists the files written on stdout.

    Args:
        args: As for `run`.
        on_progress: Called after every piece; may raise to stop.

    Raises:
        ValueError, OSError: Bad input, or a destination that cannot be written.
    """
    # Imported here so that --help does not wait for them, nor Ctrl-C shows a traceback.
    from csm_jax.weights.convert import convert_checkpoint

    with contextlib.closing(_Bar()) as bar:

        def progress(count: int, total: int) -> None:
            bar.update(count, total)
            on_progress()

        files = convert_checkpoint(
            args.source,
            args.destination,
            from_layout=args.from_layout,
            to_layout=args.to_layout,
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=progress,
        )
    sys.stdout.write("".join(f"{file}\n" for file in files))
    if get_layout(args.to_layout).set_aside and not _has_codec(files):
        sys.stderr.write(
            "note: the export holds no codec (no codec_model.* tensors in SRC, no "
            f"{CODEC_NAME} beside it); transformers will start with a random one\n"
        )


class _Bar:
    """A progress bar that appears with the first bytes, and only on a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def update(self, count: int, total: int) -> None:
        """Takes `count` more bytes of `total`."""
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                desc="convert",
                total=total,
                unit="B",
                unit_scale=True,
                unit_divisor=1000,
                disable=not sys.stderr.isatty(),
            )
        self._bar.update(count)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _has_codec(files: list[Path]) -> bool:
    from csm_jax.weights.safetensors_io import read_header

    prefix = LAYOUTS["transformers"].set_aside or ""
    return any(
        name.startswith(prefix)
        for file in files
        if file.suffix == ".safetensors"
        for name in read_header(file).entries
    )
