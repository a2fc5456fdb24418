"""The speech that the demo voice learns from: sentences read by flite, as tars of recordings.

`python -m recipes.demo_voice.speech --hours 40 --out DIR` writes `dev-0000.tar` and `test-0000.tar`, then
`train-0000.tar` and on until the hours are there: WebDataset's form, `KEY.wav` and `KEY.json`, as
`csm-jax data tokenize` reads it. A tar is there whole or not at all, and depends on nothing but its number:
a run that was stopped goes on with the next one, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType

import numpy as np

from csm_jax.audio import encode_audio
from csm_jax.config import SAMPLE_RATE
from csm_jax.corpus.files import PART, Locks, place, publish, stage
from csm_jax.data.sounds import read_member, tar_members
from recipes.demo_voice.flite import (
    AFTER_S,
    BEFORE_S,
    PEAKS,
    VOICES,
    find_flite,
    levelling,
    speak,
    version_of,
)
from recipes.demo_voice.text import SPLITS, Sentence, Split, sentences

CLIPS = 500
"""Of one tar."""
OUT = Path("build/demo_voice/speech")

STRETCHES = (0.90, 1.15)
"""How much slower a sentence may be read: drawn anew for each."""

_WAV_HEADER, _BYTES_PER_SAMPLE = 44, 2
_PLAN, _LOG = "plan.json", "log.jsonl"
_TRIED = 1000  # sentences of training that the plan tells apart
_EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        tar: Which one is being made.
        train_s: Seconds of training speech that are there.
        total_s: That are wanted.
        made_s: Seconds of all speech made in this run.
        elapsed_s: Since this run began.
    """

    tar: str
    train_s: float
    total_s: float
    made_s: float
    elapsed_s: float

    def __str__(self) -> str:
        done = f"{self.tar}: {self.train_s / 3600:.2f} of {self.total_s / 3600:g} h"
        if not self.made_s:
            return done
        rate = self.made_s / self.elapsed_s
        minutes = max(self.total_s - self.train_s, 0.0) / rate / 60
        return f"{done}, {rate:.0f} s of speech a second, {minutes:,.0f} min left"


# --- tars --------------------------------------------------------------------------------------


def clips(directory: str | Path, split: Split) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields (text, speaker, int16 [W] at 24 kHz) of the clips of a split that are there, in their order.

    Raises:
        FileNotFoundError: None are there.
    """
    import soundfile

    tars = sorted(Path(directory).glob(f"{split}-*.tar"))
    if not tars:
        raise FileNotFoundError(
            f"{directory} has no {split}-*.tar: make them with `python -m recipes.demo_voice.speech`"
        )
    for path in tars:
        for name in tar_members(path):
            key, dot, ending = name.rpartition(".")
            if ending == "json":
                told = json.loads(read_member(path, name))
                sound = io.BytesIO(read_member(path, f"{key}{dot}wav"))
                audio, _ = soundfile.read(sound, dtype="int16")
                yield told["text"], told["speaker"], audio


def seconds_of(tar: Path) -> float:
    """Returns the seconds of speech in one of these tars."""
    sizes = [size for name, (_, size) in tar_members(tar).items() if name.endswith(".wav")]
    return sum(size - _WAV_HEADER for size in sizes) / _BYTES_PER_SAMPLE / SAMPLE_RATE


def _tar_name(split: Split, number: int) -> str:
    return f"{split}-{number:04d}.tar"


def _make_clip(
    flite: str, key: str, speaker: int, sentence: Sentence, folder: Path
) -> tuple[bytes, bytes]:
    """Returns the recording and what is told of it, as the bytes of two files."""
    stretch = random.Random(f"demo voice/stretch/{key}").uniform(*STRETCHES)
    audio = speak(flite, sentence.text, voice=VOICES[speaker], stretch=stretch, folder=folder)
    told = {
        "id": key,
        "text": sentence.text,
        "speaker": speaker,
        "duration": round(len(audio) / SAMPLE_RATE, 4),
        "kind": sentence.kind,
    }
    return encode_audio(audio, SAMPLE_RATE, "WAV"), json.dumps(told).encode() + b"\n"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no time and no owner
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


class _Reader:
    """Makes the tars of one directory."""

    def __init__(
        self,
        directory: Path,
        *,
        hours: float,
        pool: ThreadPoolExecutor,
        flite: str,
        on_progress: Callable[[Progress], None],
    ):
        self._directory, self._total_s = directory, hours * 3600
        self._pool, self._flite, self._on_progress = pool, flite, on_progress
        self._train_s = self._made_s = 0.0
        self._started = time.monotonic()

    def read(self, split: Split, number: int, chosen: Sequence[Sentence]) -> None:
        """Makes a tar, if it is not there."""
        target = self._directory / _tar_name(split, number)
        if not target.exists():
            begun, before = time.monotonic(), self._made_s
            with tempfile.TemporaryDirectory(
                dir=self._directory, suffix=PART, ignore_cleanup_errors=True
            ) as folder:
                staged = stage(target, [self._tar(split, number, chosen, Path(folder))])
            try:
                publish([staged])
            finally:
                staged.discard()
            made_s, took_s = self._made_s - before, time.monotonic() - begun
            self._log(
                tar=target.name,
                clips=len(chosen),
                speech_s=round(made_s, 2),
                took_s=round(took_s, 2),
            )
        if split == "train":
            self._train_s += seconds_of(target)
        self._tell(target.name)

    @property
    def done(self) -> bool:
        return self._train_s >= self._total_s

    def _tar(self, split: Split, number: int, chosen: Sequence[Sentence], folder: Path) -> bytes:
        keys = [f"{split}-{number:04d}-{index:03d}" for index in range(len(chosen))]
        made = self._pool.map(
            # Both voices get both kinds of the sentences, which alternate where they are held out.
            lambda index: _make_clip(
                self._flite, keys[index], index // 2 % len(VOICES), chosen[index], folder
            ),
            range(len(chosen)),
        )
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, (sound, told) in zip(keys, made, strict=True):
                _add(tar, f"{key}.wav", sound)
                _add(tar, f"{key}.json", told)
                self._made_s += json.loads(told)["duration"]
                self._tell(_tar_name(split, number))
        return packed.getvalue()

    def _log(self, **figures: object) -> None:
        line = json.dumps({**figures, "at": round(time.time())})
        with (self._directory / _LOG).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _tell(self, tar: str) -> None:
        self._on_progress(
            Progress(
                tar=tar,
                train_s=self._train_s,
                total_s=self._total_s,
                made_s=self._made_s,
                elapsed_s=time.monotonic() - self._started,
            )
        )


# --- the whole ---------------------------------------------------------------------------------


def synthesize(
    directory: str | Path,
    *,
    hours: float,
    workers: int,
    clips_per_tar: int = CLIPS,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Makes all speech that is not there yet: that of `dev` and `test`, then `hours` of `train`.

    Args:
        directory: Of the tars; made if it is not there.
        hours: At least so many of training speech, up to the end of a tar.
        workers: How many sentences are read at a time.
        clips_per_tar: How many sentences a tar has.
        on_progress: Called with each clip; may raise to stop. Tars that are made stay.

    Raises:
        FileNotFoundError: flite or its voices are missing.
        RuntimeError: flite made no recording of a sentence.
        ValueError: The directory holds other speech.
        OSError: It cannot be written, or another process is at work there.
    """
    directory = Path(directory)
    flite = find_flite()
    directory.mkdir(parents=True, exist_ok=True)
    _check_plan(directory, _plan(flite, clips_per_tar))
    pool = ThreadPoolExecutor(workers)
    try:
        with Locks(directory / _PLAN) as locks:
            locks.take([0])
            _remove_unfinished(directory)
            reader = _Reader(
                directory, hours=hours, pool=pool, flite=flite, on_progress=on_progress
            )
            for split in SPLITS:
                source = sentences(split)
                number = 0
                while chosen := list(islice(source, clips_per_tar)):
                    if split == "train" and reader.done:
                        break
                    reader.read(split, number, chosen)
                    number += 1
    finally:
        pool.shutdown(cancel_futures=True)


def _plan(flite: str, clips_per_tar: int) -> dict[str, object]:
    """Returns all that the tars depend on."""
    texts = [each.text for split in SPLITS for each in islice(sentences(split), _TRIED)]
    return {
        "voices": list(VOICES),
        "flite": version_of(flite),
        "sample_rate": SAMPLE_RATE,
        "clips_per_tar": clips_per_tar,
        "text_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "stretches": list(STRETCHES),
        "peaks": list(PEAKS),
        "kept_s": [BEFORE_S, AFTER_S],
        "levelling": levelling(),
    }


def _check_plan(directory: Path, plan: dict[str, object]) -> None:
    path = directory / _PLAN
    if not path.exists():
        if any(directory.glob("*.tar")):
            raise ValueError(
                f"{directory} holds tars that are not of this recipe: give another --out"
            )
        place(path, json.dumps(plan, indent=1).encode() + b"\n")
        return
    before = json.loads(path.read_bytes())
    changed = sorted(name for name in {*plan, *before} if plan.get(name) != before.get(name))
    if changed:
        raise ValueError(
            f"{directory} holds other speech (differing in {', '.join(changed)}): give another --out, or "
            "remove it"
        )


def _remove_unfinished(directory: Path) -> None:
    for path in directory.glob(f"*{PART}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class _Line:
    """Shows the progress: one line that changes on a terminal, elsewhere a line a minute."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._every_s = 0.2 if self._terminal else 60.0
        self._told = -self._every_s

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._told >= self._every_s:
            self._told = now
            begin, end = ("\r\x1b[K", "") if self._terminal else ("", "\n")
            print(begin, progress, sep="", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print(file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if something is wrong, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, prog="recipes.demo_voice.speech")
    parser.add_argument(
        "--hours", type=float, default=40.0, help="of training speech (default: 40)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"directory (default: {OUT})")
    parser.add_argument("--workers", type=int, default=2, help="sentences at a time (default: 2)")
    args = parser.parse_args(argv)
    if not args.hours > 0:
        parser.error(f"--hours must be more than 0, got {args.hours:g}")
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    line, pressed = _Line(), []

    def press(signum: int, frame: FrameType | None) -> None:
        # Raised at once, it could leave a lock of the threads' pool taken for ever. A second one does not wait.
        pressed.append(signum)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    def show(progress: Progress) -> None:
        line.show(progress)
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        try:
            synthesize(args.out, hours=args.hours, workers=args.workers, on_progress=show)
        finally:
            line.end()
            signal.signal(signal.SIGINT, before)
    except (KeyboardInterrupt, OSError, RuntimeError, ValueError) as error:
        # On a terminal flite hears the key as well, and what it did not finish is an error.
        if pressed or isinstance(error, KeyboardInterrupt):
            print("speech: interrupted; the same command goes on", file=sys.stderr)
            return _EXIT_INTERRUPTED
        print(f"speech: {error}", file=sys.stderr)
        return 1
    tars = {split: sorted(args.out.glob(f"{split}-*.tar")) for split in SPLITS}
    hours = {split: sum(map(seconds_of, found)) / 3600 for split, found in tars.items()}
    told = ", ".join(f"{split} {hours[split]:.2f} h" for split in SPLITS)
    print(f"{args.out}: {told}, {sum(map(len, tars.values()))} tars")
    return 0


if __name__ == "__main__":
    sys.exit(main())
