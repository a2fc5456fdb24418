"""The audio of a message: read whole, or not at all. Nothing here ever shortens a recording to fit."""

from __future__ import annotations

import io
import re
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from csm_jax.audio import check_audio, check_promise, check_rate, resample
from csm_jax.codec import check_codes
from csm_jax.config import FRAME_RATE, SAMPLE_RATE, SAMPLES_PER_FRAME, CSMConfig
from csm_jax.data.conversations import Sound

_MEMBER = re.compile(r"(.+\.tar)#(.+)", re.IGNORECASE | re.DOTALL)

_SLACK_S = 0.05
"""How far an end may lie behind the recording's: times are rounded in metadata."""
_MAX_MEMBER_BYTES = 1 << 30
_UNKNOWN_FRAMES = 1 << 62  # libsndfile gives 2**63 - 1
_OPEN_TARS = 4


def frames_of(sound: np.ndarray) -> int:
    """Returns how many frames of audio this is: codes [n, C], or 24 kHz samples [W] of which the last
    frame is filled up with silence.
    """
    return len(sound) if sound.ndim == 2 else -(-len(sound) // SAMPLES_PER_FRAME)


def read_sound(sound: Sound, base: Path, *, config: CSMConfig, max_frames: int) -> np.ndarray:
    """Returns a message's audio: float32 [W] at 24 kHz, or its codes uint16 [n, C] where it has those.

    Args:
        sound: Where it is.
        base: What its path is relative to.
        config: The model's sizes, for codes.
        max_frames: Most frames of 80 ms; longer audio is refused, not cut.

    Raises:
        OSError: It cannot be read.
        TypeError, ValueError: It is not audio, empty, too long, or `start` and `end` are not within it.
    """
    if sound.codes is not None:
        return _read_codes(sound.codes, base, config, max_frames)
    if sound.url is None:
        raise ValueError("there is neither a file nor codes")
    if member := _MEMBER.fullmatch(sound.url):
        data = read_member(base / member[1], member[2])
        return _read_audio(io.BytesIO(data), sound, max_frames)
    path = base / sound.url
    if not path.exists():
        raise FileNotFoundError(f"no audio file at {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return _read_audio(path, sound, max_frames)


def _read_audio(file: Path | io.BytesIO, sound: Sound, max_frames: int) -> np.ndarray:
    import soundfile

    name, max_s = str(sound.url), max_frames / FRAME_RATE
    try:
        with soundfile.SoundFile(file) as opened:
            rate, there = check_rate(opened.samplerate, f"sample rate of {name}"), opened.frames
            if opened.channels > 1:
                raise ValueError(
                    f"{name} has {opened.channels} channels and CSM needs one: write a mono file"
                )
            check_promise(name, opened.extra_info)
            if not there:
                raise ValueError(f"{name} holds no audio")
            if there >= _UNKNOWN_FRAMES:
                raise ValueError(
                    f"{name} does not say how long it is: write it again as FLAC or WAV"
                )
            whole_s = there / rate
            if sound.start >= whole_s or (sound.end or 0.0) > whole_s + _SLACK_S:
                raise ValueError(
                    f"{name} lasts {whole_s:.2f} s, but start={sound.start:g} and end="
                    f"{'its end' if sound.end is None else format(sound.end, 'g')} were asked for"
                )
            first = round(sound.start * rate)
            last = there if sound.end is None else min(round(sound.end * rate), there)
            if (last - first) / rate > max_s:
                raise ValueError(
                    f"{name} has {(last - first) / rate:,.1f} s of audio, but at most {max_s:,.1f} s fit: "
                    "cut it and its text"
                )
            if first:
                opened.seek(first)
            samples = opened.read(last - first, dtype="float32")
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip() or "it is damaged or cut short"
        raise ValueError(f"{name} cannot be read as audio: {reason}") from error
    if last <= first or not len(samples):
        raise ValueError(f"{name} holds no audio")
    if len(samples) != last - first:
        raise ValueError(
            f"{name} is cut short: {len(samples):,} of {last - first:,} samples can be read"
        )
    return resample(check_audio(samples, name), rate, SAMPLE_RATE)


def _read_codes(codes: object, base: Path, config: CSMConfig, max_frames: int) -> np.ndarray:
    if isinstance(codes, str):
        codes = _load_npy(codes, base)
    try:
        checked = check_codes(
            codes, num_codebooks=config.num_codebooks, codebook_size=config.codebook_size
        )
    except ValueError as error:
        ragged = "inhomogeneous" in str(error)
        raise ValueError(
            "codes must have one length per frame" if ragged else str(error)
        ) from error
    if not len(checked):
        raise ValueError("codes are empty")
    if len(checked) > max_frames:
        raise ValueError(
            f"codes are {len(checked):,} frames, but at most {max_frames:,} fit: cut them and the text"
        )
    if not checked[-1].any():
        raise ValueError(
            "codes end in a frame of zeros, which is how an end frame looks: leave it out, it is added"
        )
    return checked.astype(np.uint16)


def _load_npy(name: str, base: Path) -> np.ndarray:
    member = _MEMBER.fullmatch(name)
    if member is None and not (base / name).is_file():
        raise FileNotFoundError(f"no codes at {base / name}")
    file = base / name if member is None else io.BytesIO(read_member(base / member[1], member[2]))
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name} is no .npy file of numbers: {error}") from error


# --- members of tars ---------------------------------------------------------------------------

_tars: OrderedDict[Path, dict[str, tuple[int, int]]] = OrderedDict()


def tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """Returns {name: (where its data begins, bytes)} of a tar's files, in their order.

    Only headers are read, and the last few tars are remembered.

    Raises:
        FileNotFoundError, IsADirectoryError: There is no such file.
        ValueError: It is not a tar, or is compressed, or cut short.
    """
    path = path.resolve()
    if path in _tars:
        _tars.move_to_end(path)
        return _tars[path]
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not a tar")
    try:
        with tarfile.open(path, "r:") as tar:
            found = {info.name: (info.offset_data, info.size) for info in tar if info.isreg()}
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as a tar without compression: {error}") from error
    _tars[path] = found
    while len(_tars) > _OPEN_TARS:
        _tars.popitem(last=False)
    return found


def read_member(path: Path, name: str) -> bytes:
    """Returns the bytes of a tar's member.

    Raises:
        FileNotFoundError: The tar is not there, or has no such member.
        ValueError: It is no tar, or the member is cut short or too large.
    """
    found = tar_members(path).get(name)
    if found is None:
        raise FileNotFoundError(f"{path} has no member {name}")
    offset, size = found
    if size > _MAX_MEMBER_BYTES:
        raise ValueError(
            f"{name} of {path} has {size:,} bytes; at most {_MAX_MEMBER_BYTES:,} are read"
        )
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{path} is cut short in {name}")
    return data
