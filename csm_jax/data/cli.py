"""`csm-jax data`: recordings and their texts, checked and tokenised for training."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from csm_jax.data.arguments import add_arguments

if TYPE_CHECKING:
    from csm_jax.data.tokenize import Progress

__all__ = ["EXIT_OK", "EXIT_WRONG", "add_arguments", "main"]

EXIT_OK, EXIT_WRONG = 0, 1

_LINE_EVERY_S = 60.0
_LISTED = 20


def main(args: argparse.Namespace, *, on_progress: Callable[[], None] = lambda: None) -> int:
    """Returns the exit status: 0, or 1 if something is wrong with the data.

    Args:
        args: Parsed by a parser that `add_arguments` was given.
        on_progress: Called often; may raise to stop. What is committed stays.

    Raises:
        ValueError, TypeError, OSError, ImportError, RuntimeError: What cannot go on, and why.
    """
    actions: dict[str, Callable[[], int]] = {
        "check": lambda: _check(args, on_progress),
        "tokenize": lambda: _tokenize(args, on_progress),
        "inspect": lambda: _inspect(args, on_progress),
        "import": lambda: _import(args, on_progress),
        "export": lambda: _export(args, on_progress),
    }
    return actions[args.action]()


# --- check -------------------------------------------------------------------------------------


def _check(args: argparse.Namespace, on_progress: Callable[[], None]) -> int:
    from csm_jax.data.check import check
    from csm_jax.data.prepare import WHY_NOT
    from csm_jax.data.sources import open_source
    from csm_jax.data.survey import DEFAULT_SPLIT
    from csm_jax.data.tokenize import open_text_side

    source = open_source(args.source, speaker=args.speaker, lang=args.lang)
    text = open_text_side(args.model, args.max_length)
    with _counter("check", on_progress) as on_item:
        found = check(
            source,
            tokenizer=text.tokenizer,
            config=text.config,
            max_length=args.max_length,
            on_problem=lambda where, problem: _say(f"{where}: {problem}"),
            on_item=on_item,
        )
    speech = found.kinds["speech"]
    _say(
        f"{found.items:,} lines, {found.bad:,} bad; {speech:,} conversations of {found.turns:,} messages, "
        f"{_hours(found.frames)} of audio, {_hours(found.trained_frames)} trained"
    )
    if found.dropped:
        _say(f"{found.dropped:,} of the oldest messages do not fit and are left out")
    for kind, name in WHY_NOT.items():
        if found.kinds[kind]:
            _say(f"{found.kinds[kind]:,} lines are not for fine-tuning, each is {name}")
    if found.splits.keys() - {DEFAULT_SPLIT}:
        _say(f"splits: {_counted(found.splits)}")
    if found.langs.keys() - {""}:
        _say(f"languages: {_counted(found.langs)}")
    if speech:
        _tell_lengths(found.lengths, args.max_length)
    if not found.items:
        _say("there is nothing in it")
    return EXIT_WRONG if found.bad or not found.items else EXIT_OK


def _tell_lengths(lengths: Sequence[int], max_length: int) -> None:
    import numpy as np

    from csm_jax.data.packing import pack

    values = np.array(lengths)
    edges = [0, *(2**i for i in range(5, 20) if 2**i < max_length), max_length]
    counts, _ = np.histogram(values, bins=[*(edge + 0.5 for edge in edges)])
    _say("positions:")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            bar = "#" * max(1, round(40 * count / len(values)))
            _say(f"  {low + 1:>5}..{high:<5} {count:>9,}  {bar}")
    rows = len(pack(values, max_length))
    _say(
        f"{rows:,} rows of {max_length:,} positions, {values.sum() / (rows * max_length):.1%} full"
    )


# --- tokenize ----------------------------------------------------------------------------------


def _tokenize(args: argparse.Namespace, on_progress: Callable[[], None]) -> int:
    from csm_jax.data.survey import BadLinesError
    from csm_jax.data.tokenize import tokenize_for

    try:
        with _Bar(on_progress) as bar:
            manifest = tokenize_for(
                args.source,
                args.output,
                model=args.model,
                max_length=args.max_length,
                shard_minutes=args.shard_minutes,
                split=args.split,
                skip_bad=args.skip_bad,
                speaker=args.speaker,
                lang=args.lang,
                on_item=bar.count,
                on_progress=bar.show,
            )
    except BadLinesError as error:
        for where, problem in error.listed[:_LISTED]:
            _say(f"{where}: {problem}")
        if len(error.listed) > _LISTED:
            _say(f"and {len(error.listed) - _LISTED:,} more")
        _note(f"csm-jax: {error}")
        return EXIT_WRONG
    counts = manifest["counts"]
    _say(
        f"{args.output}: {counts['conversations']:,} conversations, {_hours(counts['frames'])} of audio, "
        f"in {len(manifest['shards'])} shards"
    )
    if counts["dropped"]:
        _say(f"{counts['dropped']:,} of the oldest messages did not fit and were left out")
    if counts["rejected"]:
        _say(f"{counts['rejected']:,} bad lines were left out: {args.output / 'rejected.jsonl'}")
    return EXIT_OK


class _Bar:
    """How far a run is: bars on a terminal, of the first reading and of the work; elsewhere a line a minute."""

    def __init__(self, on_progress: Callable[[], None]) -> None:
        self._on_progress = on_progress
        self._terminal = sys.stderr.isatty()
        self._bar = self._make(desc="read", unit="")
        self._working = False
        self._told = time.monotonic()

    def _make(self, **options: Any) -> Any:
        from tqdm import tqdm

        return tqdm(file=sys.stderr, disable=not self._terminal, **options)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self) -> None:
        self._on_progress()
        self._bar.update()

    def show(self, state: Progress) -> None:
        self._on_progress()
        now = time.monotonic()
        if not self._working:
            self._bar.close()
            self._working = True
            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            self._bar = self._make(desc="tokenize", total=state.total, bar_format=form)
        if self._terminal:
            self._bar.set_postfix_str(_figures(state), refresh=False)
            self._bar.update(state.done - self._bar.n)
        elif now - self._told >= _LINE_EVERY_S:
            self._told = now
            _note(f"{state.done / max(state.total, 1):.0%}: {_figures(state)}")


def _figures(state: Progress) -> str:
    elapsed = max(state.elapsed_s, 1e-9)
    left = time.strftime("%H:%M:%S", time.gmtime(state.left_s % 86_400))
    days = f"{int(state.left_s // 86_400)} d " if state.left_s >= 86_400 else ""
    return (
        f"{state.done:,}/{state.total:,}, {state.shards} shards, {state.clips / elapsed:.1f} clips/s, "
        f"{state.seconds / elapsed:.1f} audio-s/s, {days}{left} left"
    )


# --- inspect -----------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace, on_progress: Callable[[], None]) -> int:
    import numpy as np

    from csm_jax.data.shards import Shards, read_manifest, verify

    if args.max_length < 4:
        raise ValueError(f"--max-length must be at least 4, got {args.max_length}")
    if args.verify:
        manifest, wrong = read_manifest(args.directory), 0
        for name, problem in verify(args.directory, manifest):
            on_progress()
            if problem is not None:
                wrong += 1
                _say(f"{name} {problem}")
        _say(f"{len(manifest['shards'])} shards, {wrong} damaged")
        if wrong:
            return EXIT_WRONG
    shards = Shards(args.directory)
    if args.index is not None:
        return _show(shards, args.index)
    manifest, index = shards.manifest, shards.index
    counts = manifest["counts"]
    _say(
        f"{args.directory}: {counts['conversations']:,} conversations of {counts['turns']:,} messages "
        f"({counts['trained_turns']:,} trained), in {len(manifest['shards'])} shards"
    )
    _say(f"{_hours(counts['frames'])} of audio, {_hours(counts['trained_frames'])} trained")
    if set(counts["langs"]) - {""}:
        _say(f"languages: {_counted(counts['langs'])}")
    for name, told in (("rejected", "bad lines"), ("dropped", "messages that did not fit")):
        if counts[name]:
            _say(f"left out: {counts[name]:,} {told}")
    for name in ("codec_hash", "tokenizer_hash", "fingerprint"):
        _say(f"{name.replace('_', ' ')}: {manifest[name]}")
    _say(f"{manifest['num_codebooks']} codebooks of {manifest['codebook_size']:,} codes")
    lengths = np.add.reduceat(index.text + index.frames + 1, index.first[:-1])
    longer = int((lengths > args.max_length).sum())
    if longer < len(lengths):
        _tell_lengths(lengths[lengths <= args.max_length].tolist(), args.max_length)
    if longer:
        _say(f"{longer:,} are longer than {args.max_length:,} positions")
    _say("longest:")
    for number in np.argsort(-lengths, kind="stable")[:5].tolist():
        [example] = shards.read([number], facts=True)
        _say(f"  --index {number}: {lengths[number]:,} positions, id {example.facts.get('id')}")
    return EXIT_OK


def _show(shards: Any, number: int) -> int:
    if not 0 <= number < len(shards):
        raise ValueError(f"--index must be in 0..{len(shards) - 1:,}, got {number:,}")
    [example] = shards.read([number], facts=True)
    facts = example.facts
    named = ", ".join(f"{name} {facts[name]}" for name in ("id", "lang") if name in facts)
    _say(f"conversation {number}{': ' * bool(named)}{named}: {example.positions:,} positions")
    for turn, text, speaker in zip(example.turns, facts["texts"], facts["speakers"], strict=True):
        what = f"trained, weight {turn.weight:g}" if turn.trained else "context"
        _say(
            f"  speaker {speaker} ({what}; {len(turn.text)} text ids, {len(turn.codes)} frames, "
            f"{_seconds(len(turn.codes))}): {' '.join(text.split())}"
        )
    return EXIT_OK


# --- import, export ----------------------------------------------------------------------------


def _import(args: argparse.Namespace, on_progress: Callable[[], None]) -> int:
    from csm_jax.corpus.files import publish, stage
    from csm_jax.data.importers import Options, lines_of

    if args.output.suffix.lower() != ".jsonl":
        raise ValueError(f"{args.output} must end in .jsonl")
    if args.output.is_dir():
        raise IsADirectoryError(f"cannot write {args.output}: it is a directory")
    if not args.output.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {args.output}: there is no directory {args.output.parent}"
        )
    if args.number_speakers and args.form != "webdataset":
        raise ValueError("--number-speakers goes with --from webdataset")
    speakers: dict[str, int] | None = {} if args.number_speakers else None
    options = Options(
        target=args.output.parent, speaker=args.speaker, lang=args.lang, speakers=speakers
    )
    written = 0

    def pieces(on_item: Callable[[], None]) -> Iterator[bytes]:
        nonlocal written
        for line in lines_of(args.form, args.source, options):
            on_item()
            written += 1
            yield json.dumps(line, ensure_ascii=False).encode() + b"\n"

    with _counter("import", on_progress) as on_item:
        staged = stage(args.output, pieces(on_item))
    files = [staged]
    try:
        if not written:
            raise ValueError(f"{', '.join(map(str, args.source))}: there is nothing in it")
        if speakers is not None:
            names = args.output.with_suffix(".speakers.json")
            table = json.dumps(speakers, ensure_ascii=False, indent=1).encode() + b"\n"
            files.append(stage(names, [table]))
        publish(files)
    finally:
        for file in files:
            file.discard()
    _say(f"{args.output}: {written:,} conversations")
    return EXIT_OK


def _export(args: argparse.Namespace, on_progress: Callable[[], None]) -> int:
    from csm_jax.data.parquet import export

    count = export(args.directory, args.output, lambda rows: on_progress())
    _say(f"{args.output}: {count:,} conversations")
    return EXIT_OK


# --- words -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counter(name: str, on_progress: Callable[[], None]) -> Iterator[Callable[[], None]]:
    from tqdm import tqdm

    with tqdm(desc=name, unit="", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def on_item() -> None:
            on_progress()
            bar.update()

        yield on_item


def _hours(frames: int) -> str:
    from csm_jax.config import FRAME_RATE

    hours = frames / FRAME_RATE / 3600
    return f"{hours:,.2f} h" if hours >= 0.1 else _seconds(frames)


def _seconds(frames: int) -> str:
    from csm_jax.config import FRAME_RATE

    return f"{frames / FRAME_RATE:,.1f} s"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'not said'} {count:,}" for name, count in sorted(counts.items()))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
