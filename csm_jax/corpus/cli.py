"""`csm-jax batch`: a corpus from a manifest, planned, spoken, verified and exported."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.corpus.arguments import SETTING_ARGUMENTS, add_arguments

if TYPE_CHECKING:
    from csm_jax.corpus.plan import Plan
    from csm_jax.corpus.run import Outcome, Progress, Synthesizer

__all__ = ["EXIT_OK", "EXIT_ROWS_FAILED", "EXIT_WRONG", "add_arguments", "main"]

EXIT_OK, EXIT_WRONG, EXIT_ROWS_FAILED = 0, 1, 3

_LINE_EVERY_S = 60.0
OpenSynthesizer = Callable[[Mapping[str, Any]], "Synthesizer"]
"""Loads what speaks. It is given `model`, `layout`, `dtype`, `slots`, `redraws`, `watermark`,
`watermark_key` and `mesh`, as the command line has them."""


def main(
    args: argparse.Namespace,
    *,
    open_synthesizer: OpenSynthesizer,
    on_progress: Callable[[], None] = lambda: None,
) -> int:
    """Returns the exit status: 0, 1 if something is missing or damaged, 3 if rows failed.

    Args:
        args: Parsed by a parser that `add_arguments` was given.
        open_synthesizer: Loads what speaks.
        on_progress: Called often; may raise to stop. What is committed stays.

    Raises:
        ValueError, TypeError, OSError, ImportError, RuntimeError: What cannot go on, and why.
    """
    actions: dict[str, Callable[[], int]] = {
        "make": lambda: _make(args, open_synthesizer, on_progress),
        "plan": lambda: _planned(_plan(args, on_progress)),
        "run": lambda: _run(_read(args), args, open_synthesizer, on_progress),
        "verify": lambda: _verify(_read(args), on_progress),
        "status": lambda: _status(_read(args), on_progress),
        "export": lambda: _export(_read(args), args, on_progress),
        "report": lambda: _report(args),
    }
    return actions[args.action]()


def _make(
    args: argparse.Namespace,
    open_synthesizer: OpenSynthesizer,
    on_progress: Callable[[], None],
) -> int:
    plan = _plan(args, on_progress)
    _planned(plan)
    status = _run(plan, args, open_synthesizer, on_progress)
    # One task of many has no say about the whole.
    return status if args.executor == "task" else _verify(plan, on_progress)


def _read(args: argparse.Namespace) -> Plan:
    from csm_jax.corpus.plan import read_plan

    return read_plan(args.directory)


# --- plan --------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace, on_progress: Callable[[], None]) -> Plan:
    from csm_jax import hub
    from csm_jax.corpus.identity import hash_files, model_files
    from csm_jax.corpus.plan import PLAN, make_plan, read_plan
    from csm_jax.request import Request, check_settings

    names = [name[2:].replace("-", "_") for name, _, _, _ in SETTING_ARGUMENTS]
    settings = {name: value for name in names if (value := getattr(args, name)) is not None}
    check_settings(Request(text="", speaker=0, **settings))
    if not 0 <= args.seed < 2**64:
        raise ValueError(f"--seed must be in [0, 2**64), got {args.seed}")
    if args.slots < 1:
        raise ValueError(f"--slots must be at least 1, got {args.slots}")
    if not args.manifest.is_file():  # before the model's files are hashed
        raise FileNotFoundError(f"no manifest at {args.manifest}")
    voices, library = _voice_keys(args.voices)
    named_by_path = args.model != hub.DEMO and Path(args.model).exists()
    watermark = hub.is_watermarked(args.model) and not args.no_watermark
    files = model_files(args.model, watermark=watermark)
    remembered = {}
    if (args.out / PLAN).exists():
        remembered = read_plan(args.out).launch.get("files", {})
    _note(f"identifying {args.model}")
    hashes, facts = {}, {}
    for name, paths in files.items():
        hashes[name], more = hash_files(paths, remembered)
        facts |= more
    plan = make_plan(
        args.manifest,
        args.out,
        identity={
            **hashes,
            "voices": voices,
            "options": {
                "layout": args.layout,
                "dtype": args.dtype,
                "slots": args.slots,
                "redraws": args.redraws,
                "watermark": watermark,
                "watermark_key": _key_mark(args.watermark_key),
                "settings": settings,
            },
        },
        launch={
            "manifest": str(args.manifest.resolve()),
            "model": os.path.abspath(args.model) if named_by_path else args.model,
            "voices": library,
            "files": facts,
        },
        seed=args.seed,
        shard_minutes=args.shard_minutes,
        strict=args.strict,
        on_progress=lambda lines: on_progress(),
    )
    return plan


def _planned(plan: Plan) -> int:
    hours = plan.seconds / 3600
    _say(
        f"{plan.directory}: {plan.rows:,} rows in {len(plan.shards):,} shards, about {hours:,.1f} h of "
        f"audio; fingerprint {plan.fingerprint[:16]}"
    )
    if not plan.rejected:
        return EXIT_OK
    from csm_jax.corpus.plan import REJECTED

    _note(
        f"{plan.rejected:,} rows of the manifest are bad and left out: {plan.directory / REJECTED}"
    )
    with (plan.directory / REJECTED).open(encoding="utf-8") as lines:
        for _, line in zip(range(3), lines, strict=False):
            _note(f"  {line.rstrip()}")
    return EXIT_ROWS_FAILED


def _key_mark(key: Sequence[int]) -> str:
    # Slow to compute, so that trying all keys against a plan that is passed on takes too long.
    return hashlib.scrypt(bytes(key), salt=b"csm_jax corpus", n=2**14, r=8, p=1, dklen=16).hex()


def _voice_keys(directory: Path | None) -> tuple[dict[str, str], str]:
    from csm_jax.voices import VoiceLibrary, default_directory

    directory = directory or default_directory()
    if not directory.is_dir():
        return {}, str(directory)
    library = VoiceLibrary(directory)
    return {name: library.get(name).key for name in library.names()}, os.path.abspath(directory)


# --- run ---------------------------------------------------------------------------------------


def _run(
    plan: Plan,
    args: argparse.Namespace,
    open_synthesizer: OpenSynthesizer,
    on_progress: Callable[[], None],
) -> int:
    from csm_jax.corpus.identity import hash_files, model_files
    from csm_jax.corpus.plan import check_same
    from csm_jax.corpus.requests import RequestMaker
    from csm_jax.corpus.run import run_shards
    from csm_jax.corpus.tasks import shards_of_task, task_of

    shards = list(range(len(plan.shards)))
    if args.executor == "task":
        task, tasks = task_of(os.environ, args.tasks)
        shards = shards_of_task(task, tasks, len(plan.shards))
        _note(f"task {task} of {tasks}: {len(shards)} of {len(plan.shards)} shards")
    elif args.tasks is not None:
        raise ValueError("--tasks goes with --executor task")
    options = plan.identity["options"]
    source = args.model if args.action == "run" and args.model else plan.launch["model"]

    def opened() -> Synthesizer:
        hashes = {
            name: hash_files(paths, plan.launch["files"])[0]
            for name, paths in model_files(source, watermark=options["watermark"]).items()
        }
        mark = {"watermark_key": _key_mark(args.watermark_key)}
        check_same(plan, {**hashes, "options": {**options, **mark}})
        return open_synthesizer(
            {
                **{
                    name: options[name]
                    for name in ("layout", "dtype", "slots", "redraws", "watermark")
                },
                "model": source,
                "watermark_key": args.watermark_key,
                "mesh": args.mesh,
            }
        )

    prepare = RequestMaker(
        base=plan.base,
        seed=plan.seed,
        voices=_voices(plan, args.voices),
        defaults=options["settings"],
    )
    with _Bar() as bar:

        def progress(state: Progress) -> None:
            on_progress()
            bar.show(state)

        outcome = run_shards(
            plan,
            shards,
            opened,
            prepare,
            shards_in_flight=args.shards_in_flight,
            retry_failed=args.retry_failed,
            on_progress=progress,
        )
    _say(_told(outcome))
    failed = outcome.failed + (plan.rejected if args.executor == "local" else 0)
    return EXIT_ROWS_FAILED if failed else EXIT_OK


def _voices(plan: Plan, directory: Path | None) -> dict[str, Any]:
    wanted = plan.identity["voices"]
    if not wanted:
        return {}
    from csm_jax.corpus.plan import check_same
    from csm_jax.voices import VoiceLibrary

    library = VoiceLibrary(directory or Path(plan.launch["voices"]))
    voices = {name: library.get(name) for name in wanted}
    check_same(plan, {"voices": {name: voice.key for name, voice in voices.items()}})
    return voices


def _told(outcome: Outcome) -> str:
    before = f" ({outcome.committed_before} of them before)" if outcome.committed_before else ""
    return (
        f"{outcome.shards} shards are committed{before}: {outcome.rows:,} rows, "
        f"{outcome.seconds / 3600:,.2f} h of audio; {outcome.failed:,} rows failed, "
        f"{outcome.flagged:,} are flagged"
    )


class _Bar:
    """How far a run is: a bar on a terminal, elsewhere a line a minute."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc="batch",
            file=sys.stderr,
            disable=not self._terminal,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self._started = self._told = time.monotonic()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, state: Progress) -> None:
        now = time.monotonic()
        if not self._terminal:
            if now - self._told >= _LINE_EVERY_S or state.done_rows == state.rows:
                self._told = now
                _note(self._line(state, now))
            return
        self._bar.total = state.planned_s
        self._bar.set_postfix_str(self._figures(state, now), refresh=False)
        self._bar.update(state.done_planned_s - self._bar.n)

    def _figures(self, state: Progress, now: float) -> str:
        rate = state.seconds / max(now - self._started, 1e-9)
        return (
            f"{state.done_rows:,}/{state.rows:,} rows, {rate:.1f} audio-s/s, "
            f"slots {state.slot_use:.0%}, {state.failed} failed"
        )

    def _line(self, state: Progress, now: float) -> str:
        done = state.done_planned_s / state.planned_s
        left = (now - self._started) * (1 - done) / max(done, 1e-9)
        return f"{done:.0%}: {self._figures(state, now)}, {left / 60:,.0f} min left"


# --- what is there -----------------------------------------------------------------------------


@contextlib.contextmanager
def _shards_bar(
    name: str, plan: Plan, on_progress: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    from tqdm import tqdm

    with tqdm(
        desc=name,
        total=len(plan.shards),
        unit="shard",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
    ) as bar:

        def on_shard() -> None:
            on_progress()
            bar.update()

        yield on_shard


def _verify(plan: Plan, on_progress: Callable[[], None]) -> int:
    from csm_jax.corpus.verify import verify

    with _shards_bar("verify", plan, on_progress) as on_shard:
        found = verify(plan, on_shard=on_shard)
    for name in ("missing", "extra", "corrupt", "duplicate", "unfinished"):
        listed = getattr(found, name)
        for each in listed[:20]:
            _say(f"{name}: {each}")
        if len(listed) > 20:
            _say(f"{name}: {len(listed) - 20:,} more")
    _say(
        f"{plan.directory}: {found.rows:,} of {plan.rows:,} rows, {found.seconds / 3600:,.2f} h of audio; "
        f"{found.failed:,} rows failed, {plan.rejected:,} were left out of the plan"
    )
    if not found.ok:
        if found.corrupt:
            _note("to speak a damaged shard again, remove its .json and run again")
        return EXIT_WRONG
    return EXIT_ROWS_FAILED if found.failed or plan.rejected else EXIT_OK


def _status(plan: Plan, on_progress: Callable[[], None]) -> int:
    from csm_jax.corpus.shard import read_commit

    done = rows = failed = 0
    seconds = 0.0
    for shard in plan.shards:
        on_progress()
        commit = read_commit(plan.shard_dir / shard.name, plan.fingerprint)
        if commit is not None:
            done += 1
            rows += commit["count"]
            failed += commit["failed"]
            seconds += commit["seconds"]
    _say(
        f"{plan.directory}: {done:,} of {len(plan.shards):,} shards, {rows:,} of {plan.rows:,} rows, "
        f"{seconds / 3600:,.2f} h of audio; {failed:,} rows failed"
    )
    return EXIT_OK if done == len(plan.shards) else EXIT_WRONG


def _export(plan: Plan, args: argparse.Namespace, on_progress: Callable[[], None]) -> int:
    from csm_jax.corpus.export import export

    with _shards_bar("export", plan, on_progress) as on_shard:
        count = export(plan, args.to, args.destination, partial=args.partial, on_shard=on_shard)
    _say(f"{args.destination}: {count:,} rows as {args.to}")
    return EXIT_OK


def _report(args: argparse.Namespace) -> int:
    from csm_jax.corpus.report import write_report

    target = args.output or args.directory / "report.html"
    write_report(args.directory, target)
    _say(f"{target}")
    return EXIT_OK


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
