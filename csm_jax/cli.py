"""The command `csm-jax`: generate, batch, eval, voices, data, train, convert, verify, doctor.

A user's mistake is one line and exit status 2. Heavy modules are imported where they are used.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from csm_jax import generate_cli
from csm_jax.cli_arguments import build_parser
from csm_jax.host_memory import keep_freed_memory
from csm_jax.interrupt import EXIT_INTERRUPTED, Interrupt
from csm_jax.watermark_key import DEFAULT_KEY

if TYPE_CHECKING:
    from csm_jax.synthesizer import Synthesizer

EXIT_OK, EXIT_NO, EXIT_ERROR = 0, 1, 2

_interrupt = Interrupt()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for no, 2 for an error, 130 for Ctrl-C,
    3 where only some rows of a corpus failed.

    Args:
        argv: The arguments; None takes the process's own, which then ends there and then on Ctrl-C.
    """
    own_process = argv is None
    _open_missing_streams()
    if own_process:
        _interrupt.install()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser(_HANDLERS, argv).parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help (0) or the mistake (2)
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR
    except (ImportError, OSError) as error:
        return _fail(error)
    if own_process and args.handler in (_generate, _batch, _eval, _train):
        keep_freed_memory()
    try:
        return args.handler(args)
    except KeyboardInterrupt:
        if own_process:
            _interrupt.stop()
        print("csm-jax: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left: no message, and none from the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if args.debug:
            raise
        return _fail(error)


def _open_missing_streams() -> None:
    """Connects standard streams that the process was started without to nothing.

    Otherwise Python has None in their place, and their numbers go to the next files opened, into
    which libraries would then write their messages.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
        setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def _fail(error: BaseException) -> int:
    print(f"csm-jax: error: {_message(error)}", file=sys.stderr)
    return EXIT_ERROR


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _message(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = f"{where}{error.strerror}"
    return text or type(error).__name__


# --- the commands ------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    return generate_cli.run(args, _interrupt)


def _batch(args: argparse.Namespace) -> int:
    from csm_jax.corpus import cli as corpus_cli

    with _interrupt.tidying():
        return corpus_cli.main(
            args, open_synthesizer=_open_synthesizer, on_progress=_interrupt.check
        )


def _eval(args: argparse.Namespace) -> int:
    from csm_jax.eval import cli as eval_cli

    with _interrupt.tidying():
        return eval_cli.main(args, open_synthesizer=_open_synthesizer, on_progress=_interrupt.check)


def _data(args: argparse.Namespace) -> int:
    from csm_jax.data import cli as data_cli

    with _interrupt.tidying():
        return data_cli.main(args, on_progress=_interrupt.check)


def _open_synthesizer(settings: Mapping[str, Any]) -> Synthesizer:
    from csm_jax import pipeline, sharding
    from csm_jax.synthesizer_settings import default_settings

    mesh = None if settings["mesh"] is None else sharding.parse_mesh(settings["mesh"])
    started = time.perf_counter()
    generator = pipeline.load_csm_1b(
        settings["model"],
        dtype=settings["dtype"],
        layout=settings["layout"],
        watermark=settings["watermark"],
        watermark_key=settings["watermark_key"],
        mesh=mesh,
    )
    _interrupt.check()
    loaded = time.perf_counter()
    _note(f"loaded {settings['model']} in {loaded - started:.1f} s; compiling")
    sizes = default_settings(generator.config, slots=settings["slots"], redraws=settings["redraws"])
    with sharding.on(mesh, sharding.current_rules()):
        synthesizer = generator.synthesizer(sizes)
    # All of it now: what does not fit into the device's memory is an error before the first row.
    synthesizer.warm_up()
    _interrupt.check()
    _note(f"compiled {synthesizer.compilations} programs in {time.perf_counter() - loaded:.1f} s")
    return synthesizer


def _train(args: argparse.Namespace) -> int:
    from csm_jax.train import cli as train_cli

    with _interrupt.writing():
        return train_cli.main(args, interrupted=lambda: _interrupt.pending)


def _voices(args: argparse.Namespace) -> int:
    from csm_jax import voices_cli

    with _interrupt.tidying():
        return voices_cli.run(args)


def _convert(args: argparse.Namespace) -> int:
    from csm_jax.weights.cli import convert

    with _interrupt.tidying():
        convert(args, on_progress=_interrupt.check)
    return EXIT_OK


def _verify(args: argparse.Namespace) -> int:
    from csm_jax import hub, pipeline
    from csm_jax.audio import read_audio

    audio, rate = read_audio(args.file, mono="mean")
    watermarker: Any = pipeline.load_watermarker(lambda: hub.locate_watermark(args.model))
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
    return EXIT_NO if any(finding.missing for finding in findings) else EXIT_OK


_HANDLERS = {
    "generate": _generate,
    "batch": _batch,
    "eval": _eval,
    "data": _data,
    "voices": _voices,
    "train": _train,
    "convert": _convert,
    "verify": _verify,
    "doctor": _doctor,
}
