"""The arguments of `csm-jax eval`; parsing them needs the standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path

from csm_jax.corpus.arguments import SETTING_ARGUMENTS
from csm_jax.watermark_key import DEFAULT_KEY, key_argument

DESCRIPTION = """\
Measures what a model says: a recogniser writes down its speech, which is compared with the text; and how
often it ends by itself, repeats itself or falls silent, how fast it speaks and how fast it is made.
"""
EXAMPLES = """\
exit status: 0 done, 2 error, 3 done but some rows failed, 130 interrupted

examples:
  csm-jax eval test.jsonl --model ./csm-1b -o results
  csm-jax eval test.jsonl --model demo -o results --vocabulary sentences.txt
  csm-jax eval results/rows.jsonl -o strict --vocabulary sentences.txt --language-model unigram
  csm-jax eval results/rows.jsonl -o whisper --recogniser faster-whisper --recogniser-model DIR
  csm-jax eval results/rows.jsonl -o control --shuffle-text

a row of the manifest (JSON Lines, as for csm-jax batch; only text must be there):
  {"id": "a1", "text": "Hello.", "speaker": 0, "seed": 1, "audio_filepath": "a1.wav"}

DIR then holds eval.json, report.html, rows.jsonl (the same rows, with their recordings) and audio/.
docs/evaluation.md says what each figure means.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `csm-jax eval` to a parser."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "manifest", type=Path, metavar="MANIFEST", help=".jsonl, .json or seed-tts's .lst"
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="where the results go"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of rows without one, of the confidence intervals and of --shuffle-text (default: 0)",
    )
    _add_speaking(parser.add_argument_group("what speaks"))
    _add_hearing(parser.add_argument_group("what hears"))
    marks = parser.add_argument_group("the watermark")
    marks.add_argument(
        "--no-watermark", action="store_true", help="leave it out, and do not look for it"
    )
    marks.add_argument(
        "--watermark-from",
        metavar="SOURCE",
        help="look for it in recordings, with the networks of this model",
    )
    marks.add_argument(
        "--watermark-key",
        type=key_argument,
        default=DEFAULT_KEY,
        metavar="B,B,B,B,B",
        help="five numbers of your own (default: Sesame's public key)",
    )


def speaking_options() -> list[argparse.Action]:
    """Returns the options of what speaks."""
    return _add_speaking(argparse.ArgumentParser().add_argument_group())


def speaking_options_of(args: argparse.Namespace) -> list[str]:
    """Returns the names of those that differ from their defaults, as they are written."""
    return [
        option.option_strings[0]
        for option in speaking_options()
        if getattr(args, option.dest) != option.default
    ]


def _add_speaking(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """Returns the options that are added."""
    add = group.add_argument
    options = [
        add(
            "--model",
            metavar="SOURCE",
            help="a model directory, a checkpoint file, a hub id, or demo; without it, the rows name "
            "recordings",
        ),
        add("--layout", help="the checkpoint's layout, where its names cannot tell"),
        add("--dtype", choices=("float32", "bfloat16"), help="of the computation"),
        add(
            "--slots",
            type=int,
            default=32,
            metavar="N",
            help="rows at a time (default: %(default)s)",
        ),
        add(
            "--redraws",
            type=int,
            default=0,
            metavar="N",
            help="draw rows that run away again, so often at most (default: 0)",
        ),
        add("--voices", type=Path, metavar="DIR", help="the voice library"),
        add("--mesh", metavar="AXES", help="devices to use, such as data=4,tensor=2"),
    ]
    for name, kind, default, told in SETTING_ARGUMENTS:
        shown = "" if default is None else f" (default: {default})"
        told = f"{told}{shown}; rows may say"
        options.append(add(name, type=kind, default=default, metavar="X", help=told))
    return [
        *options,
        add(
            "--against",
            metavar="SOURCE",
            help="speak the rows with this model too, with the same seeds, and compare the codes",
        ),
        add(
            "--against-dtype",
            choices=("float32", "bfloat16"),
            help="of that model's computation",
        ),
    ]


def _add_hearing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recogniser",
        default="pocketsphinx",
        choices=("pocketsphinx", "faster-whisper", "transformers", "none"),
        help="default: %(default)s, which brings its English model",
    )
    group.add_argument(
        "--recogniser-model",
        type=Path,
        metavar="DIR",
        help="the model of faster-whisper or transformers; nothing is fetched",
    )
    group.add_argument(
        "--vocabulary",
        type=Path,
        metavar="FILE",
        help="sentences, one a line, or a .jsonl manifest: pocketsphinx then hears their words alone",
    )
    group.add_argument(
        "--language-model",
        choices=("bigram", "unigram"),
        default="bigram",
        help="of --vocabulary. bigram: words follow each other as in its sentences (lenient); "
        "unigram: anyhow, all equally likely (strict) (default: %(default)s)",
    )
    group.add_argument(
        "--pronunciations",
        type=Path,
        metavar="FILE",
        help="of words that pocketsphinx's dictionary lacks, in CMUdict's form",
    )
    group.add_argument(
        "--language", default="en", metavar="CODE", help="of the texts (default: %(default)s)"
    )
    group.add_argument(
        "--shuffle-text",
        action="store_true",
        help="negative control: compare each recording with another sentence's text",
    )
