"""silentcipher checkpoints in the published structure: random ones, and ones that can be read.

The readable ones carry the message on five tones: symbol s is marked by lowering tone s, and the
reader names the lowest tone. So embedding and detection can be checked end to end without the
published weights, on audio made of those tones.
"""

from __future__ import annotations

import argparse
import functools
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

HPARAMS = {
    "SR": 44100,
    "N_FFT": 4096,
    "HOP_LENGTH": 2048,
    "message_band_size": 1024,
    "message_dim": 5,
    "message_len": 21,
    "message_sdr": 47,
    "n_messages": 1,
    "model_type": "n_message",
    "enc_n_layers": 3,
    "dec_c_n_layers": 4,
    "ensure_negative_message": True,
    "ensure_constrained_message": False,
    "utterance_level_normalization": True,
    "frame_level_normalization": False,
    "no_normalization": False,
}

# The same structure, a fraction of the work: 21 frames of 256 samples at 8 kHz are 0.672 s.
SMALL = {**HPARAMS, "SR": 8000, "N_FFT": 512, "HOP_LENGTH": 256, "message_band_size": 128}
SMALL_PERIOD = 21 * 256
SMALL_WIDTH = 8  # channels of its reader

FIRST_TONE = 40  # bin of symbol 0's tone; symbol s has the bin FIRST_TONE + 2·s


def package() -> types.ModuleType:
    """Returns the silentcipher package's server module, with its file-handling imports stubbed."""
    for name, members in (("librosa", ()), ("pydub", ("AudioSegment",))):
        if name not in sys.modules:
            stub = types.ModuleType(name)
            for member in members:
                setattr(stub, member, None)
            sys.modules[name] = stub
    from silentcipher import server

    return server


def package_model(directory: Path, hparams: dict[str, Any], *, width: int = 128) -> Any:
    """Returns the package's model over the files that `write_random` or `write_readable` wrote."""
    server = package()
    # Its STFT is a singleton that keeps the first size it was asked for.
    type(server.STFT)._instances.clear()
    reader = server.MsgDecoder
    server.MsgDecoder = functools.partial(reader, channel_dim=width)
    try:
        return server.Model(argparse.Namespace(**hparams, load_ckpt=str(directory)))
    finally:
        server.MsgDecoder = reader


def _modules(hparams: dict[str, Any], *, width: int = 128) -> dict[str, torch.nn.Module]:
    package()
    from silentcipher.model import CarrierDecoder, Encoder, MsgDecoder

    band, dim = hparams["message_band_size"], hparams["message_dim"]
    return {
        "enc_c": Encoder(32, hparams["enc_n_layers"], dim, band, hparams["N_FFT"]),
        "dec_c": CarrierDecoder(argparse.Namespace(**hparams), 96, hparams["dec_c_n_layers"], band),
        "dec_m_0": MsgDecoder(dim, band, channel_dim=width),
    }


def _save(directory: Path, modules: dict[str, torch.nn.Module], hparams: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "hparams.yaml").write_text(yaml.safe_dump(hparams))
    for name, module in modules.items():
        state = {f"module.{key}": value for key, value in module.state_dict().items()}
        torch.save(state, directory / f"{name}.ckpt")
    return directory


def write_random(
    directory: Path, *, seed: int = 0, hparams: dict[str, Any] = HPARAMS, width: int = 128
) -> Path:
    """Returns `directory` with random weights in it."""
    torch.manual_seed(seed)
    modules = _modules(hparams, width=width)
    for module in modules.values():
        for name, tensor in module.named_parameters():
            if ".bn." in name:
                torch.nn.init.normal_(tensor, mean=0.5, std=0.3)
    return _save(directory, modules, hparams)


@torch.no_grad()
def write_readable(directory: Path) -> Path:
    """Returns `directory` with hand-made weights whose marks on `tones` can be read back."""
    modules = _modules(SMALL, width=SMALL_WIDTH)
    for module in modules.values():
        for name, tensor in module.named_parameters():
            # Gates of zero halve every layer alike, which its batch norm undoes.
            torch.nn.init.constant_(tensor, 1.0 if name.endswith("bn.weight") else 0.0)
    encoder, marker, reader = modules["enc_c"], modules["dec_c"], modules["dec_m_0"]
    for symbol in range(5):
        encoder.linear.weight[FIRST_TONE + 2 * symbol, symbol] = 1.0
    marker.main[0].conv.weight[0, 64, 1, 1] = 1.0  # the first of the message's copies
    for layer in list(marker.main)[1:-1]:
        layer.conv.weight[0, 0, 1, 1] = 1.0
    marker.main[-1].conv.weight[0, 0, 0, 0] = 1.0
    # Channel s looks s·2 bins up, one bin per layer, so one shared read-out bin sees every tone.
    layers = list(reader.main)[1::2]
    for depth, layer in enumerate(layers):
        for symbol in range(5):
            shift = 1 if depth < 2 * symbol else 0
            sign = -1.0 if depth == 0 else 1.0
            layer.conv.weight[symbol, 0 if depth == 0 else symbol, 1 + shift, 1] = sign
    reader.linear.weight[0, FIRST_TONE] = 1.0
    return _save(directory, modules, SMALL)


def tones(samples: int, rate: int, *, seed: int = 0) -> np.ndarray:
    """Returns steady tones (float32 [samples]) that `write_readable`'s weights can mark."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / rate
    audio = np.zeros(samples)
    for symbol in range(5):
        hertz = (FIRST_TONE + 2 * symbol) * SMALL["SR"] / SMALL["N_FFT"]
        audio += 0.1 * np.sin(2 * np.pi * (hertz * time + rng.random()))
    return audio.astype(np.float32)


def noise(samples: int, *, seed: int = 0) -> np.ndarray:
    """Returns low-pass noise, float32 [samples]."""
    x = np.random.default_rng(seed).standard_normal(samples + 20)
    return (0.3 * np.convolve(x, np.ones(20) / 20, "same")[:samples]).astype(np.float32)
