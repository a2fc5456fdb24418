"""The arguments of `csm-jax`; parsing them needs the standard library only, so `--help` is instant."""

from __future__ import annotations

import argparse
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from csm_jax import __version__
from csm_jax.watermark_key import DEFAULT_KEY, key_argument

_DEFAULT_MODEL = "sesame/csm-1b"

_GENERATE_EXAMPLES = """\
exit status: 0 spoken, 1 the model ended at once and nothing was written,
2 error, 130 interrupted

examples:
  csm-jax generate "Hello from Sesame." -o hello.wav
  echo "Read from a pipe." | csm-jax generate - --speaker 1 --model ./csm-1b
  csm-jax generate "Good morning." --voice anna
  csm-jax generate -o chapter.flac < chapter.txt
  csm-jax generate "And then?" --speaker 1 \\
      --context first.wav "What somebody said before." 0 \\
      --context second.wav "What the other replied." 1
  csm-jax generate --dialogue talk.jsonl --turns-dir turns -o talk.flac

Numbers, signs and abbreviations are written as they are said before they are
spoken. A text of more than 240 characters, about 16 s, is spoken in pieces: cut
at paragraphs and sentences, with pauses between them, each hearing the last two.

a dialogue file has one turn per line, spoken in order, each with all earlier
ones as context:
  {"speaker": 0, "text": "Hey, how are you doing?"}
  {"speaker": 1, "text": "Pretty good, pretty good."}
"""

_VERIFY_EXAMPLES = """\
exit status: 0 the file carries the key, 1 it does not, 2 it could not be checked

examples:
  csm-jax verify hello.wav && echo "made by a machine"
  csm-jax verify mine.wav --watermark-key 1,2,3,4,5
"""

Handler = Callable[[argparse.Namespace], int]


def build_parser(
    handlers: Mapping[str, Handler], argv: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Returns the parser of all commands.

    Args:
        handlers: By command, what its arguments' `handler` is to be.
        argv: The arguments to come: some commands bring their own, and the code that knows them is
            loaded only for them.
    """
    parser = argparse.ArgumentParser(
        prog="csm-jax",
        description="Speech from text with Sesame's Conversational Speech Model, on JAX.",
        epilog="`csm-jax COMMAND --help` shows the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"csm-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help: str, **options: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        sub.set_defaults(handler=handlers[name])
        sub.add_argument("--debug", action="store_true", help="show the full traceback of an error")
        return sub

    _add_generate(command("generate", "speak a text or a dialogue", epilog=_GENERATE_EXAMPLES))
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, help, add_arguments in (
        ("batch", "speak a corpus from a manifest", _add_batch),
        ("eval", "measure how well a model speaks", _add_eval),
        ("data", "make recordings ready for training", _add_data),
        ("voices", "keep voices by name", _add_voices),
        ("train", "fine-tune a model", _add_train),
        ("convert", "convert a checkpoint from one layout to another", _add_convert),
    ):
        sub = command(name, help)
        if wanted == name:
            add_arguments(sub)
    _add_verify(
        command("verify", "tell whether a file carries a watermark", epilog=_VERIFY_EXAMPLES)
    )
    doctor = command(
        "doctor",
        "show devices, versions, and what is found and missing",
        epilog="Downloads nothing. Exit status: 0 everything is there, 1 something is missing.",
    )
    _add_model(doctor)
    return parser


def _add_model(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--model",
        metavar="SOURCE",
        default=_DEFAULT_MODEL,
        help="a directory holding everything, a checkpoint file, a hub id, or demo (default: %(default)s)",
    )


def _add_batch(parser: argparse.ArgumentParser) -> None:
    from csm_jax.corpus.arguments import add_arguments

    add_arguments(parser)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from csm_jax.eval.arguments import add_arguments

    add_arguments(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    from csm_jax.train.arguments import add_arguments

    add_arguments(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    from csm_jax.data.arguments import add_arguments

    add_arguments(parser)


def _add_voices(parser: argparse.ArgumentParser) -> None:
    from csm_jax.voices_cli import add_arguments

    add_arguments(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from csm_jax.weights.cli import add_arguments

    add_arguments(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to say")
    what.add_argument(
        "text", nargs="?", metavar="TEXT", help="the text; '-', or nothing, reads it from a pipe"
    )
    what.add_argument(
        "--speaker",
        type=natural,
        default=None,
        metavar="N",
        help="who says TEXT (default: the speaker of --voice, or 0)",
    )
    what.add_argument(
        "--dialogue", type=Path, metavar="FILE.jsonl", help="say several turns instead of TEXT"
    )
    what.add_argument(
        "--context",
        nargs=3,
        action="append",
        default=[],
        metavar=("AUDIO", "TRANSCRIPT", "SPEAKER"),
        help="an earlier turn, which also sets the speaker's voice; may be repeated, oldest first",
    )
    what.add_argument(
        "--truncate-context",
        action="store_true",
        help="drop the oldest turns when they do not fit, instead of stopping",
    )

    what.add_argument(
        "--language",
        default="en",
        metavar="CODE",
        help="of the text, whose numbers are written as words (default: en)",
    )
    what.add_argument(
        "--no-normalise",
        action="store_true",
        help="leave numbers, signs and abbreviations as they are",
    )
    what.add_argument(
        "--no-split",
        action="store_true",
        help="speak a long text in one go, not in pieces",
    )

    how = parser.add_argument_group("how to say it")
    how.add_argument(
        "--voice",
        metavar="NAME_OR_FILE",
        help="a voice of the library (csm-jax voices), or the one in a .safetensors file, such as "
        "trained vectors",
    )
    how.add_argument("--voices-dir", type=Path, metavar="DIR", help="where the voices are kept")
    how.add_argument("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")
    how.add_argument(
        "--temperature", type=float, default=0.9, metavar="X", help="0 is greedy (default: 0.9)"
    )
    how.add_argument(
        "--topk",
        type=int,
        default=50,
        metavar="N",
        help="codes kept per draw; 0: all (default: 50)",
    )
    how.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="probability mass kept (default: 1)"
    )
    how.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="X",
        help="drop codes this much less likely than the likeliest (default: 0)",
    )
    how.add_argument(
        "--decoder-temperature",
        type=float,
        metavar="X",
        help="for codebooks 1 to 31 (default: --temperature)",
    )
    how.add_argument(
        "--decoder-topk", type=int, metavar="N", help="for codebooks 1 to 31 (default: --topk)"
    )
    how.add_argument(
        "--max-audio-length-ms",
        type=float,
        metavar="MS",
        help="longest audio of a text or piece (default: what a slow speaker needs for it, and "
        "90000 at most)",
    )
    how.add_argument(
        "--redraws",
        type=natural,
        default=1,
        metavar="N",
        help="speak what runs away or ends at once again, with another seed, so often at most "
        "(default: %(default)s)",
    )

    model = parser.add_argument_group("the model")
    _add_model(model)
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation (default: bfloat16 on an accelerator, float32 on a CPU)",
    )
    model.add_argument(
        "--codec",
        choices=("jax", "torch"),
        default="jax",
        help="what runs Mimi and the watermark: jax, or torch through the bridge to PyTorch, which "
        "needs torch and moshi (default: %(default)s)",
    )
    model.add_argument("--layout", help="the checkpoint's layout, where its names cannot tell")
    model.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices to split the model over, such as tensor=2 or data=4,tensor=2",
    )

    out = parser.add_argument_group("the result")
    out.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.wav"),
        metavar="FILE",
        help=".wav or .flac (default: %(default)s)",
    )
    out.add_argument(
        "--turns-dir", type=Path, metavar="DIR", help="also write each turn of --dialogue, there"
    )
    marks = out.add_mutually_exclusive_group()
    marks.add_argument(
        "--no-watermark", action="store_true", help="leave out the inaudible mark (see README)"
    )
    _add_key(marks)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a sound file")
    _add_key(parser)
    _add_model(parser)


def _add_key(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--watermark-key",
        type=key_argument,
        default=DEFAULT_KEY,
        metavar="B,B,B,B,B",
        help="five numbers in 0..255 of your own (default: Sesame's public key)",
    )


def natural(text: str) -> int:
    """Returns a whole number of 0 or more.

    Raises:
        argparse.ArgumentTypeError: It is not one.
    """
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of 0 or more, got {reprlib.repr(text)}"
        )
    return value
