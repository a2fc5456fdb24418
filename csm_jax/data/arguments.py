"""The arguments of `csm-jax data`; parsing them needs the standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Recordings and their texts, made ready for training: checked, then tokenised into shards that
`csm-jax train` reads. Whatever stops it, the same command goes on where it was.
"""
EXAMPLES = """\
exit status: 0 done, 1 something is wrong with the data, 2 error, 130 interrupted

examples:
  csm-jax data import --from ljspeech LJSpeech-1.1 -o ljspeech.jsonl
  csm-jax data check talks.jsonl --model ./csm-1b
  csm-jax data tokenize talks.jsonl -o tokens --model ./csm-1b
  csm-jax data tokenize ZH-B0000*.tar -o tokens --skip-bad
  csm-jax data inspect tokens
  csm-jax data export tokens talks.parquet --to parquet

a line of the data (JSON Lines, one conversation each; audio is wav, flac, mp3, ogg, ...):
  {"messages": [{"role": "speaker_0", "content": [{"type": "text", "text": "How are you?"},
                                                  {"type": "audio", "url": "a.wav"}]},
                {"role": "speaker_1", "content": [{"type": "text", "text": "Fine."},
                                                  {"type": "audio", "url": "b.wav"}]}],
   "training_mask": [false, true]}
"""

FORMS = ("sesame-finetune", "csm-mlx", "transformers", "ljspeech", "webdataset")
"""What `import` reads (`csm_jax.data.importers.FORMS` has the readers)."""
MAX_LENGTH = 2048
"""Positions of a row unless given: what CSM-1B holds."""
SHARD_MINUTES = 60.0
"""Audio of a shard unless given: what a stop can cost."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `csm-jax data` to a parser, which should keep the format of its epilog."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        # The command takes it as well; without a default here, what was given there stays.
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        return sub

    check = action("check", "list every line that cannot be used, and count the others")
    tokenize = action("tokenize", "encode texts and audio into shards")
    inspect = action("inspect", "tell what a directory of shards holds")
    importing = action("import", "turn data of another form into lines of JSON")
    export = action("export", "write shards in a form that other programs read")

    for sub in (check, tokenize):
        sub.add_argument(
            "source",
            type=Path,
            nargs="+",
            metavar="FILE",
            help=".jsonl, .parquet, or .tar (several)",
        )
        sub.add_argument(
            "--model",
            metavar="SOURCE",
            default="sesame/csm-1b",
            help="whose tokenizer and codec: a model directory or a hub id (default: %(default)s)",
        )
        _add_max_length(sub)
        _add_defaults(sub, "who speaks where a tar does not say (other files always do)")
    tokenize.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="the shards' directory"
    )
    tokenize.add_argument("--split", metavar="NAME", help="only lines of this split")
    tokenize.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad lines out and list them in rejected.jsonl",
    )
    tokenize.add_argument(
        "--shard-minutes",
        type=float,
        default=SHARD_MINUTES,
        metavar="X",
        help="audio per shard: what is done again after a stop (default: %(default)g)",
    )

    inspect.add_argument("directory", type=Path, metavar="DIR", help="what tokenize wrote")
    inspect.add_argument("--index", type=int, metavar="N", help="show one conversation, from 0")
    inspect.add_argument(
        "--verify", action="store_true", help="read every shard and compare hashes"
    )
    _add_max_length(inspect)

    importing.add_argument("--from", dest="form", required=True, choices=FORMS)
    importing.add_argument(
        "source", type=Path, nargs="+", metavar="SOURCE", help="files; of ljspeech a folder"
    )
    importing.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    importing.add_argument(
        "--number-speakers",
        action="store_true",
        help="of webdataset: number speakers who have names, and list them in FILE.speakers.json",
    )
    _add_defaults(importing, "who speaks where the source does not say")

    export.add_argument("directory", type=Path, metavar="DIR", help="what tokenize wrote")
    export.add_argument("output", type=Path, metavar="FILE.parquet")
    export.add_argument("--to", required=True, choices=("parquet",))


def _add_max_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-length",
        "--max_length",
        type=int,
        default=MAX_LENGTH,
        metavar="N",
        help="positions of a row: text tokens and frames of 80 ms (default: %(default)s)",
    )


def _add_defaults(parser: argparse.ArgumentParser, speaker: str) -> None:
    parser.add_argument("--speaker", type=_speaker, metavar="N", help=speaker)
    parser.add_argument("--lang", metavar="CODE", help="language where the source does not say")


def _speaker(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, got {text!r}")
    return int(text)
