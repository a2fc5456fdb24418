"""The networks of silentcipher's 44.1 kHz model in torch, a second implementation of `Networks`.

What they compute is told in `csm_jax.watermark.network`; files, levels, messages and streams are
`csm_jax.watermark`'s. Only the checkpoint files are used, not the `silentcipher` package: importing
it needs librosa and pydub for its file handling, and its STFT is a process-wide singleton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.bridge import missing_dependency
from csm_jax.watermark import stft
from csm_jax.watermark.files import Layer, Sizes, Weights
from csm_jax.watermark.interface import MESSAGE_SDR_DB, Marked, MarkJob

try:
    import torch
    from torch.nn import functional
except ImportError as error:
    raise missing_dependency(error.name or "torch", "the audio watermark in torch") from error

_CHUNK_FRAMES = 32  # frames convolved at once: bounds memory, changes nothing else
_BATCH_NORM_EPS = 1e-5


@dataclass(frozen=True)
class _Layer:
    weight: torch.Tensor  # [2 * out, in, kernel, kernel]: the convolution's rows, then the gate's
    bias: torch.Tensor  # [2 * out]
    scale: torch.Tensor  # [out, 1, 1]
    shift: torch.Tensor  # [out, 1, 1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output [out, bins, frames] for x [in, bins, frames]."""
        frames, pad = x.shape[2], self.weight.shape[3] // 2
        out = x.new_empty(len(self.scale), x.shape[1], frames)
        for start in range(0, frames, _CHUNK_FRAMES):
            stop = min(start + _CHUNK_FRAMES, frames)
            low, high = max(start - pad, 0), min(stop + pad, frames)
            y = functional.conv2d(x[None, :, :, low:high], self.weight, self.bias, padding=pad)
            value, gate = y[0, :, :, start - low : stop - low].chunk(2)
            out[:, :, start:stop] = value * torch.sigmoid(gate)
        variance, mean = torch.var_mean(out, dim=(1, 2), correction=0, keepdim=True)
        scale = self.scale / torch.sqrt(variance + _BATCH_NORM_EPS)
        return out.mul_(scale).add_(self.shift - mean * scale)


class TorchNetworks:
    """The networks on a torch device; see `csm_jax.watermark.interface.Networks`."""

    def __init__(self, sizes: Sizes, weights: Weights, *, device: str) -> None:
        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.array(array, np.float32)).to(device)

        def stack(layers: Sequence[Layer]) -> list[_Layer]:
            return [
                _Layer(
                    tensor(x.weight),
                    tensor(x.bias),
                    tensor(x.scale)[:, None, None],
                    tensor(x.shift)[:, None, None],
                )
                for x in layers
            ]

        self.sizes = sizes
        self._device = device
        self._encoder, self._marker = stack(weights.encoder), stack(weights.marker)
        self._reader = stack(weights.reader)
        self._message = tensor(weights.message_weight), tensor(weights.message_bias)
        self._readout = tensor(weights.reader_weight), tensor(weights.reader_bias)
        # torch's Hann window is the periodic one, as silentcipher uses it.
        self._window = torch.hann_window(sizes.n_fft, device=device)

    @torch.inference_mode()
    def mark(self, jobs: Sequence[MarkJob]) -> list[Marked]:
        """Returns each job's marked samples; no job changes another's."""
        return [self._mark_one(job) for job in jobs]

    @torch.inference_mode()
    def read(self, framed: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns each audio's scores, [frames, symbols]; the audio is at `REFERENCE_POWER`."""
        scores = []
        for samples in framed:
            x = self._spectrum(samples).abs()[None, : self.sizes.band]
            for layer in self._reader:
                x = layer(x)
            score = torch.einsum("sbt,b->ts", x, self._readout[0]) + self._readout[1]
            scores.append(score.cpu().numpy())
        return scores

    def _mark_one(self, job: MarkJob) -> Marked:
        spectrum = self._spectrum(job.framed)
        magnitude = spectrum.abs()
        powers = magnitude[:, job.first_new :].square().mean(dim=0, dtype=torch.float64)
        new_power = float(powers.sum())
        level = ((job.past_power + new_power) / job.power_frames) ** 0.5
        level /= 10 ** (MESSAGE_SDR_DB / 20)
        symbols = torch.from_numpy(job.symbols).to(self._device)
        lowered = torch.relu(magnitude - self._pattern(magnitude * job.gain, symbols) * level)
        spectrum = spectrum * torch.where(magnitude > 0, lowered / magnitude, 0.0)
        frames = torch.fft.irfft(spectrum.T, n=self.sizes.n_fft) * self._window
        return Marked(samples=stft.overlap_add(frames.cpu().numpy()), new_power=new_power)

    def _pattern(self, carrier: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        # What carries the message, >= 0 and of unit power per frame: [bins, frames].
        band = self.sizes.band
        weight, bias = self._message
        message = carrier.new_zeros(carrier.shape)
        message[:band] = weight[:, symbols] + bias[:, None]
        x = carrier[None]
        for layer in self._encoder:
            x = layer(x)
        x = torch.cat([x, carrier[None], message[None]])
        for layer in self._marker:
            x = layer(x)
        mark = x[0].abs()
        mark[band:] = 0
        power = mark.square().mean(dim=0, keepdim=True)
        return torch.where(power == 0, 0.0, mark / power.sqrt())

    def _spectrum(self, framed: np.ndarray) -> torch.Tensor:
        # complex [bins, frames]
        tensor = torch.from_numpy(np.ascontiguousarray(framed)).to(self._device)
        frames = tensor.unfold(0, self.sizes.n_fft, self.sizes.hop)
        return torch.fft.rfft(frames * self._window).T
