"""`csm-jax generate`: a text, a long text or a dialogue, spoken into files."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.cli_arguments import natural
from csm_jax.config import FRAME_MS
from csm_jax.interrupt import Interrupt

if TYPE_CHECKING:
    import numpy as np

    from csm_jax.config import CSMConfig
    from csm_jax.long_text import SpokenChunk
    from csm_jax.pipeline import Generator
    from csm_jax.prompt import Segment
    from csm_jax.text import Chunk
    from csm_jax.voices import Voice

EXIT_OK, EXIT_NO = 0, 1

_SHOWN = 300  # characters of a text in a note


def run(args: argparse.Namespace, interrupt: Interrupt) -> int:
    """Returns the exit status: 0, or 1 if nothing was said.

    Args:
        args: Parsed by the parser of `csm_jax.cli_arguments`.
        interrupt: Ctrl-C.

    Raises:
        ValueError, TypeError, OSError, ImportError, RuntimeError: What cannot go on, and why.
    """
    # Everything that can be wrong is found before the model is loaded.
    voice = _voice(args)
    said = _said(args, voice)
    outputs = _outputs(args, len(said))

    from csm_jax import pipeline, sharding
    from csm_jax.audio import check_writable, write_audio
    from csm_jax.long_text import join_chunks

    context = [_context(*words) for words in args.context]
    turns = _turns(args, said, _check(args, len(said)))
    mesh = None if args.mesh is None else sharding.parse_mesh(args.mesh)
    with interrupt.writing():
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
        mesh=mesh,
    )
    interrupt.check()
    _note(f"loaded {args.model} in {time.perf_counter() - started:.1f} s")

    started = time.perf_counter()
    audios: list[np.ndarray] = []
    speech = _Speech(generator, args, voice, context, interrupt)
    for i, turn in enumerate(turns):
        label = f"turn {i + 1}/{len(turns)}" if len(turns) > 1 else "speaking"
        with sharding.on(mesh, sharding.current_rules()), _notes_told():
            audio = join_chunks(speech.say(label, turn, seed=args.seed + i))
        interrupt.check()
        if len(audio):
            audios.append(audio)
            if args.turns_dir is not None:
                with interrupt.writing():
                    write_audio(outputs[i + 1], audio, generator.sample_rate)
        elif len(turns) > 1:
            kept = f"; {outputs[i + 1]} is not written" if args.turns_dir is not None else ""
            _note(
                f"{label}: the model ended at once, without audio; another --seed may speak{kept}"
            )
    elapsed = time.perf_counter() - started

    interrupt.check()
    if not audios:
        _note(
            f"csm-jax: no audio: the model ended at once; {args.output} is not written, and another "
            "--seed may speak"
        )
        return EXIT_NO
    import numpy as np

    with interrupt.writing():
        write_audio(args.output, np.concatenate(audios), generator.sample_rate)
    seconds = sum(map(len, audios)) / generator.sample_rate
    mark = "not watermarked" if generator.watermarker is None else "watermarked"
    print(f"{args.output}: {seconds:.2f} s of audio, {mark}; {_speed(seconds, elapsed)}")
    return EXIT_OK


# --- what is asked for -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What one speaker says in one go, and the pieces in which it is spoken."""

    speaker: int
    chunks: Sequence[Chunk]


def _voice(args: argparse.Namespace) -> Voice | None:
    if args.voice is None:
        if args.voices_dir is not None:
            raise ValueError("--voices-dir goes with --voice")
        return None
    from csm_jax.voices import find_voice

    return find_voice(args.voice, args.voices_dir)


def _turns(
    args: argparse.Namespace, said: Sequence[tuple[int, str]], config: CSMConfig
) -> list[_Turn]:
    from csm_jax.long_text import split_text
    from csm_jax.text import DEFAULT_MAX_CHARACTERS

    turns = []
    for i, (speaker, text) in enumerate(said):
        where = f"turn {i + 1}: " if len(said) > 1 else ""
        chunks = split_text(
            text,
            max_characters=None if args.no_split else DEFAULT_MAX_CHARACTERS,
            normalise=not args.no_normalise,
            language=args.language,
            config=config,
        )
        as_said = " ".join(chunk.text for chunk in chunks)
        if as_said.split() != text.split():
            _note(f"{where}said as: {_shortened(as_said)}")
        if len(chunks) > 1:
            _note(f"{where}spoken in {len(chunks)} pieces (--no-split: in one go)")
        turns.append(_Turn(speaker=speaker, chunks=chunks))
    return turns


def _said(args: argparse.Namespace, voice: Voice | None) -> list[tuple[int, str]]:
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
    return [(_speaker(args, voice), text)]


def _speaker(args: argparse.Namespace, voice: Voice | None) -> int:
    if voice is None or not voice.turns:  # vectors alone do not say whose they are
        return args.speaker or 0
    speakers = sorted({turn.speaker for turn in voice.turns})
    listed = ", ".join(map(str, speakers))
    if args.speaker is None and len(speakers) > 1:
        raise ValueError(
            f"the voice {voice.name!r} has the speakers {listed}: say which with --speaker"
        )
    if args.speaker is not None and args.speaker not in speakers:
        raise ValueError(
            f"the voice {voice.name!r} has no speaker {args.speaker}: leave out --speaker, or give "
            f"one it has ({listed})"
        )
    return speakers[0] if args.speaker is None else args.speaker


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _context(path: str, transcript: str, speaker: str) -> Segment:
    from csm_jax.audio import read_audio
    from csm_jax.prompt import Segment, check_text

    try:
        number = natural(speaker)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--context {path}: the speaker {error}") from error
    check_text(transcript, "a context's transcript")
    audio, rate = read_audio(path)
    return Segment(speaker=number, text=transcript, audio=audio, sample_rate=rate)


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


def _check(args: argparse.Namespace, turns: int) -> CSMConfig:
    """Returns the model's sizes, CSM-1B's where a lone checkpoint does not say; checks the arguments."""
    # Again done by the generator, but only after minutes of loading.
    from csm_jax import hub
    from csm_jax.config import csm_1b, read_config
    from csm_jax.prompt import check_max_frames
    from csm_jax.request import Request, check_settings

    for seed in (args.seed, args.seed + turns - 1):
        request = Request(text="", speaker=0, seed=seed, **_settings(args))
        check_settings(request)
    file = hub.locate_config(args.model)
    config = csm_1b() if file is None else read_config(file)
    if file is not None and args.max_audio_length_ms is not None:
        check_max_frames(request.max_frames, config=config)
    return config


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_audio_length_ms", "temperature", "topk", "top_p", "min_p")
    names += ("decoder_temperature", "decoder_topk")
    return {name: getattr(args, name) for name in names}


# --- speaking ----------------------------------------------------------------------------------


@dataclass
class _Speech:
    """Turn after turn, each with all earlier ones as context."""

    generator: Generator
    args: argparse.Namespace
    voice: Voice | None
    context: list[Segment]
    interrupt: Interrupt
    _started: float = field(default_factory=time.perf_counter)

    def say(self, label: str, turn: _Turn, *, seed: int) -> Iterator[SpokenChunk]:
        """Yields the pieces of a turn."""
        from tqdm import tqdm

        from csm_jax.long_text import speak_chunks

        earlier = list(self.context)
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
                self.interrupt.check()
                elapsed = time.perf_counter() - started
                bar.set_postfix_str(_speed(done * FRAME_MS / 1000, elapsed), refresh=False)
                bar.update(done - bar.n)

            pieces = speak_chunks(
                self.generator,
                turn.chunks,
                turn.speaker,
                voice=self.voice,
                context=earlier,
                seed=seed,
                redraws=self.args.redraws,
                truncate_context=self.args.truncate_context,
                on_progress=on_progress,
                **_settings(self.args),
            )
            count = len(turn.chunks)
            for i in range(count):
                if count > 1:
                    bar.set_description_str(f"{label}, piece {i + 1}/{count}")
                piece = next(pieces)
                if len(piece.codes):
                    self.context.append(piece.segment)
                yield piece


@contextlib.contextmanager
def _notes_told() -> Iterator[None]:
    """Shows what is logged of a turn: context that is left out, pieces that are drawn again."""
    from tqdm import tqdm

    told: set[str] = set()

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in told:
                told.add(text)
                tqdm.write(text, file=sys.stderr)

    loggers = [logging.getLogger(f"csm_jax.{name}") for name in ("prompt", "jobs", "long_text")]
    levels, notes = [logger.level for logger in loggers], Notes()
    for logger in loggers:
        logger.addHandler(notes)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(notes)
            logger.setLevel(level)


def _speed(audio_s: float, elapsed_s: float) -> str:
    # The real-time factor is computing time over audio time: below 1 is faster than speech.
    frames = audio_s * 1000 / FRAME_MS
    factor = f"{elapsed_s / audio_s:.2f}" if audio_s else "none"
    return f"{frames / max(elapsed_s, 1e-9):.1f} frames/s, real-time factor {factor}"


def _note(text: str) -> None:
    print(text, file=sys.stderr)
