"""Audio watermark, silentcipher's 44.1 kHz model: embedding, streaming and detection.

The path is the reference's: resample to 44.1 kHz, bring to a reference level, take a spectrogram
(frames of 4,096 samples, 2,048 apart), lower each bin by what the networks say (36 dB below the
audio), go back to samples with the phases unchanged, undo the level, resample back. The key's
5 bytes make 20 two-bit symbols; with an end symbol they repeat every 21 frames (0.975 s).

Sources: sony/silentcipher `server.py`, SesameAILabs/csm `watermarking.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from csm_jax.audio import StreamResampler, check_audio, check_rate, resample
from csm_jax.bridge import missing_dependency
from csm_jax.watermark_key import DEFAULT_KEY, check_key

try:
    import torch
except ImportError as error:
    raise missing_dependency("torch", "the audio watermark") from error

from csm_jax.bridge.silentcipher import Networks, load_networks

MESSAGE_SDR_DB = 36.0
"""How far the mark lies below the audio (SesameAILabs/csm `watermarking.py`)."""

_REFERENCE_POWER = 0.002837200844477648  # mean square of VCTK speech (silentcipher `server.py`)

# A stream marks windows of one message period, so every window's statistics see each symbol once:
# 10 frames already sent, 7 to send, 3 ahead (one the spectrogram and the cross-fade need, two so
# that the frames sent do not sit at the edge of the networks' view), and the frame that ends them.
_STEP_FRAMES, _AHEAD_FRAMES, _PAST_FRAMES = 7, 3, 10

# Reading costs seconds of CPU per second of audio, so a mark is read from the loudest 20 s, and its
# phase is searched over the loudest 3 s: in quarters of a frame, then halving steps around the best.
# A mark reads well while frames are off by much less than their length; the package tries every 10
# samples over the whole file.
_READ_PERIODS, _SEARCH_PERIODS = 20, 3
_COARSE_SHIFTS = 4
_FINE_ROUNDS = 3
_MIN_AGREEMENT = 0.6


class TorchWatermarker:
    """Embeds and detects watermarks with silentcipher's networks, on any torch device."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._hop = networks.n_fft // 2
        # torch's Hann window is the periodic one, as silentcipher uses it.
        self._window = torch.hann_window(networks.n_fft, device=networks.device)

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str], *, device: str = "cpu") -> TorchWatermarker:
        """Returns the watermarker whose files (hparams.yaml, enc_c.ckpt, dec_c.ckpt, dec_m_0.ckpt:
        sony/silentcipher, 44_1_khz/73999_iteration) are in the directory `path`.

        Raises:
            FileNotFoundError: Files are missing.
            ValueError: A file is damaged or belongs to another model.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no directory of watermark files at {path}")
        with torch.inference_mode():
            return cls(load_networks(path, device=device))

    def embed(self, audio: np.ndarray, sample_rate: int, key: Iterable[int]) -> np.ndarray:
        """Returns `audio` (float [W], hertz) with the key in it: float32 [W].

        Silence (power 0) has nothing to hide a mark in and comes back unmarked; so does audio of no
        samples. Above 44.1 kHz, frequencies over 22.05 kHz are lost.

        Raises:
            TypeError, ValueError: Bad audio, rate or key.
        """
        stream_key, sample_rate = check_key(key), check_rate(sample_rate, "sample_rate")
        if getattr(audio, "shape", None) == (0,):
            return np.zeros(0, np.float32)
        samples = check_audio(audio, "audio")
        inside = resample(samples, sample_rate, self._networks.sample_rate)
        power = _power(inside)
        if power == 0:
            return samples
        with torch.inference_mode():
            spectrum = self._spectrum(self._frame_samples(inside))
            marked = self._samples(
                self._mark(spectrum, self._symbols(stream_key, 0, spectrum.shape[1]), power)
            )
        marked = marked[: inside.size]
        # Two roundings up can leave one sample more than came in.
        return resample(marked, self._networks.sample_rate, sample_rate)[: samples.size]

    def open_stream(self, sample_rate: int, key: Iterable[int]) -> WatermarkStream:
        """Returns a watermarker for audio that arrives piece by piece.

        Raises:
            TypeError, ValueError: Bad rate or key.
        """
        return WatermarkStream(self, check_rate(sample_rate, "sample_rate"), check_key(key))

    def detect(self, audio: np.ndarray, sample_rate: int) -> tuple[int, ...] | None:
        """Returns the key in `audio` (float [W], hertz), or None where no mark is read.

        The start of the file need not be the start of the marked audio. Under 0.975 s, nothing can
        be read. Noise passes for some key in a few percent of very short files, never for a given
        one: to ask about a given key, use `verify`.

        Raises:
            TypeError, ValueError: Bad audio or rate.
        """
        reading = self._search(audio, sample_rate, DEFAULT_KEY)
        return reading.key if reading.agreement >= _MIN_AGREEMENT else None

    def verify(self, audio: np.ndarray, sample_rate: int, key: Iterable[int]) -> bool:
        """Returns whether `audio` carries this key, by the reference's rule: all 40 bits equal.

        Raises:
            TypeError, ValueError: Bad audio, rate or key.
        """
        expected = check_key(key)
        return self._search(audio, sample_rate, expected).key == expected

    # --- spectrogram ---------------------------------------------------------------------------

    def _frame_samples(self, samples: np.ndarray) -> np.ndarray:
        # Frame f is centred on sample f·hop. silentcipher fills up to whole frames with 1..n_fft
        # zeros, and torch's STFT mirrors half a frame at both ends.
        n_fft, hop = self._networks.n_fft, self._hop
        padded = np.pad(samples, (0, n_fft - samples.size % n_fft))
        return np.pad(padded, hop, mode="reflect")

    def _spectrum(self, samples: np.ndarray) -> torch.Tensor:
        # complex [bins, frames]
        tensor = torch.from_numpy(np.ascontiguousarray(samples)).to(self._networks.device)
        frames = tensor.unfold(0, self._networks.n_fft, self._hop)
        return torch.fft.rfft(frames * self._window).T

    def _samples(self, spectrum: torch.Tensor) -> np.ndarray:
        # Overlap-add: (frames - 1)·hop samples from the centre of the first frame to the last's.
        frames = torch.fft.irfft(spectrum.T, n=self._networks.n_fft) * self._window
        first, second = self._window.square().split(self._hop)
        joined = frames[:-1, self._hop :] + frames[1:, : self._hop]
        return (joined / (first + second)).reshape(-1).cpu().numpy()

    # --- marking -------------------------------------------------------------------------------

    def _symbols(self, key: tuple[int, ...], first_frame: int, frames: int) -> torch.Tensor:
        pairs = [value >> shift & 3 for value in key for shift in (6, 4, 2, 0)]
        period = np.array([pair + 1 for pair in pairs] + [0])
        tiled = period[np.arange(first_frame, first_frame + frames) % self._networks.message_len]
        return torch.from_numpy(tiled).to(self._networks.device)

    def _mark(
        self,
        spectrum: torch.Tensor,
        symbols: torch.Tensor,
        power: float,
        frame_power: float | None = None,
    ) -> torch.Tensor:
        # `power`: mean square of the utterance's samples; `frame_power`: of its magnitudes, where
        # `spectrum` is only a part of the utterance.
        carrier = spectrum.abs()
        gain = (_REFERENCE_POWER / power) ** 0.5
        if frame_power is None:
            frame_power = float(carrier.square().mean(dtype=torch.float64))
        level = gain * frame_power**0.5 / 10 ** (MESSAGE_SDR_DB / 20)
        mark = self._networks.mark(carrier * gain, symbols) * level / gain
        if not mark.isfinite().all():
            raise RuntimeError("the watermark networks returned NaN or infinity for this audio")
        lowered = torch.relu(carrier - mark)
        return spectrum * torch.where(carrier > 0, lowered / carrier, 0.0)

    # --- detection -----------------------------------------------------------------------------

    def _search(self, audio: np.ndarray, sample_rate: int, known: tuple[int, ...]) -> _Reading:
        # `known` ends the search at once: 40 equal bits are no accident. Otherwise the clearest
        # phase wins, since a reading between two frames can be consistent and still wrong.
        sample_rate = check_rate(sample_rate, "sample_rate")
        inside = resample(check_audio(audio, "audio"), sample_rate, self._networks.sample_rate)
        power = _power(inside)
        if power == 0:
            return _NOTHING
        inside *= np.float32((_REFERENCE_POWER / power) ** 0.5)
        # Excerpts begin on a frame, so a phase found in one holds for the other.
        inside = self._loudest(inside, _READ_PERIODS)
        reading = self._read(inside, 0)
        if reading.key == known:
            return reading
        excerpt = self._loudest(inside, _SEARCH_PERIODS)
        step = self._hop // _COARSE_SHIFTS
        shifts, clarity = list(range(0, self._hop, step)), {}
        for _ in range(_FINE_ROUNDS + 1):
            for shift in shifts:
                reading = self._read(excerpt, shift % self._hop)
                if reading.key == known:
                    return reading
                clarity[shift % self._hop] = reading.clarity
            best = max(clarity, key=clarity.__getitem__)
            step //= 2
            shifts = [best - step, best + step]
        return self._read(inside, max(clarity, key=clarity.__getitem__))

    def _loudest(self, samples: np.ndarray, periods: int) -> np.ndarray:
        frames = periods * self._networks.message_len + 1
        whole = samples[: samples.size // self._hop * self._hop].reshape(-1, self._hop)
        if len(whole) <= frames:
            return samples
        energy = np.cumsum(np.square(whole, dtype=np.float64).sum(axis=1))
        energy = energy[frames - 1 :] - np.concatenate([[0.0], energy[:-frames]])
        start = int(energy.argmax()) * self._hop
        return samples[start : start + frames * self._hop]

    def _read(self, samples: np.ndarray, shift: int) -> _Reading:
        period = self._networks.message_len
        samples = samples[shift:]
        if samples.size < self._hop:
            return _NOTHING
        with torch.inference_mode():
            spectrum = self._spectrum(self._frame_samples(samples))
            scores = self._networks.read(spectrum.abs())
        frames = scores.shape[1] // period * period
        if not frames or not scores.isfinite().all():
            return _NOTHING
        top = scores[:, :frames].topk(2, dim=0).values
        margin = float((top[0] - top[1]).mean())
        read = scores[:, :frames].argmax(dim=0).cpu().numpy().reshape(-1, period)
        votes = (read[:, :, None] == np.arange(scores.shape[0])).sum(axis=0)
        message = votes.argmax(axis=1)
        agreement = float(votes.max(axis=1).mean() / len(read))
        ends = np.flatnonzero(message == 0)
        if len(ends) != 1:
            return _Reading(None, agreement, agreement * margin)
        pairs = np.roll(message, -int(ends[0]) - 1)[:-1] - 1
        values = pairs.reshape(-1, 4) @ np.array([64, 16, 4, 1])
        return _Reading(tuple(int(value) for value in values), agreement, agreement * margin)


@dataclass(frozen=True)
class _Reading:
    """A message read at one phase.

    Attributes:
        key: The key, or None where the message has not exactly one end symbol.
        agreement: How far the periods agree on their symbols, 0..1.
        clarity: The same, times how far the best symbol's score leads.
    """

    key: tuple[int, ...] | None
    agreement: float
    clarity: float


_NOTHING = _Reading(None, 0.0, 0.0)


class WatermarkStream:
    """Marks audio as it arrives; open it with `TorchWatermarker.open_stream`.

    What comes out is the input, marked, delayed by 511 ms and ended by `flush`: windows of one
    message period, a third of a period apart, joined by cross-fades of 46 ms. Each frame carries
    the symbol it would carry in `embed` of the whole, so the message reads the same. The samples
    differ a little from `embed`'s, because levels and statistics come from what has been heard so
    far; an utterance that ends within the first 511 ms is marked exactly as `embed` would.

    The size of the pieces pushed does not change the result.
    """

    def __init__(
        self, watermarker: TorchWatermarker, sample_rate: int, key: tuple[int, ...]
    ) -> None:
        self._watermarker, self._key = watermarker, key
        self._hop = watermarker._hop
        inside_rate = watermarker._networks.sample_rate
        self._resample_in = StreamResampler(sample_rate, inside_rate)
        self._resample_out = StreamResampler(inside_rate, sample_rate)
        self._taken = self._given = 0  # samples at the caller's rate
        self._samples = np.zeros(0, np.float32)  # at silentcipher's rate, from hop `_base` on
        self._base = 0
        self._next = 0  # the first hop (frame to frame) not yet sent
        self._tail: np.ndarray | None = None  # that hop as the previous window marked it
        self._power_sum, self._power_count = 0.0, 0
        self._frame_sum, self._frame_count = 0.0, 0
        self._closed = False

    def push(self, audio: np.ndarray) -> np.ndarray:
        """Returns the marked samples (float32 [w]; none is usual) that `audio` (float) completes.

        Raises:
            TypeError, ValueError: Bad audio.
            RuntimeError: The stream was flushed.
        """
        if self._closed:
            raise RuntimeError("this watermark stream was flushed; open another with open_stream()")
        if getattr(audio, "shape", None) != (0,):
            samples = check_audio(audio, "audio")
            self._taken += samples.size
            self._samples = np.concatenate([self._samples, self._resample_in.push(samples)])
        return self._give(self._resample_out.push(self._mark_complete()))

    def flush(self) -> np.ndarray:
        """Returns the rest (float32 [w]), so that as many samples came out as went in; ends the
        stream.

        Raises:
            RuntimeError: The stream was flushed before.
        """
        if self._closed:
            raise RuntimeError("this watermark stream was flushed; open another with open_stream()")
        self._closed = True
        self._samples = np.concatenate([self._samples, self._resample_in.flush()])
        pieces = [self._mark_complete()]
        end = self._base * self._hop + self._samples.size
        if end > self._next * self._hop:
            n_fft = self._watermarker._networks.n_fft
            filled = end + n_fft - end % n_fft
            marked = self._window(filled // self._hop, filled - end)
            pieces.append(marked[: end - self._next * self._hop])
        marked = np.concatenate(pieces)
        return self._give(
            np.concatenate([self._resample_out.push(marked), self._resample_out.flush()])
        )

    def _give(self, audio: np.ndarray) -> np.ndarray:
        audio = audio[: self._taken - self._given]
        self._given += audio.size
        return audio

    def _mark_complete(self) -> np.ndarray:
        pieces = [np.zeros(0, np.float32)]
        while True:
            last = self._next + _STEP_FRAMES + _AHEAD_FRAMES
            if self._base * self._hop + self._samples.size < (last + 1) * self._hop:
                return np.concatenate(pieces)
            marked = self._window(last, 0)
            size = _STEP_FRAMES * self._hop
            pieces.append(marked[:size])
            self._tail = marked[size : size + self._hop]
            self._next += _STEP_FRAMES
            drop = max(self._next - _PAST_FRAMES - 1, 0) - self._base
            self._samples = self._samples[drop * self._hop :]
            self._base += drop

    def _window(self, last: int, zeros: int) -> np.ndarray:
        # The samples from hop `_next` to frame `last`, marked. `zeros` > 0 ends the utterance.
        first, hop, marker = max(self._next - _PAST_FRAMES, 0), self._hop, self._watermarker
        begin = max(first - 1, 0)
        samples = self._samples[(begin - self._base) * hop :]
        if zeros:
            framed = np.pad(np.pad(samples, (0, zeros)), (0, hop), mode="reflect")
        else:
            samples = framed = samples[: (last + 1 - begin) * hop]
        if first == 0:
            framed = np.pad(framed, (hop, 0), mode="reflect")
        end = begin * hop + samples.size
        fresh = samples[self._power_count - begin * hop :].astype(np.float64)
        self._power_sum += float(np.square(fresh).sum())
        self._power_count = end
        if self._power_sum == 0:  # only silence so far: nothing to hide a mark in
            self._frame_count = last + 1
            marked = np.pad(samples, (0, zeros))[(first - begin) * hop :]
        else:
            with torch.inference_mode():
                spectrum = marker._spectrum(framed)
                powers = spectrum[:, self._frame_count - first :].abs().square()
                self._frame_sum += float(powers.mean(dim=0, dtype=torch.float64).sum())
                self._frame_count = last + 1
                marked = marker._samples(
                    marker._mark(
                        spectrum,
                        marker._symbols(self._key, first, last + 1 - first),
                        self._power_sum / self._power_count,
                        self._frame_sum / self._frame_count,
                    )
                )
        marked = marked[(self._next - first) * hop :].copy()
        if self._tail is not None:
            fade = (np.arange(hop, dtype=np.float32) + 0.5) / hop
            marked[:hop] = self._tail * (1 - fade) + marked[:hop] * fade
        return marked


def _power(samples: np.ndarray) -> float:
    return float(np.square(samples, dtype=np.float64).mean())
