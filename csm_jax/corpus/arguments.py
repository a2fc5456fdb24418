"""The arguments of `csm-jax batch`; parsing them needs the standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csm_jax.watermark_key import DEFAULT_KEY, key_argument

DESCRIPTION = """\
A corpus from a manifest: planned, spoken in shards that are committed one by one, verified, exported.
Whatever stops it, the same command goes on where it was, and loses or repeats no row.
"""
EXAMPLES = """\
exit status: 0 all rows are spoken, 1 something is missing or damaged, 2 error, 3 some rows failed (they
are listed in rejected.jsonl and shards/*.errors.jsonl), 130 interrupted

examples:
  csm-jax batch rows.jsonl --out corpus --model ./csm-1b          plan, run and verify in one go
  csm-jax batch plan rows.jsonl --out corpus --model ./csm-1b     step by step
  csm-jax batch run corpus
  csm-jax batch verify corpus
  csm-jax batch export corpus hf --to parquet
  sbatch --array=0-31 --wrap 'csm-jax batch run corpus --executor task'

a row of the manifest (JSON Lines with NeMo's keys; only text must be there):
  {"id": "a1", "text": "Hello.", "speaker": 0, "voice": "ann", "seed": 1, "temperature": 0.8}
  {"text": "Hello.", "context_audio_filepath": "ann.wav", "context_audio_text": "Her words."}
or seed-tts's meta.lst: utt|prompt_text|prompt_wav|infer_text
"""

SETTING_ARGUMENTS = (
    ("--temperature", float, 0.9, "0 is greedy"),
    ("--topk", int, 50, "codes kept per draw; 0: all"),
    ("--top-p", float, 1.0, "probability mass kept"),
    ("--min-p", float, 0.0, "drop codes this much less likely than the likeliest"),
    ("--decoder-temperature", float, None, "for codebooks 1 to 31 (default: --temperature)"),
    ("--decoder-topk", int, None, "for codebooks 1 to 31 (default: --topk)"),
    ("--max-audio-length-ms", float, None, "longest audio of a row (default: by its text)"),
)


"""Option, type, default and meaning of what rows may say themselves."""


class _Actions(argparse._SubParsersAction):
    """Subcommands, of which `make` needs no name: `csm-jax batch MANIFEST --out DIR`."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._known = self.choices
        self.choices = None  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        words = list(values or ())
        if words and words[0] not in (self._known or ()):
            words.insert(0, "make")
        super().__call__(parser, namespace, words, option_string)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `csm-jax batch` to a parser, which should keep the format of its epilog."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    actions = parser.add_subparsers(
        dest="action", metavar="MANIFEST | ACTION", required=True, action=_Actions
    )

    def action(name: str, help: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        # The command takes it as well; without a default here, what was given there stays.
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        return sub

    make = action("make", "plan, run and verify in one go; the default where a manifest is given")
    plan = action("plan", "decide what is spoken, in which shards")
    run = action("run", "speak the shards that are not committed yet")
    for sub in (make, plan):
        _add_plan(sub)
    run.add_argument("directory", type=Path, metavar="DIR", help="a planned corpus")
    run.add_argument("--model", help="where the model is here (default: as planned)")
    run.add_argument("--voices", type=Path, metavar="DIR", help="likewise of the voice library")
    for sub in (make, run):
        _add_run(sub)
    _add_key(make)
    _add_key(plan)
    _add_key(run)

    verify = action("verify", "read everything again and tell what is missing, extra or damaged")
    status = action("status", "tell how far a corpus is, from its commits")
    export = action("export", "write the corpus in a form that training code reads")
    report = action("report", "write one HTML file that tells how the run went")
    for sub in (verify, status, export, report):
        sub.add_argument("directory", type=Path, metavar="DIR", help="a corpus")
    export.add_argument("destination", type=Path, metavar="OUT", help="a directory to make")
    export.add_argument("--to", required=True, choices=("webdataset", "parquet", "nemo", "lhotse"))
    export.add_argument(
        "--partial", action="store_true", help="export what is there of an unfinished corpus"
    )
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: report.html in DIR"
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help=".jsonl, .json or .lst")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the corpus")
    parser.add_argument(
        "--strict", action="store_true", help="stop if any row of the manifest is bad"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the corpus (default: %(default)s)")
    parser.add_argument(
        "--shard-minutes",
        type=float,
        default=60.0,
        metavar="X",
        help="most audio per shard, at least half of it (default: 60)",
    )
    parser.add_argument(
        "--model",
        default="sesame/csm-1b",
        metavar="SOURCE",
        help="a model directory, a checkpoint file, a hub id, or demo (default: %(default)s)",
    )
    parser.add_argument("--layout", help="the checkpoint's layout, where its names cannot tell")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument(
        "--slots", type=int, default=64, metavar="N", help="rows at a time (default: 64)"
    )
    parser.add_argument(
        "--redraws",
        type=int,
        default=0,
        metavar="N",
        help="draw rows that run away again, so often at most (default: 0)",
    )
    parser.add_argument("--voices", type=Path, metavar="DIR", help="the voice library")
    parser.add_argument(
        "--no-watermark", action="store_true", help="leave out the inaudible mark (see README)"
    )
    for name, kind, default, told in SETTING_ARGUMENTS:
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(
            name, type=kind, default=default, metavar="X", help=f"{told}{shown}; rows may say"
        )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor",
        choices=("local", "task"),
        default="local",
        help="local: all shards; task: those of $SLURM_ARRAY_TASK_ID or $JOB_COMPLETION_INDEX",
    )
    parser.add_argument("--tasks", type=int, metavar="N", help="how many tasks there are")
    parser.add_argument("--mesh", metavar="AXES", help="devices to use, such as data=4,tensor=2")
    parser.add_argument(
        "--shards-in-flight",
        type=int,
        default=2,
        metavar="N",
        help="most shards begun and not committed (default: 2; more with many slots)",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="speak shards again in which rows failed"
    )


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--watermark-key",
        type=key_argument,
        default=DEFAULT_KEY,
        metavar="B,B,B,B,B",
        help="five numbers of your own; not kept, so say it again to run (default: Sesame's public key)",
    )
