"""Embedding and detecting the watermark of silentcipher's 44.1 kHz model, over any `Networks`.

The path is the reference's: resample to 44.1 kHz, bring to a reference level, take a spectrogram
(frames of 4,096 samples, 2,048 apart), lower each bin by what the networks say (36 dB below the
audio), go back to samples with the phases unchanged, undo the level, resample back. The message
repeats every 21 frames (0.975 s).

Sources: sony/silentcipher `server.py`, SesameAILabs/csm `watermarking.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from csm_jax.audio import check_audio, check_rate, resample
from csm_jax.watermark import message, stft
from csm_jax.watermark.interface import MarkJob, Networks, check_marked, gain_of
from csm_jax.watermark.message import NOTHING, Reading
from csm_jax.watermark.stream import WatermarkStream
from csm_jax.watermark_key import DEFAULT_KEY, check_key

# Reading costs a CPU about half as long as the audio lasts, so a mark is read from the loudest 20 s,
# and its phase is searched over the loudest 3 s: in quarters of a frame, then in sixteenths around
# the best. A mark reads well while frames are off by much less than their length; the package tries
# every 10 samples over the whole file.
_READ_PERIODS, _SEARCH_PERIODS = 20, 3
_COARSE_SHIFTS = (0.0, 0.25, 0.5, 0.75)  # in hops
_FINE_SHIFTS = (-0.125, -0.0625, 0.0625, 0.125)  # from the best of those
_MIN_AGREEMENT = 0.6


class Watermarker:
    """Embeds and detects watermarks."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._sizes = networks.sizes

    def embed(self, audio: np.ndarray, sample_rate: int, key: Iterable[int]) -> np.ndarray:
        """Returns `audio` (float [W], hertz) with the key in it: float32 [W].

        Silence (power 0) has nothing to hide a mark in and comes back unmarked; so does audio of no
        samples. Above 44.1 kHz, frequencies over 22.05 kHz are lost.

        Raises:
            TypeError, ValueError: Bad audio, rate or key.
            RuntimeError: The networks returned NaN or infinity.
        """
        return self.embed_batch([audio], sample_rate, key)[0]

    def embed_batch(
        self, audios: Sequence[np.ndarray], sample_rate: int, key: Iterable[int]
    ) -> list[np.ndarray]:
        """Returns each of `audios` as `embed` would, the device working on them without a pause.

        They may differ in length and do not change each other.

        Raises:
            TypeError, ValueError: Bad audio (named by its place), rate or key; nothing is marked.
            RuntimeError: The networks returned NaN or infinity.
        """
        key, sample_rate = check_key(key), check_rate(sample_rate, "sample_rate")
        outputs, jobs = [], []
        for place, audio in enumerate(audios):
            name = "audio" if len(audios) == 1 else f"audios[{place}]"
            empty = getattr(audio, "shape", None) == (0,)
            samples = np.zeros(0, np.float32) if empty else check_audio(audio, name)
            outputs.append(samples)
            inside = resample(samples, sample_rate, self._sizes.sample_rate)
            if power := _power(inside):
                jobs.append((place, inside.size, self._job(inside, power, key)))
        marked = self._networks.mark([job for _, _, job in jobs])
        for (place, size, _), result in zip(jobs, marked, strict=True):
            inside = check_marked(result.samples)[:size]
            # Two roundings up can leave one sample more than came in.
            whole = resample(inside, self._sizes.sample_rate, sample_rate)
            outputs[place] = whole[: outputs[place].size]
        return outputs

    def _job(self, samples: np.ndarray, power: float, key: tuple[int, ...]) -> MarkJob:
        framed = self._framed(samples)
        frames = framed.size // self._sizes.hop - 1
        return MarkJob(
            framed=framed,
            symbols=message.symbols(key, 0, frames),
            gain=gain_of(power),
            first_new=0,
            past_power=0.0,
            power_frames=frames,
        )

    def _framed(self, samples: np.ndarray) -> np.ndarray:
        filled = stft.fill(samples, self._sizes.n_fft)
        return stft.mirror(filled, self._sizes.hop, start=True, end=True)

    def open_stream(self, sample_rate: int, key: Iterable[int]) -> WatermarkStream:
        """Returns a watermarker for audio that arrives piece by piece.

        Raises:
            TypeError, ValueError: Bad rate or key.
        """
        return WatermarkStream(
            self._networks, check_rate(sample_rate, "sample_rate"), check_key(key)
        )

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

    def _search(self, audio: np.ndarray, sample_rate: int, known: tuple[int, ...]) -> Reading:
        # `known` ends the search at once: 40 equal bits are no accident. Otherwise the clearest
        # phase wins, since a reading between two frames can be consistent and still wrong.
        sample_rate = check_rate(sample_rate, "sample_rate")
        inside = resample(check_audio(audio, "audio"), sample_rate, self._sizes.sample_rate)
        power = _power(inside)
        if power == 0:
            return NOTHING
        inside *= np.float32(gain_of(power))
        # Excerpts begin on a frame, so a phase found in one holds for the other.
        inside = self._loudest(inside, _READ_PERIODS)
        (reading,) = self._read(inside, [0])
        if reading.key == known:
            return reading
        excerpt, hop = self._loudest(inside, _SEARCH_PERIODS), self._sizes.hop
        clarity: dict[int, float] = {}
        best = 0
        for offsets in (_COARSE_SHIFTS, _FINE_SHIFTS):
            shifts = [round(best + offset * hop) % hop for offset in offsets]
            readings = self._read(excerpt, shifts)
            for reading in readings:
                if reading.key == known:
                    return reading
            clarity |= {
                shift: reading.clarity for shift, reading in zip(shifts, readings, strict=True)
            }
            best = max(clarity, key=clarity.__getitem__)
        (reading,) = self._read(inside, [best])
        return reading

    def _loudest(self, samples: np.ndarray, periods: int) -> np.ndarray:
        hop = self._sizes.hop
        frames = periods * self._sizes.message_len + 1
        whole = samples[: samples.size // hop * hop].reshape(-1, hop)
        if len(whole) <= frames:
            return samples
        energy = np.cumsum(np.square(whole, dtype=np.float64).sum(axis=1))
        energy = energy[frames - 1 :] - np.concatenate([[0.0], energy[:-frames]])
        start = int(energy.argmax()) * hop
        return samples[start : start + frames * hop]

    def _read(self, samples: np.ndarray, shifts: Sequence[int]) -> list[Reading]:
        period = self._sizes.message_len
        framed = [self._framed(samples[shift:]) for shift in shifts]
        # Too short for a message at one phase: not worth asking the networks.
        if min(audio.size for audio in framed) // self._sizes.hop - 1 < period:
            return [NOTHING] * len(shifts)
        return [message.read(scores, period) for scores in self._networks.read(framed)]


def _power(samples: np.ndarray) -> float:
    return float(np.square(samples, dtype=np.float64).mean()) if samples.size else 0.0
