"""The networks of silentcipher's 44.1 kHz model, run from its published checkpoint files.

Three stacks of gated convolutions over the magnitude spectrogram, [channels, bins, frames]:
`encoder` (carrier → features), `marker` (features, carrier and message → what to take off each
bin) and `reader` (spectrogram → message symbols). One layer is
`batch_norm(conv(x) * sigmoid(gate(x)))`.

The batch norms use the statistics of the very utterance, as in training: the silentcipher package
never switches its networks to evaluation, so that is how published marks are made and read.

Only the checkpoint files are used, not the `silentcipher` package: importing it needs librosa and
pydub for its file handling, and its STFT is a process-wide singleton.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm_jax.bridge import missing_dependency

try:
    import torch
    import yaml
    from torch.nn import functional
except ImportError as error:
    raise missing_dependency(error.name or "torch", "the audio watermark") from error

FILES = ("hparams.yaml", "enc_c.ckpt", "dec_c.ckpt", "dec_m_0.ckpt")
"""The files of a silentcipher directory, as published in sony/silentcipher."""

_FEATURES = 32  # channels of the encoder; also how often the package repeats carrier and message
_MARKER_WIDTH = 96
_READER_LAYERS = 10
_CHUNK_FRAMES = 32  # frames convolved at once: bounds memory, changes nothing else
_BATCH_NORM_EPS = 1e-5

# Other values select code paths of the package that its published 44.1 kHz model does not use.
_FIXED = {
    "n_messages": 1,
    "message_dim": 5,
    "message_len": 21,
    "ensure_negative_message": True,
    "utterance_level_normalization": True,
    "frame_level_normalization": False,
    "no_normalization": False,
}
_SIZES = ("SR", "N_FFT", "HOP_LENGTH", "message_band_size", "enc_n_layers", "dec_c_n_layers")


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


@dataclass(frozen=True)
class Networks:
    """The loaded networks and the sizes they were trained for.

    Attributes:
        sample_rate: Hertz.
        n_fft: Samples per spectrogram frame; frames are `n_fft // 2` apart.
        band: Bins that carry the message, from the lowest.
        message_len: Frames per period of the message, 21.
    """

    sample_rate: int
    n_fft: int
    band: int
    message_len: int
    _encoder: list[_Layer]
    _message_weight: torch.Tensor  # [band, message_dim]
    _message_bias: torch.Tensor  # [band]
    _marker: list[_Layer]
    _reader: list[_Layer]
    _reader_weight: torch.Tensor  # [band]
    _reader_bias: torch.Tensor  # []

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self._message_weight.device

    def mark(self, carrier: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Returns what carries the message, >= 0 and of unit power per frame: [bins, frames].

        Args:
            carrier: Magnitudes [bins, frames] of audio at silentcipher's reference level.
            symbols: One symbol (0 end, 1..4) per frame, int64 [frames].
        """
        message = carrier.new_zeros(carrier.shape)
        message[: self.band] = self._message_weight[:, symbols] + self._message_bias[:, None]
        x = carrier[None]
        for layer in self._encoder:
            x = layer(x)
        # The package feeds the marker 32 copies of carrier and message; `_load_marker` summed the
        # weights of the copies instead.
        x = torch.cat([x, carrier[None], message[None]])
        for layer in self._marker:
            x = layer(x)
        mark = x[0].abs()
        mark[self.band :] = 0
        power = mark.square().mean(dim=0, keepdim=True)
        return torch.where(power > 0, mark / power.sqrt(), 0.0)

    def read(self, carrier: torch.Tensor) -> torch.Tensor:
        """Returns each symbol's score in each frame, [5, frames], of magnitudes [bins, frames]."""
        x = carrier[None, : self.band]
        for layer in self._reader:
            x = layer(x)
        return torch.einsum("sbt,b->st", x, self._reader_weight) + self._reader_bias


def load_networks(directory: Path, *, device: str) -> Networks:
    """Returns the networks in a directory of silentcipher's published files.

    Nothing in the checkpoints is executed: they are read as tensors only.

    Raises:
        FileNotFoundError: Files are missing (all are named).
        ValueError: A file is damaged or belongs to another model.
    """
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"watermark files missing in {directory}: {', '.join(missing)}")
    hparams = _read_hparams(directory / FILES[0])
    band, dim = hparams["message_band_size"], hparams["message_dim"]
    encoder = [(1, _FEATURES, 3)] + [(_FEATURES, _FEATURES, 3)] * (hparams["enc_n_layers"] - 1)
    marker = [(_MARKER_WIDTH, _MARKER_WIDTH, 3)] * (hparams["dec_c_n_layers"] - 1)
    marker.append((_MARKER_WIDTH, 1, 1))

    enc = _Checkpoint(directory / FILES[1], device)
    encoder_layers = [enc.layer(f"main.{i}", *sizes) for i, sizes in enumerate(encoder)]
    message = enc.take("linear.weight", band, dim), enc.take("linear.bias", band)
    dec = _Checkpoint(directory / FILES[2], device)
    marker_layers = [dec.layer(f"main.{i}", *sizes) for i, sizes in enumerate(marker)]
    msg = _Checkpoint(directory / FILES[3], device)  # its even positions are drop-outs
    width = msg.rows("main.1.conv.bias")  # 128 as published; no setting names it
    reader = [(1, width, 3)] + [(width, width, 3)] * (_READER_LAYERS - 2) + [(width, dim, 3)]
    reader_layers = [msg.layer(f"main.{2 * i + 1}", *sizes) for i, sizes in enumerate(reader)]
    readout = msg.take("linear.weight", 1, band), msg.take("linear.bias", 1)
    problems = [problem for file in (enc, dec, msg) for problem in file.problems()]
    if problems:
        raise ValueError(
            f"{directory} does not hold silentcipher's 44.1 kHz model:\n  " + "\n  ".join(problems)
        )
    return Networks(
        sample_rate=hparams["SR"],
        n_fft=hparams["N_FFT"],
        band=band,
        message_len=hparams["message_len"],
        _encoder=encoder_layers,
        _message_weight=message[0],
        _message_bias=message[1],
        _marker=[_sum_copies(marker_layers[0]), *marker_layers[1:]],
        _reader=reader_layers,
        _reader_weight=readout[0][0],
        _reader_bias=readout[1][0],
    )


def _sum_copies(layer: _Layer) -> _Layer:
    # 32 equal input channels through 32 kernels are one channel through the kernels' sum.
    features, carrier, message = layer.weight.split(_FEATURES, dim=1)
    weight = torch.cat([features, carrier.sum(1, True), message.sum(1, True)], dim=1)
    return _Layer(weight, layer.bias, layer.scale, layer.shift)


class _Checkpoint:
    """One checkpoint file; what is wrong with it is collected, to be reported together."""

    def __init__(self, path: Path, device: str) -> None:
        self._path, self._problems = path, []
        try:
            data = torch.load(path, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
        if not isinstance(data, dict) or not all(
            isinstance(v, torch.Tensor) for v in data.values()
        ):
            raise ValueError(f"{path} does not hold a table of tensors")
        self._device = device
        # Published from torch's DataParallel, which prefixes every name.
        self._left = {str(name).removeprefix("module."): value for name, value in data.items()}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self._left.pop(name, None)
        if tensor is None:
            self._problems.append(f"{self._path.name}: {name} is missing")
        elif tuple(tensor.shape) != shape:
            self._problems.append(
                f"{self._path.name}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        elif not tensor.isfinite().all():
            self._problems.append(f"{self._path.name}: {name} holds NaN or infinity")
        else:
            return tensor.float()
        return torch.zeros(shape, device=self._device)

    def rows(self, name: str) -> int:
        tensor = self._left.get(name)
        return 1 if tensor is None or tensor.ndim == 0 else len(tensor)

    def layer(self, name: str, inputs: int, outputs: int, kernel: int) -> _Layer:
        parts = [
            (
                self.take(f"{name}.{part}.weight", outputs, inputs, kernel, kernel),
                self.take(f"{name}.{part}.bias", outputs),
            )
            for part in ("conv", "gate")
        ]
        scale = self.take(f"{name}.bn.weight", outputs)
        shift = self.take(f"{name}.bn.bias", outputs)
        for unused in ("running_mean", "running_var", "num_batches_tracked"):
            self._left.pop(f"{name}.bn.{unused}", None)
        return _Layer(
            weight=torch.cat([weight for weight, _ in parts]),
            bias=torch.cat([bias for _, bias in parts]),
            scale=scale[:, None, None],
            shift=shift[:, None, None],
        )

    def problems(self) -> list[str]:
        extra = [f"{self._path.name}: {name} is not part of it" for name in self._left]
        return [*self._problems, *extra]


def _read_hparams(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold a table of settings")
    problems = [
        f"{name} is {data.get(name)!r}, expected {value!r}"
        for name, value in _FIXED.items()
        if data.get(name) != value
    ]
    for name in _SIZES:
        value = data.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            problems.append(f"{name} is {value!r}, expected an integer of at least 2")
    if not problems:
        if data["N_FFT"] != 2 * data["HOP_LENGTH"]:
            problems.append(f"N_FFT={data['N_FFT']} is not twice HOP_LENGTH={data['HOP_LENGTH']}")
        if data["message_band_size"] > data["N_FFT"] // 2 + 1:
            problems.append(f"message_band_size={data['message_band_size']} exceeds the bins")
    if problems:
        raise ValueError(f"{path} is not silentcipher's 44.1 kHz model: {'; '.join(problems)}")
    return data
