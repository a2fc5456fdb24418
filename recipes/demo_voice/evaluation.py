"""What the demo voice is measured with: sentences that it never heard, and what its codec makes of recordings.

    python -m recipes.demo_voice.evaluation sentences --split dev --out DIR
    python -m recipes.demo_voice.evaluation codec --codec FILE --speech DIR --split dev --out DIR

The first writes `SPLIT.jsonl`, which `csm-jax eval` has spoken, and `sentences.txt`, those of which a
recogniser's language model is made. The second writes `rows.jsonl` and `audio/`: recordings through the codec and
back, which `csm-jax eval` hears.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from csm_jax import hub
from recipes.demo_voice.speech import VOICES, clips
from recipes.demo_voice.text import HELD_OUT, Split, sentences

SENTENCES = "sentences.txt"
_LANGUAGE_MODEL_SENTENCES = 3000
"""Sentences of the training text in `sentences.txt`; every word is among them many times."""
_AT_ONCE = 16


def write_sentences(split: Split, out: Path, *, count: int) -> Path:
    """Returns the manifest that it writes: speakers in turn, a seed each.

    Raises:
        ValueError: There are not as many sentences, or it is the split of training.
        OSError: It cannot be written.
    """
    _check(split, count)
    out.mkdir(parents=True, exist_ok=True)
    _write_sentences_heard(out)
    rows = (
        {"id": f"{split}-{i:03d}", "text": each.text, "speaker": i // 2 % len(VOICES), "seed": i}
        # Kinds alternate, so speakers change every other sentence.
        for i, each in enumerate(islice(sentences(split), count))
    )
    return _write_rows(out / f"{split}.jsonl", rows)


def write_resynthesised(
    codec_file: Path, speech: Path, split: Split, out: Path, *, count: int
) -> Path:
    """Returns the manifest of recordings that went through a codec and back.

    Raises:
        FileNotFoundError: The codec or the speech is not there.
        ValueError: There are not as many sentences, or it is the split of training.
        OSError: It cannot be written.
    """
    from csm_jax.audio import write_audio
    from csm_jax.mimi.codec import JaxMimi
    from csm_jax.weights.mimi import load_mimi

    _check(split, count)
    codec = JaxMimi(*load_mimi(codec_file))
    (out / "audio").mkdir(parents=True, exist_ok=True)
    _write_sentences_heard(out)

    def rows() -> Iterator[dict[str, Any]]:
        chosen = islice(clips(speech, split), count)
        number = 0
        while some := list(islice(chosen, _AT_ONCE)):
            audios = [audio.astype("float32") / 32768 for _, _, audio in some]
            heard = codec.decode_batch(codec.encode_batch(audios))
            for (text, speaker, audio), back in zip(some, heard, strict=True):
                name = f"{split}-{number:03d}"
                path = out / "audio" / f"{name}.wav"
                write_audio(path, back[: len(audio)], codec.sample_rate)
                yield {
                    "id": name,
                    "text": text,
                    "speaker": speaker,
                    "audio_filepath": f"audio/{name}.wav",
                }
                number += 1

    return _write_rows(out / "rows.jsonl", rows())


def _check(split: Split, count: int) -> None:
    if split == "train":
        raise ValueError(f"the split must be dev or test, which are held out, not {split!r}")
    if not 1 <= count <= HELD_OUT:
        raise ValueError(f"a split has 1 to {HELD_OUT} sentences, not {count}")


def _write_sentences_heard(out: Path) -> None:
    lines = (" ".join(each.words) for each in islice(sentences("train"), _LANGUAGE_MODEL_SENTENCES))
    (out / SENTENCES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if something is missing or cannot be written."""
    args = _parser().parse_args(argv)
    try:
        if args.action == "sentences":
            path = write_sentences(args.split, args.out, count=args.count)
        else:
            path = write_resynthesised(
                args.codec, args.speech, args.split, args.out, count=args.count
            )
    except (ValueError, OSError) as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return 1
    with path.open(encoding="utf-8") as file:
        count = sum(1 for _ in file)
    words = ["csm-jax", "eval", path, "-o", args.out / "lenient"]
    words += ["--vocabulary", args.out / SENTENCES]
    if args.action == "sentences":
        words += ["--model", hub.DEMO, "--temperature", "0.6", "--max-audio-length-ms", "12000"]
    print(f"{path}: {count} sentences; hear them with\n  {shlex.join(map(str, words))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Writes what the demo voice is measured with.",
        prog="recipes.demo_voice.evaluation",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    spoken = actions.add_parser(
        "sentences", help="held-out sentences, for csm-jax eval to have spoken"
    )
    heard = actions.add_parser("codec", help="recordings through the codec and back")
    heard.add_argument("--codec", type=Path, required=True, help="of recipes.demo_voice.codec")
    heard.add_argument("--speech", type=Path, required=True, help="what the speech stage made")
    for action in (spoken, heard):
        action.add_argument("--split", choices=("dev", "test"), default="dev")
        action.add_argument(
            "--count", type=int, default=200, help="sentences (default: %(default)s)"
        )
        action.add_argument("--out", type=Path, required=True, help="directory")
    return parser


if __name__ == "__main__":
    sys.exit(main())
