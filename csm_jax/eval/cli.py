"""`csm-jax eval`: a manifest spoken, heard and measured; figures, a report and the recordings."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax import __version__
from csm_jax.eval.arguments import add_arguments, speaking_options, speaking_options_of

if TYPE_CHECKING:
    import numpy as np

    from csm_jax.corpus.manifest import Row
    from csm_jax.eval.run import Measured, Prepare, Speed, Spoken, Synthesizer

__all__ = ["EXIT_OK", "EXIT_ROWS_FAILED", "add_arguments", "main"]

EXIT_OK, EXIT_ROWS_FAILED = 0, 3
DOCUMENT, REPORT, ROWS = "eval.json", "report.html", "rows.jsonl"

_LINE_EVERY_S = 60.0
OpenSynthesizer = Callable[[Mapping[str, Any]], "Synthesizer"]
"""Loads what speaks, from the settings that `csm_jax.corpus.cli.OpenSynthesizer` describes."""


def main(
    args: argparse.Namespace,
    *,
    open_synthesizer: OpenSynthesizer,
    on_progress: Callable[[], None] = lambda: None,
) -> int:
    """Returns the exit status: 0, or 3 if rows failed.

    Args:
        args: Parsed by a parser that `add_arguments` was given.
        open_synthesizer: Loads what speaks.
        on_progress: Called often; may raise to stop. Recordings that are written stay.

    Raises:
        ValueError, TypeError, OSError, ImportError, RuntimeError: What cannot go on, and why.
    """
    from csm_jax.eval.manifest import read_rows, recordings_of, texts_of
    from csm_jax.eval.metrics import agreement
    from csm_jax.eval.run import AUDIO, measure, recorded, shuffled

    _check(args)
    rows = read_rows(args.manifest)
    own = texts_of(rows, language=args.language)
    said = shuffled(own, seed=args.seed) if args.shuffle_text else own
    # All that can be wrong with what hears is told before anything is spoken.
    recogniser = _open_recogniser(args)
    is_marked = _open_watermark(args)
    args.out.mkdir(parents=True, exist_ok=True)
    speed, other = None, None
    if args.model is None:
        base = args.manifest.resolve().parent
        spoken = [
            recorded(row, path) for row, path in zip(rows, recordings_of(rows, base), strict=True)
        ]
    else:
        prepare = _prepare(args)
        _check_comparable(args)
        spoken, speed = _speak(args, rows, prepare, args.out / AUDIO, open_synthesizer, on_progress)
        if args.against is not None:
            other, _ = _speak(args, rows, prepare, None, open_synthesizer, on_progress)
    measured: list[Measured] = []
    with _Bar("hear" if recogniser else "measure", len(rows), on_progress) as bar:
        for at, row in enumerate(rows):
            one = measure(
                row,
                spoken[at],
                own=own[at],
                said=said[at],
                recogniser=recogniser,
                language=args.language,
                is_marked=is_marked,
            )
            codes = (spoken[at].codes, None if other is None else other[at].codes)
            if one.error is None and codes[0] is not None and codes[1] is not None:
                one.agreement = agreement(codes[0], codes[1])
            measured.append(one)
            bar.step(0.0 if one.facts is None else one.facts.seconds)
    return _write(args, rows, measured, speed, None if recogniser is None else recogniser.name)


def _check(args: argparse.Namespace) -> None:
    from csm_jax.eval.metrics import align
    from csm_jax.html_report import check_plots
    from csm_jax.text import normalise

    check_plots(extra="eval")
    if args.recogniser != "none":
        align([], [])
    normalise("", language=args.language)  # an unknown language is the arguments' mistake
    if not 0 <= args.seed < 2**64:
        raise ValueError(f"--seed must be in [0, 2**64), got {args.seed}")
    if args.slots < 1:
        raise ValueError(f"--slots must be at least 1, got {args.slots}")
    if args.redraws < 0:
        raise ValueError(f"--redraws must be 0 or more, got {args.redraws}")
    for name in (DOCUMENT, REPORT):
        if (args.out / name).resolve() == args.manifest.resolve():
            raise ValueError(f"{args.manifest} would be overwritten: give another -o")
    if args.model is None and (idle := speaking_options_of(args)):
        raise ValueError(
            f"{', '.join(idle)}: say with --model who speaks; without it, the rows name recordings"
        )
    if args.against is None and args.against_dtype is not None:
        raise ValueError("--against-dtype goes with --against")
    if args.model is not None and args.watermark_from is not None:
        raise ValueError("--watermark-from is for recordings; a model's own networks are used")
    if args.no_watermark and args.watermark_from is not None:
        raise ValueError("--no-watermark and --watermark-from exclude each other")
    if args.vocabulary is None and args.pronunciations is not None:
        raise ValueError("--pronunciations goes with --vocabulary")
    if args.vocabulary is None and args.language_model != "bigram":
        raise ValueError("--language-model goes with --vocabulary")


def _check_comparable(args: argparse.Namespace) -> None:
    # Said by `agreement` as well, but only after both have spoken.
    if args.against is None:
        return
    from csm_jax import hub
    from csm_jax.config import read_config

    files = [hub.locate_config(source) for source in (args.model, args.against)]
    one, other = (None if file is None else read_config(file).num_codebooks for file in files)
    if one is not None and other is not None and one != other:
        raise ValueError(
            f"--against: {args.model} makes {one} codes a frame and {args.against} {other}: they cannot be "
            "compared"
        )


# --- what hears --------------------------------------------------------------------------------


def _open_recogniser(args: argparse.Namespace) -> Any:
    from csm_jax.eval.language_model import read_pronunciations
    from csm_jax.eval.manifest import read_sentences
    from csm_jax.eval.recognisers import open_recogniser

    sentences, pronunciations = None, None
    if args.vocabulary is not None:
        sentences = read_sentences(args.vocabulary, language=args.language)
    if args.pronunciations is not None:
        pronunciations = read_pronunciations(args.pronunciations)
    return open_recogniser(
        args.recogniser,
        model=args.recogniser_model,
        sentences=sentences,
        language_model_kind=args.language_model,
        pronunciations=pronunciations,
        language=args.language,
    )


def _open_watermark(args: argparse.Namespace) -> Callable[[np.ndarray, int], bool] | None:
    from csm_jax import hub, pipeline

    source = args.watermark_from if args.model is None else args.model
    if source is None or args.no_watermark or not hub.is_watermarked(source):
        return None
    watermarker = pipeline.load_watermarker(lambda: hub.locate_watermark(source))
    if watermarker is None:
        return None
    return lambda audio, rate: watermarker.verify(audio, rate, args.watermark_key)


# --- what speaks -------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> Prepare:
    from csm_jax.corpus.arguments import SETTING_ARGUMENTS
    from csm_jax.corpus.requests import RequestMaker
    from csm_jax.request import Request, check_settings
    from csm_jax.voices import VoiceLibrary

    names = [name[2:].replace("-", "_") for name, _, _, _ in SETTING_ARGUMENTS]
    defaults = {name: value for name in names if (value := getattr(args, name)) is not None}
    check_settings(Request(text="", speaker=0, **defaults))
    return RequestMaker(
        base=args.manifest.resolve().parent,
        seed=args.seed,
        voices=_Voices(VoiceLibrary(args.voices)),
        defaults=defaults,
    )


class _Voices(dict[str, Any]):
    """Voices of a library, read when they are first asked for."""

    def __init__(self, library: Any):
        super().__init__()
        self._library = library

    def __missing__(self, name: str) -> Any:
        self[name] = self._library.get(name)
        return self[name]


def _speak(
    args: argparse.Namespace,
    rows: Sequence[Row],
    prepare: Prepare,
    directory: Path | None,
    open_synthesizer: OpenSynthesizer,
    on_progress: Callable[[], None],
) -> tuple[list[Spoken], Speed]:
    from csm_jax.eval.run import speak

    other = directory is None
    synthesizer = open_synthesizer(
        {
            "model": args.against if other else args.model,
            "layout": None if other else args.layout,
            "dtype": args.against_dtype if other else args.dtype,
            # A mesh divides the slots: their number is then the user's own.
            "slots": args.slots if args.mesh else min(args.slots, len(rows)),
            "redraws": args.redraws,
            "watermark": not args.no_watermark and not other,
            "watermark_key": args.watermark_key,
            "mesh": args.mesh,
        }
    )
    if not other:  # what an earlier run left would tell of recordings that are overwritten now
        for name in (DOCUMENT, REPORT, ROWS):
            if (args.out / name).resolve() != args.manifest.resolve():
                (args.out / name).unlink(missing_ok=True)
    with _Bar("speak again" if other else "speak", len(rows), on_progress) as bar:
        return speak(rows, synthesizer, prepare, directory, on_row=bar.step)


# --- the results -------------------------------------------------------------------------------


def _write(
    args: argparse.Namespace,
    rows: Sequence[Row],
    measured: Sequence[Measured],
    speed: Speed | None,
    recogniser: str | None,
) -> int:
    from csm_jax.corpus.files import place, sha256_of
    from csm_jax.eval.report import numbers, render
    from csm_jax.eval.summary import FORMAT, as_json, by_speaker, summarise

    left_out = {"handler", "command", "debug", "manifest", "out", "watermark_key"}
    if args.model is None:  # nothing is known of how recordings were made
        left_out |= {option.dest for option in speaking_options()}
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in left_out
    }
    summary = summarise(measured, seed=args.seed, speed=speed)
    document = {
        "format": FORMAT,
        "csm_jax": __version__,
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "manifest": {"path": str(args.manifest), "sha256": sha256_of(args.manifest)},
        "model": args.model,
        "against": args.against,
        "recogniser": recogniser,
        "settings": settings,
        "summary": summary,
        "speakers": by_speaker(measured, seed=args.seed),
        "rows": [as_json(row, args.out) for row in measured],
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
    lines = "".join(_again(row, one, args.out) for row, one in zip(rows, measured, strict=True))
    place(args.out / ROWS, lines.encode())
    place(args.out / REPORT, render(document, measured, args.out).encode())
    place(args.out / DOCUMENT, text.encode())  # last: with it, the others are of this run
    for name, value in numbers(summary).items():
        _say(f"{name}: {value}")
    _say(str(args.out / REPORT))
    return EXIT_ROWS_FAILED if summary["failed"] else EXIT_OK


def _again(row: Row, one: Measured, base: Path) -> str:
    # The row for another evaluation of its recording.
    from csm_jax.eval.manifest import RECORDING
    from csm_jax.eval.summary import relative

    if one.error is not None:
        return ""
    path = one.spoken.audio
    found: dict[str, Any] = {
        "id": row["id"],
        "text": row["text"],
        "speaker": row["speaker"],
        RECORDING: None if path is None else relative(path, base),
    }
    if one.spoken.finish_reason is not None:
        found["finish_reason"] = one.spoken.finish_reason
    if one.spoken.flags is not None:
        found["flags"] = list(one.spoken.flags)
    return json.dumps(found, ensure_ascii=False) + "\n"


class _Bar:
    """How far it is: a bar on a terminal, elsewhere a line a minute and at the end."""

    def __init__(self, name: str, rows: int, on_progress: Callable[[], None]) -> None:
        from tqdm import tqdm

        self._name, self._rows, self._on_progress = name, rows, on_progress
        self._done, self._seconds = 0, 0.0
        self._started = self._told = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(desc=name, total=rows, unit="row", file=sys.stderr, disable=not terminal)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self, seconds: float) -> None:
        """Takes a row with so many seconds of audio."""
        self._done += 1
        self._seconds += seconds
        now = time.monotonic()
        rate = self._seconds / max(now - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} audio-s/s", refresh=False)
        self._bar.update()
        if self._bar.disable and (now - self._told >= _LINE_EVERY_S or self._done == self._rows):
            self._told = now
            left = (now - self._started) * (self._rows / self._done - 1)
            sys.stderr.write(
                f"{self._name}: {self._done:,}/{self._rows:,} rows, {rate:.1f} audio-s/s, "
                f"{left / 60:,.0f} min left\n"
            )
            sys.stderr.flush()
        self._on_progress()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
