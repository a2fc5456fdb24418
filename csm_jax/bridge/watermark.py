"""The audio watermark with its networks in torch: on a torch device, or to check the JAX one with."""

from __future__ import annotations

import os
from pathlib import Path

from csm_jax.bridge.silentcipher import TorchNetworks
from csm_jax.watermark.files import load
from csm_jax.watermark.watermarker import Watermarker


class TorchWatermarker(Watermarker):
    """Embeds and detects watermarks with silentcipher's networks, on any torch device."""

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str], *, device: str = "cpu") -> TorchWatermarker:
        """Returns the watermarker whose files (hparams.yaml, enc_c.ckpt, dec_c.ckpt, dec_m_0.ckpt:
        sony/silentcipher, 44_1_khz/73999_iteration) are in the directory `path`.

        Raises:
            FileNotFoundError: Files are missing.
            ValueError: A file is damaged or belongs to another model.
        """
        return cls(TorchNetworks(*load(Path(path)), device=device))
