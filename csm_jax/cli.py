"""The command line: `csm-jax generate | convert | verify | doctor`.

A user's mistake is one line and exit status 2. Heavy modules are imported where they are used.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.cli_arguments import build_parser, natural
from csm_jax.config import FRAME_MS
from csm_jax.interrupt import EXIT_INTERRUPTED, Interrupt
from csm_jax.watermark_key import DEFAULT_KEY

if TYPE_CHECKING:
    import numpy as np

    from csm_jax.pipeline import Generator
    from csm_jax.prompt import Segment

EXIT_OK, EXIT_NO, EXIT_ERROR = 0, 1, 2

_interrupt = Interrupt()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for no, 2 for an error, 130 for Ctrl-C.

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


def _message(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = f"{where}{error.strerror}"
    return text or type(error).__name__


# --- generate ----------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    turns = _turns(args)
    outputs = _outputs(args, len(turns))

    # Everything that can be wrong is found before the model is loaded.
    import numpy as np

    from csm_jax import pipeline
    from csm_jax.audio import check_writable, write_audio
    from csm_jax.prompt import Segment

    context = [_context(*words) for words in args.context]
    _check(args, turns)
    with _interrupt.writing():
        if args.turns_dir is not None:
            args.turns_dir.mkdir(parents=True, exist_ok=True)
        for path in outputs:
            check_writable(path)

    started = time.perf_counter()
    generator = pipeline.load_csm_1b(
        args.model,
        dtype=args.dtype,
        layout=args.layout,
        codec=args.codec,
        watermark=False if args.no_watermark else args.codec,
        watermark_key=args.watermark_key,
    )
    _interrupt.check()
    _note(f"loaded {args.model} in {time.perf_counter() - started:.1f} s")

    started = time.perf_counter()
    audios: list[np.ndarray] = []
    for i, (speaker, text) in enumerate(turns):
        label = f"turn {i + 1}/{len(turns)}" if len(turns) > 1 else "speaking"
        with _dropped_turns_told():
            audio = _speak(generator, args, label, speaker, text, context, seed=args.seed + i)
        _interrupt.check()
        if len(audio):
            context = [
                *context,
                Segment(speaker=speaker, text=text, audio=audio, sample_rate=generator.sample_rate),
            ]
            audios.append(audio)
            if args.turns_dir is not None:
                with _interrupt.writing():
                    write_audio(outputs[i + 1], audio, generator.sample_rate)
        elif len(turns) > 1:
            kept = f"; {outputs[i + 1]} is not written" if args.turns_dir is not None else ""
            _note(
                f"{label}: the model ended at once, without audio; another --seed may speak{kept}"
            )
    elapsed = time.perf_counter() - started

    _interrupt.check()
    if not audios:
        _note(
            f"csm-jax: no audio: the model ended at once; {args.output} is not written, and another "
            "--seed may speak"
        )
        return EXIT_NO
    with _interrupt.writing():
        write_audio(args.output, np.concatenate(audios), generator.sample_rate)
    seconds = sum(map(len, audios)) / generator.sample_rate
    mark = "not watermarked" if args.no_watermark else "watermarked"
    print(f"{args.output}: {seconds:.2f} s of audio, {mark}; {_speed(seconds, elapsed)}")
    return EXIT_OK


def _outputs(args: argparse.Namespace, count: int) -> list[Path]:
    """Returns the files to write, that of the whole and then, with --turns-dir, those of the turns."""
    if args.turns_dir is None:
        return [args.output]
    if args.dialogue is None:
        raise ValueError("--turns-dir goes with --dialogue")
    if args.turns_dir.exists() and not args.turns_dir.is_dir():
        raise ValueError(f"--turns-dir {args.turns_dir} is not a directory")
    turns = [args.turns_dir / f"turn-{i + 1:02d}{args.output.suffix}" for i in range(count)]
    whole = os.path.realpath(args.output)
    if any(os.path.realpath(turn) == whole for turn in turns):
        raise ValueError(
            f"-o {args.output} is also the file of a turn in --turns-dir {args.turns_dir}; "
            "choose another name"
        )
    return [args.output, *turns]


def _check(args: argparse.Namespace, turns: list[tuple[int, str]]) -> None:
    # Again done by the generator, but only after minutes of loading.
    from csm_jax import hub
    from csm_jax.config import read_config
    from csm_jax.prompt import check_max_frames, check_text
    from csm_jax.request import Request, row_settings

    for _, text in turns:
        check_text(text, "the text")
    for _, transcript, _ in args.context:
        check_text(transcript, "a context's transcript")
    requests = [
        Request(
            text="",
            speaker=0,
            max_audio_length_ms=args.max_audio_length_ms,
            temperature=args.temperature,
            topk=args.topk,
            top_p=args.top_p,
            min_p=args.min_p,
            decoder_temperature=args.decoder_temperature,
            decoder_topk=args.decoder_topk,
            seed=seed,
        )
        for seed in (args.seed, args.seed + len(turns) - 1)
    ]
    row_settings(requests)
    file = hub.locate_config(args.model)
    if file is not None:
        check_max_frames(requests[0].max_frames, config=read_config(file))


@contextlib.contextmanager
def _dropped_turns_told() -> Iterator[None]:
    """Shows what `csm_jax.prompt` logs: that --truncate-context has left turns out."""
    from tqdm import tqdm

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(record.getMessage(), file=sys.stderr)

    logger, notes = logging.getLogger("csm_jax.prompt"), Notes()
    level = logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)


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
    if text is None or text == "-":
        try:
            piped = b"" if sys.stdin.isatty() and text is None else sys.stdin.buffer.read()
            text = piped.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 text: {error}") from error
        if not text:
            raise ValueError("nothing to say: give TEXT, a pipe, or --dialogue FILE.jsonl")
    if not text.strip():
        raise ValueError("the text is empty")
    return [(args.speaker or 0, text)]


def _context(path: str, transcript: str, speaker: str) -> Segment:
    from csm_jax.audio import read_audio
    from csm_jax.prompt import Segment

    try:
        number = natural(speaker)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--context {path}: the speaker {error}") from error
    audio, rate = read_audio(path)
    return Segment(speaker=number, text=transcript, audio=audio, sample_rate=rate)


# --- the other commands ------------------------------------------------------------------------


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


_HANDLERS = {"generate": _generate, "convert": _convert, "verify": _verify, "doctor": _doctor}
