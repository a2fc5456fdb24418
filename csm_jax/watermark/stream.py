"""Marking audio while it arrives: windows of one message period, joined by cross-fades."""

from __future__ import annotations

import numpy as np

from csm_jax.audio import StreamResampler, check_audio
from csm_jax.watermark import message, stft
from csm_jax.watermark.interface import MarkJob, Networks, check_marked, gain_of

# A stream marks windows of one message period, so every window's statistics see each symbol once:
# 10 frames already sent, 7 to send, 3 ahead (one the spectrogram and the cross-fade need, two so
# that the frames sent do not sit at the edge of the networks' view), and the frame that ends them.
_STEP_FRAMES, _AHEAD_FRAMES, _PAST_FRAMES = 7, 3, 10


class WatermarkStream:
    """Marks audio as it arrives; open it with `Watermarker.open_stream`.

    What comes out is the input, marked, delayed by 511 ms and ended by `flush`: windows of one
    message period, a third of a period apart, joined by cross-fades of 46 ms. Each frame carries
    the symbol it would carry in `embed` of the whole, so the message reads the same. The samples
    differ a little from `embed`'s, because levels and statistics come from what has been heard so
    far; an utterance that ends within the first 511 ms is marked exactly as `embed` would.

    The size of the pieces pushed does not change the result.
    """

    def __init__(self, networks: Networks, sample_rate: int, key: tuple[int, ...]) -> None:
        self._networks, self._key = networks, key
        self._hop = networks.sizes.hop
        inside_rate = networks.sizes.sample_rate
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
            RuntimeError: The stream was flushed, or the networks returned NaN or infinity.
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
            RuntimeError: The stream was flushed before, or the networks returned NaN or infinity.
        """
        if self._closed:
            raise RuntimeError("this watermark stream was flushed; open another with open_stream()")
        self._closed = True
        self._samples = np.concatenate([self._samples, self._resample_in.flush()])
        pieces = [self._mark_complete()]
        end = self._base * self._hop + self._samples.size
        if end > self._next * self._hop:
            n_fft = self._networks.sizes.n_fft
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
        first, hop = max(self._next - _PAST_FRAMES, 0), self._hop
        begin = max(first - 1, 0)
        samples = self._samples[(begin - self._base) * hop :]
        if not zeros:
            samples = samples[: (last + 1 - begin) * hop]
        fresh = samples[self._power_count - begin * hop :].astype(np.float64)
        self._power_sum += float(np.square(fresh).sum())
        self._power_count = begin * hop + samples.size
        filled = np.pad(samples, (0, zeros))
        if self._power_sum == 0:  # only silence so far: nothing to hide a mark in
            marked = filled[(first - begin) * hop :]
        else:
            (result,) = self._networks.mark(
                [
                    MarkJob(
                        framed=stft.mirror(filled, hop, start=first == 0, end=zeros > 0),
                        symbols=message.symbols(self._key, first, last + 1 - first),
                        gain=gain_of(self._power_sum / self._power_count),
                        first_new=self._frame_count - first,
                        past_power=self._frame_sum,
                        power_frames=last + 1,
                    )
                ]
            )
            self._frame_sum += result.new_power
            marked = check_marked(result.samples)
        self._frame_count = last + 1
        marked = marked[(self._next - first) * hop :].copy()
        if self._tail is not None:
            fade = (np.arange(hop, dtype=np.float32) + 0.5) / hop
            marked[:hop] = self._tail * (1 - fade) + marked[:hop] * fade
        return marked
