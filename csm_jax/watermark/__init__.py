"""silentcipher's 44.1 kHz watermark in JAX: `JaxWatermarker` marks audio and verifies marks.

`files` reads the published weights, `network` runs them (`stft`, `winograd`), `watermarker` and
`stream` put a `message` into audio and find it; `interface` is what they ask of any network.
"""

from __future__ import annotations

import os
from pathlib import Path

from csm_jax.watermark.files import load
from csm_jax.watermark.network import JaxNetworks
from csm_jax.watermark.stream import WatermarkStream
from csm_jax.watermark.watermarker import Watermarker

__all__ = ["JaxWatermarker", "WatermarkStream", "Watermarker"]


class JaxWatermarker(Watermarker):
    """Embeds and detects watermarks with silentcipher's networks, on JAX's default device."""

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> JaxWatermarker:
        """Returns the watermarker whose files (hparams.yaml, enc_c.ckpt, dec_c.ckpt, dec_m_0.ckpt:
        sony/silentcipher, 44_1_khz/73999_iteration) are in the directory `path`.

        Raises:
            FileNotFoundError: Files are missing.
            ValueError: A file is damaged or belongs to another model.
        """
        return cls(JaxNetworks(*load(Path(path))))
