"""The command line of the voice library: `csm-jax voices add | list | show | remove`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.hub import CSM_REPO

if TYPE_CHECKING:
    from csm_jax.codec import Codec
    from csm_jax.prompt import Segment
    from csm_jax.voices import Voice, VoiceLibrary

EXIT_OK, EXIT_NO = 0, 1

_EXAMPLES = """\
voices are kept in $CSM_JAX_VOICES, or ~/.local/share/csm_jax/voices, unless --dir says where

examples:
  csm-jax voices add anna anna.wav "What Anna says in it." \\
      --source "recorded by Anna, 3 May" --consent
  csm-jax voices list
  csm-jax voices show anna -o anna-check.wav
  csm-jax voices remove anna

`csm-jax voices ACTION --help` shows the options of an action.
"""

_ADD_EXAMPLES = """\
A recording is mono, in any format and rate; 5 to 15 s of clear speech are enough, 60 s are the most.
The transcript is exactly what is said in it. Several turns may be by one speaker or by several.

exit status: 0 added, 2 error, 130 interrupted

examples:
  csm-jax voices add anna anna.wav "What Anna says in it." \\
      --source "recorded by Anna, 3 May" --consent
  csm-jax voices add duo a.wav "How are you?" --and b.wav "Fine, thank you." 1 \\
      --source "our podcast, both speakers asked" --consent --model ./csm-1b
  csm-jax voices add anna better.wav "$(cat better.txt)" --replace \\
      --source "recorded by Anna, 9 May" --consent
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their arguments to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str, run: Any, epilog: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(act=run)
        return sub

    add = action("add", "add a voice made of recordings", _add, _ADD_EXAMPLES)
    _add_name(add)
    add.add_argument("audio", type=Path, metavar="AUDIO", help="a recording of the voice")
    add.add_argument("transcript", metavar="TRANSCRIPT", help="what is said in it, word for word")
    add.add_argument(
        "--speaker",
        type=int,
        default=0,
        metavar="N",
        help="the number by which requests ask for the speaker (default: %(default)s)",
    )
    add.add_argument(
        "--and",
        dest="others",
        nargs=3,
        action="append",
        default=[],
        metavar=("AUDIO", "TRANSCRIPT", "SPEAKER"),
        help="a further turn; may be repeated, oldest first",
    )
    add.add_argument(
        "--source",
        required=True,
        metavar="TEXT",
        help="where the recordings come from; kept with the voice",
    )
    add.add_argument(
        "--consent",
        action="store_true",
        help="whoever is heard has agreed to being cloned; needed, and kept with the voice",
    )
    add.add_argument("--replace", action="store_true", help="replace a voice of the same name")
    _add_codec(add)
    _add_common(add)

    listing = action(
        "list",
        "list all voices",
        _list,
        "exit status: 0 all were read, 1 some are damaged (said on stderr), 2 error",
    )
    listing.add_argument("--json", action="store_true", help="for programs, with all there is")
    _add_common(listing)

    show = action(
        "show",
        "show all about a voice, or hear it",
        _show,
        "exit status: 0 shown, 1 there is no such voice, 2 error",
    )
    _add_name(show)
    show.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="also decode it, as the model hears it, into a .wav or .flac",
    )
    _add_codec(show)
    _add_common(show)

    remove = action(
        "remove",
        "remove a voice",
        _remove,
        "exit status: 0 removed, 1 there is no such voice, 2 error",
    )
    _add_name(remove)
    _add_common(remove)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="letters a to z, digits, '.', '_' and '-'")


def _add_codec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="SOURCE",
        default=CSM_REPO,
        help="the model whose codec is used: a directory, a checkpoint file, or a hub id; nothing "
        "else of it is loaded (default: %(default)s)",
    )
    parser.add_argument(
        "--codec",
        choices=("jax", "torch"),
        default="jax",
        help="what runs the codec (default: %(default)s)",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the voices are kept")
    # The parser above has it too, and its answer is kept unless this one is given.
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the full traceback of an error",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit status of one action: 0, or 1 for no.

    Args:
        args: Parsed by a parser that `add_arguments` was given.

    Raises:
        TypeError, ValueError, OSError, ImportError: What the user has to put right.
    """
    from csm_jax.voices import UnknownVoiceError, VoiceLibrary

    try:
        return args.act(args, VoiceLibrary(args.dir))
    except UnknownVoiceError as error:
        _note(f"csm-jax: {error}")
        return EXIT_NO


# --- add ---------------------------------------------------------------------------------------


def _add(args: argparse.Namespace, library: VoiceLibrary) -> int:
    from csm_jax.voices import check_recordings, encode_voice, make_provenance

    # Everything that can be wrong is found before the codec is loaded.
    library.check_add(args.name, replace=args.replace)
    if not args.consent:
        raise ValueError(
            "--consent is missing: give it if whoever is heard has agreed to being cloned; the "
            "model's terms ask for that"
        )
    provenance = make_provenance(args.source, consent=args.consent)
    recordings = [(args.audio, args.transcript, args.speaker)]
    recordings += [(Path(audio), text, _number(n, audio)) for audio, text, n in args.others]
    segments = [_segment(*recording) for recording in recordings]
    check_recordings(segments)

    voice = encode_voice(_load_codec(args), segments, name=args.name, provenance=provenance)
    path = library.add(voice, replace=args.replace)
    print(f"{voice.name}: {voice.seconds:.1f} s in {_turns(voice)}, kept in {path}")
    return EXIT_OK


def _number(text: str, audio: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--and {audio}: SPEAKER must be a whole number, got {text!r}") from None


def _segment(path: Path, transcript: str, speaker: int) -> Segment:
    from csm_jax.audio import read_audio
    from csm_jax.prompt import Segment
    from csm_jax.voices import MAX_SECONDS

    audio, rate = read_audio(path, max_duration_s=MAX_SECONDS)
    return Segment(speaker=speaker, text=transcript, audio=audio, sample_rate=rate)


def _load_codec(args: argparse.Namespace) -> Codec:
    from csm_jax import pipeline

    return pipeline.load_codec(args.model, args.codec)


# --- list, show, remove ------------------------------------------------------------------------


def _list(args: argparse.Namespace, library: VoiceLibrary) -> int:
    from csm_jax.voices import UnknownVoiceError, VoiceFileError

    voices, problems = [], []
    for name in library.names():
        try:
            voices.append(library.get(name))
        except (VoiceFileError, OSError) as error:
            problems.append(str(error))
        except UnknownVoiceError:  # removed meanwhile
            continue
    if args.json:
        print(json.dumps([_described(voice) for voice in voices], indent=2))
    elif voices:
        _print_table(voices)
    elif not problems:
        _note(f"no voices in {library.directory}; add one with `csm-jax voices add`")
    for problem in problems:
        _note(f"csm-jax: {problem}")
    return EXIT_NO if problems else EXIT_OK


def _described(voice: Voice) -> dict[str, Any]:
    told = {
        "name": voice.name,
        "seconds": voice.seconds,
        "turns": [
            {"speaker": turn.speaker, "seconds": turn.seconds, "text": turn.text}
            for turn in voice.turns
        ],
        "provenance": dict(voice.provenance),
        "codec": {"num_codebooks": voice.num_codebooks, "codebook_size": voice.codebook_size},
        "key": voice.key,
    }
    return told if voice.vectors is None else told | {"vectors": list(voice.vectors.shape)}


def _prefix(voice: Voice) -> str | None:
    if voice.vectors is None:
        return None
    count = len(voice.vectors)
    return f"prefix of {count} vector{'' if count == 1 else 's'}"


def _print_table(voices: Sequence[Voice]) -> None:
    rows = [("NAME", "SECONDS", "TURNS", "SPEAKERS", "CREATED", "SOURCE")]
    for voice in voices:
        speakers = ",".join(map(str, sorted({turn.speaker for turn in voice.turns})))
        created = voice.provenance.get("created", "")[:10]
        said = [_prefix(voice), " ".join(voice.provenance.get("source", "").split())]
        source = "; ".join(part for part in said if part)
        rows.append(
            (voice.name, f"{voice.seconds:.1f}", str(len(voice.turns)), speakers, created, source)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # The source comes last: only there may a long text be cut without moving anything else.
    room = sys.maxsize
    if sys.stdout.isatty():
        room = max(shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * 5, 12)
    for name, seconds, turns, speakers, created, source in rows:
        source = source if len(source) <= room else source[: room - 1] + "…"
        print(
            f"{name:<{widths[0]}}  {seconds:>{widths[1]}}  {turns:>{widths[2]}}  "
            f"{speakers:<{widths[3]}}  {created:<{widths[4]}}  {source}"
        )


def _show(args: argparse.Namespace, library: VoiceLibrary) -> int:
    from csm_jax.audio import check_writable

    voice, path = library.get(args.name), library.path(args.name)
    if args.output is not None:
        check_writable(args.output)
        if not voice.turns:
            raise ValueError(
                f"the voice {voice.name!r} is a {_prefix(voice)}, without a recording: hear it say "
                f"something (csm-jax generate TEXT --voice {voice.name})"
            )
    fields = []
    if voice.vectors is not None:
        fields.append(("trained", f"{_prefix(voice)} of {voice.vectors.shape[1]:,} numbers"))
    if voice.turns:
        audio = f"{voice.seconds:.1f} s in {_turns(voice)} ({voice.frames:,} frames)"
        fields.append(("audio", audio))
    fields += [
        *voice.provenance.items(),
        ("codec", f"{voice.num_codebooks} codebooks of {voice.codebook_size:,} codes"),
        ("key", voice.key),
        ("file", str(path)),
    ]
    print(voice.name)
    for label, text in fields:
        print(f"  {label:<9} {' '.join(text.split())}")
    for i, turn in enumerate(voice.turns, start=1):
        print(f"\n  turn {i}: speaker {turn.speaker}, {turn.seconds:.1f} s")
        width = max(shutil.get_terminal_size().columns - 4, 20)
        print(textwrap.indent(textwrap.fill(" ".join(turn.text.split()), width), "    "))
    if args.output is not None:
        _decode(args, voice)
    return EXIT_OK


def _decode(args: argparse.Namespace, voice: Voice) -> None:
    import numpy as np

    from csm_jax.audio import write_audio

    codec = _load_codec(args)
    sizes = codec.num_codebooks, codec.codebook_size
    if sizes != (voice.num_codebooks, voice.codebook_size):
        raise ValueError(
            f"the codec of {args.model} has {sizes[0]} codebooks of {sizes[1]:,} codes, but the "
            f"voice was made with {voice.num_codebooks} of {voice.codebook_size:,}: give the model "
            "it was made for with --model"
        )
    audios = codec.decode_batch([turn.codes for turn in voice.turns])
    write_audio(args.output, np.concatenate(audios), codec.sample_rate)
    print(f"\n{args.output}: {voice.seconds:.1f} s of audio")


def _remove(args: argparse.Namespace, library: VoiceLibrary) -> int:
    library.remove(args.name)
    print(f"{args.name}: removed from {library.directory}")
    return EXIT_OK


def _turns(voice: Voice) -> str:
    return "1 turn" if len(voice.turns) == 1 else f"{len(voice.turns)} turns"


def _note(text: str) -> None:
    print(text, file=sys.stderr)
