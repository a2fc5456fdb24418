"""Sample arrays and audio files: checking, resampling, reading and writing, all in numpy.

Everything here is mono: one float32 array of W samples around the range -1..1 and a rate in hertz.
The resampler computes the windowed sinc that torchaudio's `functional.resample` documents as its
default (Hann window, six zero crossings each side, roll-off 0.99), because the reference puts all
audio through it on the way into and out of the watermark.
"""

from __future__ import annotations

import functools
import io
import math
import operator
import os
import re
import secrets
from pathlib import Path
from typing import Any, Literal

import numpy as np

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
_MIN_RATE, _MAX_RATE = 1_000, 768_000
_PHASES_PER_GROUP = 256  # bounds the filter bank of awkward ratios such as 47,999 to 24,000
_GATHER_ELEMENTS = 1 << 22  # samples copied into one matrix product: 16 MiB

_FORMATS: dict[str, Literal["WAV", "FLAC"]] = {".wav": "WAV", ".flac": "FLAC"}
_MAX_PEAK = 100.0  # far above any float recording, far below unscaled 16-bit samples
_READ_BLOCK = 1 << 18
# In libsndfile's notes on a WAV, AIFF or AU file: the bytes its header promises, and those that are there.
_PROMISED_BYTES = re.compile(
    r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE
)
_UNKNOWN_BYTES = 0x7FFF_0000  # programs that write into a pipe promise this or more


def check_rate(rate: Any, name: str) -> int:
    """Returns `rate` as an int, in hertz.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is outside 1,000..768,000.
    """
    if isinstance(rate, bool) or not hasattr(rate, "__index__"):
        raise TypeError(f"{name} must be an integer number of hertz, got {rate!r}")
    rate = operator.index(rate)
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise ValueError(f"{name} must be between {_MIN_RATE:,} and {_MAX_RATE:,} Hz, got {rate:,}")
    return rate


def check_audio(audio: Any, name: str) -> np.ndarray:
    """Returns mono audio as a float32 array [W], from a numpy, jax or torch array or a list.

    Integer samples are refused rather than scaled: 16-bit values in an int64 array and real
    16-bit audio cannot be told apart.

    Args:
        audio: The samples, floating point, around -1..1.
        name: What errors call it.

    Raises:
        TypeError: It is a path, or its samples are not floating point.
        ValueError: It is not one-dimensional, is empty, holds NaN or infinity, or its
            peak shows samples that were never scaled to -1..1.
    """
    if isinstance(audio, (str, os.PathLike)):
        raise TypeError(f"{name} is a path ({str(audio)!r}); load it with csm_jax.audio.read_audio")
    if hasattr(audio, "detach") and hasattr(audio, "cpu"):  # torch, without importing it
        audio = audio.detach().cpu()
        if str(audio.dtype) == "torch.bfloat16":
            audio = audio.float()  # numpy has no bfloat16
    samples = np.asarray(audio)
    if samples.dtype.name != "bfloat16" and not np.issubdtype(samples.dtype, np.floating):
        hint = ""
        if np.issubdtype(samples.dtype, np.integer):
            scale = 1 << (8 * samples.dtype.itemsize - 1)
            hint = f"; for {samples.dtype} recordings divide by {scale:,}"
        raise TypeError(f"{name} must hold floating-point samples, got {samples.dtype}{hint}")
    if samples.ndim != 1:
        raise ValueError(
            f"{name} must be mono with shape [samples], got {list(samples.shape)}; "
            "take one channel, or average them"
        )
    if samples.size == 0:
        raise ValueError(f"{name} is empty")
    samples = samples.astype(np.float32)
    finite = np.isfinite(samples)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"{name} holds {int((~finite).sum()):,} NaN or infinite samples, "
            f"the first ({samples[first]}) at sample {first:,}"
        )
    peak = float(np.abs(samples).max())
    if peak > _MAX_PEAK:
        raise ValueError(
            f"{name} has a peak of {peak:,.0f} but samples belong in -1..1; "
            "for 16-bit recordings divide by 32,768"
        )
    return samples


# --- resampling --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _filter_bank(orig: int, new: int) -> tuple[int, list[tuple[int, np.ndarray]]]:
    # A block of `orig` input samples gives `new` outputs; output j sits at input time j·orig/new.
    # The sinc is non-zero only near that time, so outputs are grouped and each group keeps just
    # the inputs it touches: [(first input of the group, taps [inputs, outputs])].
    cutoff = min(orig, new) * _ROLLOFF
    width = math.ceil(_ZERO_CROSSINGS * orig / cutoff)
    groups = []
    for first in range(0, new, _PHASES_PER_GROUP):
        last = min(first + _PHASES_PER_GROUP, new) - 1
        low = first * orig // new - width
        high = min(-(-last * orig // new) + width, orig + width - 1)
        inputs = np.arange(low, high + 1, dtype=np.float64)[:, None] / orig
        outputs = np.arange(first, last + 1, dtype=np.float64)[None, :] / new
        crossings = np.clip((inputs - outputs) * cutoff, -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
        window = np.cos(crossings * np.pi / _ZERO_CROSSINGS / 2) ** 2
        taps = np.sinc(crossings) * window * (cutoff / orig)
        groups.append((low, taps.astype(np.float32)))
    return width, groups


def _filter_blocks(padded: np.ndarray, blocks: int, orig: int, new: int) -> np.ndarray:
    # `padded` starts `width` samples before the first block and ends no less after the last.
    width, groups = _filter_bank(orig, new)
    out = np.empty((blocks, new), np.float32)
    column = 0
    for low, taps in groups:
        span, phases = taps.shape
        windows = np.lib.stride_tricks.sliding_window_view(padded[low + width :], span)[::orig]
        rows = max(1, _GATHER_ELEMENTS // span)
        for start in range(0, blocks, rows):
            stop = min(start + rows, blocks)
            # BLAS refuses overlapping rows, and numpy would fall back to a scalar loop.
            gathered = np.ascontiguousarray(windows[start:stop])
            out[start:stop, column : column + phases] = gathered @ taps
        column += phases
    return out.reshape(-1)


class StreamResampler:
    """The resampler fed piece by piece; the pieces joined equal `resample` of the joined input.

    It holds back about `width` input samples (7 at 24,000 to 44,100 Hz: 0.3 ms) plus an unfinished
    block of at most `orig_rate / gcd` samples.
    """

    def __init__(self, orig_rate: int, new_rate: int) -> None:
        orig_rate, new_rate = check_rate(orig_rate, "orig_rate"), check_rate(new_rate, "new_rate")
        divisor = math.gcd(orig_rate, new_rate)
        self._orig, self._new = orig_rate // divisor, new_rate // divisor
        self._width = 0 if self._orig == self._new else _filter_bank(self._orig, self._new)[0]
        self._pending = np.zeros(self._width, np.float32)
        self._received = self._sent = 0

    def push(self, audio: np.ndarray) -> np.ndarray:
        """Returns the float32 samples that became final with `audio` (float32 [w])."""
        self._received += audio.size
        if self._orig == self._new:
            self._sent += audio.size
            return audio.astype(np.float32)
        self._pending = np.concatenate([self._pending, audio.astype(np.float32)])
        blocks = (self._pending.size - 2 * self._width) // self._orig
        if blocks <= 0:
            return np.zeros(0, np.float32)
        out = _filter_blocks(self._pending, blocks, self._orig, self._new)
        self._pending = self._pending[blocks * self._orig :]
        self._sent += out.size
        return out

    def flush(self) -> np.ndarray:
        """Returns the remaining samples, as if silence followed, so that the total length is
        `ceil(new_rate * samples / orig_rate)`, and starts afresh.
        """
        missing = -(-self._new * self._received // self._orig) - self._sent
        out = np.zeros(0, np.float32)
        if missing:
            out = self.push(np.zeros(self._width + self._orig, np.float32))[:missing]
        self._pending = np.zeros(self._width, np.float32)
        self._received = self._sent = 0
        return out


def resample(audio: np.ndarray, orig_rate: int, new_rate: int) -> np.ndarray:
    """Returns `audio` [W] at another rate: float32 [ceil(W * new_rate / orig_rate)].

    Equals torchaudio's `functional.resample` with its default arguments (`sinc_interp_hann`,
    `lowpass_filter_width=6`, `rolloff=0.99`) to float32 rounding. Equal rates copy.

    Raises:
        TypeError: A rate is not an integer.
        ValueError: A rate is out of range, or `audio` is not one-dimensional.
    """
    if audio.ndim != 1:
        raise ValueError(f"resample needs audio of shape [samples], got {list(audio.shape)}")
    resampler = StreamResampler(orig_rate, new_rate)
    return np.concatenate([resampler.push(audio), resampler.flush()])


# --- files -------------------------------------------------------------------------------------


def read_audio(
    path: str | os.PathLike[str],
    *,
    mono: Literal["mean"] | None = None,
    max_duration_s: float = 600.0,
) -> tuple[np.ndarray, int]:
    """Returns (float32 samples [W], sample rate) of a wav, flac, mp3, ogg or other sound file.

    Args:
        path: The file.
        mono: None refuses files with several channels; "mean" averages them.
        max_duration_s: Longer files are refused: by their header where that tells, and while
            decoding otherwise, so a small file never unpacks into an unbounded array.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not audio, has several channels and `mono` is None, is empty, cut short or
            too long, or holds NaN or infinity.
    """
    import soundfile

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no audio file at {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            if channels > 1 and mono is None:
                error = ValueError(
                    f"{path} has {channels} channels and CSM needs one: write a mono file "
                    f"(for example: ffmpeg -i {path.name} -ac 1 mono.wav)"
                )
                # A note is seen where the call is written: in Python, not on the command line.
                error.add_note('or average the channels: read_audio(path, mono="mean")')
                raise error
            check_promise(path, file.extra_info)
            budget = int(max_duration_s * rate)
            too_long = f"{path} is longer than the {max_duration_s:g} s allowed; cut it"
            if 0 < budget < file.frames < 1 << 62:  # unknown lengths are reported as 2**63 - 1
                raise ValueError(f"{too_long} (its header says {file.frames / rate:,.1f} s)")
            blocks, decoded = [], 0
            while True:
                block = file.read(_READ_BLOCK // channels, dtype="float32", always_2d=True)
                if not len(block):
                    break
                decoded += len(block)
                if decoded > budget:
                    raise ValueError(too_long)
                blocks.append(block.mean(axis=1, dtype=np.float32) if channels > 1 else block[:, 0])
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip() or "it is damaged or cut short"
        raise ValueError(f"{path} cannot be read as audio: {reason}") from error
    if not decoded:
        raise ValueError(f"{path} holds no audio")
    return check_audio(np.concatenate(blocks), str(path)), check_rate(
        rate, f"sample rate of {path}"
    )


def check_promise(path: str | Path, notes: str) -> None:
    """Checks that the audio that a header promises is there.

    Args:
        path: What the error calls it.
        notes: libsndfile's on the opened file (`extra_info`).

    Raises:
        ValueError: Some of it is missing.
    """
    found = _PROMISED_BYTES.search(notes)
    if found is None:
        return
    promised, there = map(int, found.groups())
    if there < promised < _UNKNOWN_BYTES:
        raise ValueError(
            f"{path} is cut short: its header promises {promised:,} bytes of audio and {there:,} "
            "are there; get it again"
        )


def _target(path: str | os.PathLike[str]) -> Path:
    # Through a symbolic link, so that replacing the file keeps the link.
    target = Path(os.path.realpath(path))
    if Path(path).suffix.lower() not in _FORMATS:
        raise ValueError(
            f"cannot write {path}: its name must end in {' or '.join(_FORMATS)}, "
            f"not {Path(path).suffix!r}"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {target.parent}")
    if target.exists() and not target.is_file():
        raise ValueError(f"cannot write {path}: it exists and is not a file")
    return target


def _create_beside(target: Path) -> tuple[Path, int]:
    # Not tempfile: its files are private to the user, and this one becomes the final file.
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.part")
    return temporary, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Checks that `write_audio(path, …)` can work; call it before generating.

    An existing file is left as it is.

    Raises:
        FileNotFoundError: The directory does not exist.
        ValueError: The suffix is not supported, or `path` is not a regular file.
        PermissionError: The directory does not let files be created (or another OSError says why).
    """
    target = _target(path)
    try:
        # By trying: permission bits alone say nothing about read-only mounts or a root user.
        temporary, descriptor = _create_beside(target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(descriptor)
    temporary.unlink()


def _cannot_write(path: str | os.PathLike[str], error: OSError) -> OSError:
    return type(error)(error.errno, f"cannot write {path}: {error.strerror or error}")


def encode_audio(samples: np.ndarray, rate: int, kind: Literal["WAV", "FLAC"]) -> bytes:
    """Returns a 16-bit file of checked mono samples, those beyond -1..1 clipped.

    In memory: in the middle of a file, the library would meet a full disk in a callback.

    Raises:
        soundfile.LibsndfileError: The format cannot say this rate.
    """
    import soundfile

    encoded = io.BytesIO()
    soundfile.write(encoded, np.clip(samples, -1.0, 1.0), rate, format=kind, subtype="PCM_16")
    return encoded.getvalue()


def write_audio(path: str | os.PathLike[str], audio: Any, rate: int) -> None:
    """Writes mono audio as 16-bit WAV or FLAC, by the suffix of `path`.

    The samples go to a temporary file beside it, which then takes its name: an existing file is
    replaced only when the new one is complete. Samples beyond -1..1 are clipped. Audio of no
    samples gives a valid empty file (a model may end at once).

    Raises:
        FileNotFoundError: The directory does not exist.
        ValueError: Unsupported suffix, or bad audio (see `check_audio`).
        TypeError: The samples are not floating point.
        OSError: The disk is full or not writable; the message names `path`.
    """
    import soundfile

    target = _target(path)
    rate = check_rate(rate, "rate")
    empty = getattr(audio, "shape", None) == (0,)
    samples = np.zeros(0, np.float32) if empty else check_audio(audio, "audio")
    try:
        encoded = encode_audio(samples, rate, _FORMATS[Path(path).suffix.lower()])
    except soundfile.LibsndfileError as error:
        raise OSError(f"cannot write {path}: {error.error_string}") from error
    try:
        _place(target, encoded)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _place(target: Path, data: bytes) -> None:
    temporary, descriptor = _create_beside(target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C must not leave the temporary file behind either
        temporary.unlink(missing_ok=True)
        raise
