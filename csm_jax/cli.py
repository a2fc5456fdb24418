"""The command line: `csm-jax generate | convert | verify | doctor`.

Parsing needs the standard library only, so `--help` is instant. A user's mistake is one line, exit 2.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax import __version__
from csm_jax.config import FRAME_MS
from csm_jax.interrupt import Interrupt
from csm_jax.watermark_key import DEFAULT_KEY, parse_key

if TYPE_CHECKING:
    import numpy as np

    from csm_jax.pipeline import Generator
    from csm_jax.prompt import Segment

EXIT_OK, EXIT_NO, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

_DEFAULT_MODEL = "sesame/csm-1b"

_GENERATE_EXAMPLES = """\
examples:
  csm-jax generate "Hello from Sesame." -o hello.wav
  echo "Read from a pipe." | csm-jax generate - --speaker 1 --model ./csm-1b
  csm-jax generate "And then?" --speaker 1 \\
      --context first.wav "What somebody said before." 0 \\
      --context second.wav "What the other replied." 1
  csm-jax generate --dialogue talk.jsonl --turns-dir turns -o talk.flac

a dialogue file has one turn per line, spoken in order, each with all earlier ones as context:
  {"speaker": 0, "text": "Hey, how are you doing?"}
  {"speaker": 1, "text": "Pretty good, pretty good."}
"""

_VERIFY_EXAMPLES = """\
exit status: 0 the file carries the key, 1 it does not, 2 it could not be checked

examples:
  csm-jax verify hello.wav && echo "made by a machine"
  csm-jax verify mine.wav --watermark-key 1,2,3,4,5
"""


_interrupt = Interrupt()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for a user's error, 130 for Ctrl-C.

    Args:
        argv: The arguments; None takes the process's own, which then ends here on Ctrl-C.
    """
    own_process = argv is None
    if own_process:
        signal.signal(signal.SIGINT, _interrupt)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser(argv).parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help (0) or the mistake (2)
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR
    except (ImportError, OSError) as error:
        return _fail(error)
    try:
        return args.handler(args)
    except KeyboardInterrupt:
        print("csm-jax: interrupted", file=sys.stderr)
        if own_process:
            # Not through the interpreter's shutdown: it takes apart the runtime under a computation
            # that is still running on another thread, which crashes now and then.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left: no message, and none from the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if args.debug:
            raise
        return _fail(error)


def _fail(error: BaseException) -> int:
    print(f"csm-jax: error: {_message(error)}", file=sys.stderr)
    return EXIT_ERROR


def _message(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return text or type(error).__name__


# --- arguments ---------------------------------------------------------------------------------


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Returns the parser of all commands.

    Args:
        argv: The arguments to come: `convert` brings its own, and the code that knows them is
            loaded only for it.
    """
    parser = argparse.ArgumentParser(
        prog="csm-jax",
        description="Speech from text with Sesame's Conversational Speech Model, on JAX.",
        epilog="`csm-jax COMMAND --help` shows the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"csm-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, handler: Any, help: str, **options: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        sub.set_defaults(handler=handler)
        sub.add_argument("--debug", action="store_true", help="show the full traceback of an error")
        return sub

    _add_generate(
        command("generate", _generate, "speak a text or a dialogue", epilog=_GENERATE_EXAMPLES)
    )
    convert = command("convert", _convert, "convert a checkpoint from one layout to another")
    if next((word for word in argv if not word.startswith("-")), None) == "convert":
        from csm_jax.weights.cli import add_arguments

        add_arguments(convert)
    _add_verify(
        command(
            "verify", _verify, "tell whether a file carries a watermark", epilog=_VERIFY_EXAMPLES
        )
    )
    doctor = command(
        "doctor",
        _doctor,
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
        help="a directory holding everything, a checkpoint file, or a hub id (default: %(default)s)",
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to say")
    what.add_argument(
        "text", nargs="?", metavar="TEXT", help="the text; '-', or nothing, reads it from a pipe"
    )
    what.add_argument(
        "--speaker", type=_natural, default=None, metavar="N", help="who says TEXT (default: 0)"
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

    how = parser.add_argument_group("how to say it")
    how.add_argument("--seed", type=_natural, default=0, metavar="N", help="default: %(default)s")
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
        default=90_000,
        metavar="MS",
        help="longest audio of a turn (default: 90000)",
    )

    model = parser.add_argument_group("the model")
    _add_model(model)
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation (default: bfloat16 on an accelerator, float32 on a CPU)",
    )
    model.add_argument("--layout", help="the checkpoint's layout, where its names cannot tell")

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
        type=_key,
        default=DEFAULT_KEY,
        metavar="B,B,B,B,B",
        help="five numbers in 0..255 of your own (default: Sesame's public key)",
    )


def _natural(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, got {text!r}")
    return value


def _key(text: str) -> tuple[int, ...]:
    try:
        return parse_key(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# --- generate ----------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    turns = _turns(args)
    if args.turns_dir is not None and args.dialogue is None:
        raise ValueError("--turns-dir goes with --dialogue")

    # Everything that can be wrong with the files is found before the model is loaded.
    from csm_jax.audio import check_writable, write_audio

    outputs = [args.output]
    if args.turns_dir is not None:
        args.turns_dir.mkdir(parents=True, exist_ok=True)
        outputs += [
            args.turns_dir / f"turn-{i + 1:02d}{args.output.suffix}" for i in range(len(turns))
        ]
    for path in outputs:
        check_writable(path)
    context = [_context(*words) for words in args.context]

    import numpy as np

    from csm_jax import pipeline
    from csm_jax.prompt import Segment

    _check(args, turns)
    started = time.perf_counter()
    generator = pipeline.load_csm_1b(
        args.model,
        dtype=args.dtype,
        layout=args.layout,
        watermark=not args.no_watermark,
        watermark_key=args.watermark_key,
    )
    _note(f"loaded {args.model} in {time.perf_counter() - started:.1f} s")

    started = time.perf_counter()
    audios: list[np.ndarray] = []
    for i, (speaker, text) in enumerate(turns):
        label = f"turn {i + 1}/{len(turns)}" if len(turns) > 1 else "speaking"
        audio = _speak(generator, args, label, speaker, text, context, seed=args.seed + i)
        if len(audio):
            context = [
                *context,
                Segment(speaker=speaker, text=text, audio=audio, sample_rate=generator.sample_rate),
            ]
        else:
            _note(f"{label}: the model ended at once, without audio; another --seed may speak")
        audios.append(audio)
        if args.turns_dir is not None:
            write_audio(outputs[i + 1], audio, generator.sample_rate)
    elapsed = time.perf_counter() - started

    _interrupt.check()
    write_audio(args.output, np.concatenate(audios), generator.sample_rate)
    seconds = sum(map(len, audios)) / generator.sample_rate
    mark = "not watermarked" if args.no_watermark else "watermarked"
    print(f"{args.output}: {seconds:.2f} s of audio, {mark}; {_speed(seconds, elapsed)}")
    return EXIT_OK


def _check(args: argparse.Namespace, turns: list[tuple[int, str]]) -> None:
    # Again done by the generator, but only after minutes of loading.
    from csm_jax.batch import Request
    from csm_jax.prompt import check_text
    from csm_jax.sampling import request_keys, sampling_params

    for _, text in turns:
        check_text(text, "the text")
    for _, transcript, _ in args.context:
        check_text(transcript, "a context's transcript")
    request_keys([args.seed + i for i in range(len(turns))])
    _ = Request(text="", speaker=0, max_audio_length_ms=args.max_audio_length_ms).max_frames
    for temperature, top_k in (
        (args.temperature, args.topk),
        (args.decoder_temperature, args.decoder_topk),
    ):
        sampling_params(
            temperature=[args.temperature if temperature is None else temperature],
            top_k=[args.topk if top_k is None else top_k],
            top_p=[args.top_p],
            min_p=[args.min_p],
        )


def _speak(
    generator: Generator,
    args: argparse.Namespace,
    label: str,
    speaker: int,
    text: str,
    context: list[Segment],
    *,
    seed: int,
) -> np.ndarray:
    from tqdm import tqdm

    # No total: a turn ends when the model says so, nearly always long before its limit.
    with tqdm(
        desc=label,
        unit="frame",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        bar_format="{desc}: {n_fmt} frames in {elapsed}{postfix}",
    ) as bar:
        started = time.perf_counter()

        def on_progress(done: int, most: int) -> None:
            _interrupt.check()
            elapsed = time.perf_counter() - started
            bar.set_postfix_str(_speed(done * FRAME_MS / 1000, elapsed), refresh=False)
            bar.update(done - bar.n)

        return generator.generate(
            text,
            speaker,
            context,
            args.max_audio_length_ms,
            args.temperature,
            args.topk,
            top_p=args.top_p,
            min_p=args.min_p,
            decoder_temperature=args.decoder_temperature,
            decoder_topk=args.decoder_topk,
            seed=seed,
            truncate_context=args.truncate_context,
            on_progress=on_progress,
        )


def _speed(audio_s: float, elapsed_s: float) -> str:
    # The real-time factor is computing time over audio time: below 1 is faster than speech.
    frames = audio_s * 1000 / FRAME_MS
    factor = f"{elapsed_s / audio_s:.2f}" if audio_s else "none"
    return f"{frames / max(elapsed_s, 1e-9):.1f} frames/s, real-time factor {factor}"


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _turns(args: argparse.Namespace) -> list[tuple[int, str]]:
    if args.dialogue is not None:
        if args.text is not None or args.speaker is not None:
            raise ValueError("give either TEXT (with --speaker) or --dialogue, not both")
        from csm_jax.dialogue import read_dialogue

        return read_dialogue(args.dialogue)
    text = args.text
    if text is None and sys.stdin.isatty():
        raise ValueError("nothing to say: give TEXT, a pipe, or --dialogue FILE.jsonl")
    if text is None or text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError("the text is empty")
    return [(args.speaker or 0, text)]


def _context(path: str, transcript: str, speaker: str) -> Segment:
    from csm_jax.audio import read_audio
    from csm_jax.prompt import Segment

    try:
        number = _natural(speaker)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--context {path}: the speaker {error}") from error
    audio, rate = read_audio(path)
    return Segment(speaker=number, text=transcript, audio=audio, sample_rate=rate)


# --- the other commands ------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    from csm_jax.weights.cli import run

    return run(args)


def _verify(args: argparse.Namespace) -> int:
    from csm_jax import hub
    from csm_jax.audio import read_audio
    from csm_jax.bridge.watermark import TorchWatermarker

    audio, rate = read_audio(args.file, mono="mean")
    watermarker = TorchWatermarker.from_dir(hub.locate_watermark(args.model))
    if watermarker.verify(audio, rate, args.watermark_key):
        whose = "Sesame's public key" if args.watermark_key == DEFAULT_KEY else "the given key"
        print(f"{args.file}: watermarked with {whose}")
        return EXIT_OK
    # Short audio without a mark reads as some key now and then: only an expected one is proof.
    other = ",".join(map(str, watermarker.detect(audio, rate) or ()))
    hint = f"not this key, but it reads like {other} (--watermark-key {other} to confirm)"
    print(f"{args.file}: {hint if other else 'no watermark found'}")
    return EXIT_NO


def _doctor(args: argparse.Namespace) -> int:
    from csm_jax import doctor

    findings = doctor.examine(args.model)
    print(doctor.report(findings))
    return EXIT_OK if all(finding.ok for finding in findings) else EXIT_NO
