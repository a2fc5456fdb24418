"""What a training step costs, by counting products, and how near that comes to the device's peak."""

from __future__ import annotations

from typing import Any

from csm_jax.config import CSMConfig, LlamaConfig

# Dense bfloat16 products with float32 sums, FLOP/s, from the makers' data sheets.
_PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("TPU v6 lite", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v4", 275e12),
)


def peak_flops(device: Any) -> float | None:
    """Returns the peak of one of `jax.devices()` in FLOP/s at bfloat16; None where it is not known."""
    return next((peak for name, peak in _PEAKS if name in device.device_kind), None)


def step_flops(
    config: CSMConfig, *, positions: float, decoder_frames: float, trained: str, max_length: int
) -> float:
    """Returns the floating-point operations of one step's model, nothing computed twice.

    Two per weight and position forwards, two for the gradient of the inputs, two for that of the weights
    where they are trained; attention over half of a row on average.

    Args:
        config: Sizes.
        positions: Positions of the backbone, padding left out.
        decoder_frames: Frames that the decoder scores.
        trained: `full`, `lora` or `prefix`: with the last two no weight has a gradient.
        max_length: Positions of a row.
    """
    back, deco, codes = config.backbone, config.decoder, config.num_codebooks

    def stack(c: LlamaConfig) -> int:
        heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        return c.num_layers * c.embed_dim * (heads + 3 * c.intermediate_dim)

    def attention(c: LlamaConfig, length: float) -> float:
        return 2 * c.num_layers * c.num_heads * c.head_dim * length  # scores and values: 4, half: 2

    position = 2 * (stack(back) + config.audio_vocab_size * back.embed_dim)
    frame = codes * 2 * (stack(deco) + deco.embed_dim * back.embed_dim)
    frame += (codes - 1) * 2 * config.audio_vocab_size * deco.embed_dim
    products = positions * position + decoder_frames * frame
    attended = positions * attention(back, max_length)
    attended += decoder_frames * codes * attention(deco, codes)
    return (3 if trained == "full" else 2) * products + 3 * attended
