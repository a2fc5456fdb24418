"""silentcipher's published files as sizes and numpy weights; nothing in them is executed.

`hparams.yaml` names the sizes; `enc_c.ckpt`, `dec_c.ckpt` and `dec_m_0.ckpt` hold the three networks
that `csm_jax.watermark.network` describes. Every tensor must be there, in shape and finite, and no
other may be: what is wrong is collected over all files and raised once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from csm_jax.weights.errors import WeightsError
from csm_jax.weights.source import NUMPY_DTYPES
from csm_jax.weights.torch_pickle import TorchSource

FILES = ("hparams.yaml", "enc_c.ckpt", "dec_c.ckpt", "dec_m_0.ckpt")
"""The files of a silentcipher directory, as published in sony/silentcipher."""

_FEATURES = 32  # channels of the encoder; also how often the package repeats carrier and message
_MARKER_WIDTH = 96
_READER_LAYERS = 10

# Other values select code paths of the package that its published 44.1 kHz model does not use.
_FIXED: Mapping[str, int | bool] = {
    "n_messages": 1,
    "message_dim": 5,
    "message_len": 21,
    "ensure_negative_message": True,
    "utterance_level_normalization": True,
    "frame_level_normalization": False,
    "no_normalization": False,
}
_SIZES = ("SR", "N_FFT", "HOP_LENGTH", "message_band_size", "enc_n_layers", "dec_c_n_layers")
_MAX_HPARAMS_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes the networks were trained for.

    Attributes:
        sample_rate: Hertz.
        n_fft: Samples per spectrogram frame; frames are `hop` apart.
        band: Bins that carry the message, from the lowest.
        message_len: Frames per period of the message, 21.
        num_symbols: Different symbols of a message, 5.
    """

    sample_rate: int
    n_fft: int
    band: int
    message_len: int
    num_symbols: int

    @property
    def hop(self) -> int:
        """Samples from frame to frame."""
        return self.n_fft // 2

    @property
    def bins(self) -> int:
        """Frequencies of a frame."""
        return self.n_fft // 2 + 1


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One gated convolution, `batch_norm(conv(x) * sigmoid(gate(x)))`, in float32.

    Attributes:
        weight: [2 * out, in, kernel (bins), kernel (frames)]: the convolution's rows, then the
            gate's.
        bias: [2 * out], likewise.
        scale: The batch norm's factor, [out].
        shift: The batch norm's summand, [out].
    """

    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The three networks.

    Attributes:
        encoder: Carrier to features.
        message_weight: Each symbol's spectrum, [band, num_symbols].
        message_bias: Added to it, [band].
        marker: Features, carrier and message (34 channels, in this order) to the mark.
        reader: Spectrogram to one channel per symbol.
        reader_weight: How those are summed over the bins, [band].
        reader_bias: Added to that, [].
    """

    encoder: tuple[Layer, ...]
    message_weight: np.ndarray
    message_bias: np.ndarray
    marker: tuple[Layer, ...]
    reader: tuple[Layer, ...]
    reader_weight: np.ndarray
    reader_bias: np.ndarray


def load(path: str | Path) -> tuple[Sizes, Weights]:
    """Returns what is in a directory of silentcipher's published files.

    Raises:
        FileNotFoundError: The directory or files in it are missing (all are named).
        ValueError: A file is damaged or belongs to another model.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory of watermark files at {directory}")
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"watermark files missing in {directory}: {', '.join(missing)}")
    hparams = _read_hparams(directory / FILES[0])
    band, dim = hparams["message_band_size"], hparams["message_dim"]
    encoder = [(1, _FEATURES, 3)] + [(_FEATURES, _FEATURES, 3)] * (hparams["enc_n_layers"] - 1)
    marker = [(_MARKER_WIDTH, _MARKER_WIDTH, 3)] * (hparams["dec_c_n_layers"] - 1)
    marker.append((_MARKER_WIDTH, 1, 1))

    enc, dec, msg = (_Checkpoint(directory / name) for name in FILES[1:])
    encoder_layers = [enc.layer(f"main.{i}", *sizes) for i, sizes in enumerate(encoder)]
    message = enc.take("linear.weight", band, dim), enc.take("linear.bias", band)
    marker_layers = [dec.layer(f"main.{i}", *sizes) for i, sizes in enumerate(marker)]
    width = msg.length("main.1.conv.bias")  # 128 as published; no setting names it
    reader = [(1, width, 3)] + [(width, width, 3)] * (_READER_LAYERS - 2) + [(width, dim, 3)]
    # Its even positions are drop-outs.
    reader_layers = [msg.layer(f"main.{2 * i + 1}", *sizes) for i, sizes in enumerate(reader)]
    readout = msg.take("linear.weight", 1, band), msg.take("linear.bias", 1)
    problems = [problem for file in (enc, dec, msg) for problem in file.problems()]
    if problems:
        raise ValueError(
            f"{directory} does not hold silentcipher's 44.1 kHz model:\n  " + "\n  ".join(problems)
        )
    sizes = Sizes(
        sample_rate=hparams["SR"],
        n_fft=hparams["N_FFT"],
        band=band,
        message_len=hparams["message_len"],
        num_symbols=dim,
    )
    return sizes, Weights(
        encoder=tuple(encoder_layers),
        message_weight=message[0],
        message_bias=message[1],
        marker=(_sum_copies(marker_layers[0]), *marker_layers[1:]),
        reader=tuple(reader_layers),
        reader_weight=readout[0][0],
        reader_bias=readout[1].reshape(()),
    )


def _sum_copies(layer: Layer) -> Layer:
    # The package repeats carrier and message to 32 channels each. Equal channels through 32 kernels
    # are one channel through the kernels' sum.
    features, carrier, message = np.split(layer.weight, 3, axis=1)
    one, other = (x.sum(axis=1, keepdims=True, dtype=np.float64) for x in (carrier, message))
    weight = np.concatenate([features, one, other], axis=1).astype(np.float32)
    return Layer(weight=weight, bias=layer.bias, scale=layer.scale, shift=layer.shift)


class _Checkpoint:
    """One checkpoint file, read whole; what is wrong with it is collected."""

    def __init__(self, path: Path) -> None:
        self._name, self._problems = path.name, []
        try:
            with closing(TorchSource(path)) as source:
                # The counters of the batch norms are integers; nothing reads them.
                self._left = {
                    # Published from torch's DataParallel, which prefixes every name.
                    name.removeprefix("module."): source.read(name)
                    if spec.dtype in NUMPY_DTYPES
                    else None
                    for name, spec in source.specs.items()
                }
        except WeightsError as error:
            raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error

    def take(self, name: str, *shape: int) -> np.ndarray:
        tensor = self._left.pop(name, None)
        if tensor is None:
            self._problems.append(f"{self._name}: {name} is missing")
        elif tensor.shape != shape:
            self._problems.append(
                f"{self._name}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        elif not np.isfinite(tensor).all():
            self._problems.append(f"{self._name}: {name} holds NaN or infinity")
        else:
            return tensor.astype(np.float32)
        return np.broadcast_to(np.float32(0), shape) if prod(shape) else np.zeros(shape, np.float32)

    def length(self, name: str) -> int:
        tensor = self._left.get(name)
        return 1 if tensor is None or not tensor.shape else len(tensor)

    def layer(self, name: str, inputs: int, outputs: int, kernel: int) -> Layer:
        parts = [
            (
                self.take(f"{name}.{part}.weight", outputs, inputs, kernel, kernel),
                self.take(f"{name}.{part}.bias", outputs),
            )
            for part in ("conv", "gate")
        ]
        for unused in ("running_mean", "running_var", "num_batches_tracked"):
            self._left.pop(f"{name}.bn.{unused}", None)
        return Layer(
            weight=np.concatenate([weight for weight, _ in parts]),
            bias=np.concatenate([bias for _, bias in parts]),
            scale=self.take(f"{name}.bn.weight", outputs),
            shift=self.take(f"{name}.bn.bias", outputs),
        )

    def problems(self) -> list[str]:
        return [*self._problems, *(f"{self._name}: {x} is not part of it" for x in self._left)]


# --- hparams.yaml ------------------------------------------------------------------------------

_SETTING = re.compile(r"([A-Za-z_]\w*)\s*:(?:\s+(.*?))?\s*(?:(?<!\S)#.*)?")
_INTEGER = re.compile(r"[+-]?(?:0|[1-9]\d*)")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False}


def _read_hparams(path: Path) -> dict[str, int]:
    # All that is used are integers and booleans at the top level of a flat file, which is not worth
    # a YAML library in every installation. Nested lines belong to settings of the training.
    try:
        if path.stat().st_size > _MAX_HPARAMS_BYTES:
            raise ValueError(f"{path} is too large for a file of settings")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text of settings: {error}") from error
    data: dict[str, int | bool | str] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line[0] in " \t#-":
            continue
        setting = _SETTING.fullmatch(line)
        if setting is None:
            problems.append(f"line {number} is not 'name: value': {line[:60]!r}")
            continue
        name, text = setting[1], setting[2] or ""
        if name in data:
            problems.append(f"{name} is there twice")
        data[name] = int(text) if _INTEGER.fullmatch(text) else _BOOLEANS.get(text, text)
    problems += [
        f"{name} is {data.get(name)!r}, expected {value!r}"
        for name, value in _FIXED.items()
        if data.get(name) != value or isinstance(data[name], bool) != isinstance(value, bool)
    ]
    sizes = {name: data.get(name) for name in _SIZES}
    counts = {name: x for name, x in sizes.items() if isinstance(x, int) and x > 1}
    problems += [
        f"{name} is {value!r}, expected an integer of at least 2"
        for name, value in sizes.items()
        if name not in counts
    ]
    if not problems:
        if counts["N_FFT"] != 2 * counts["HOP_LENGTH"]:
            problems.append(
                f"N_FFT={counts['N_FFT']} is not twice HOP_LENGTH={counts['HOP_LENGTH']}"
            )
        if counts["message_band_size"] > counts["N_FFT"] // 2 + 1:
            problems.append(f"message_band_size={counts['message_band_size']} exceeds the bins")
    if problems:
        raise ValueError(f"{path} is not silentcipher's 44.1 kHz model: {'; '.join(problems)}")
    return {name: int(_FIXED[name]) for name in _FIXED} | counts
