"""Mimi's sizes and presets; `published` reads and writes them in others' forms.

Imports no jax and nothing of ours. Only what changes numbers at inference is a field.

Source of the sizes: kyutai-labs/moshi `moshi/models/loaders.py` (`_mimi_config`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MimiConfig:
    """Sizes of a Mimi codec.

    Attributes:
        sample_rate: Audio samples per second (24,000).
        frame_rate: Frames of codes per second (12.5).
        num_filters: Channels of SEANet at the rate of the audio; each stride doubles them.
        ratios: Strides of SEANet in the decoder's order (8, 6, 5, 4); the encoder's is the reverse.
        num_residual_layers: Residual blocks per stride (1).
        dilation_growth: Block j of a stride dilates by this to the power j.
        compress: Channels of a residual block's inside are fewer by this factor.
        kernel_size: Of the first convolution of encoder and decoder (7).
        residual_kernel_size: Of the first convolution in a residual block (3).
        last_kernel_size: Of the last convolution of encoder and decoder (3).
        embed_dim: Width of the latents and of both transformers (512).
        num_layers: Blocks of each transformer.
        num_heads: Heads of each attention.
        intermediate_dim: Width of the transformers' MLP.
        context: Positions an attention sees, its own included (250).
        rope_base: RoPE theta.
        norm_eps: Epsilon of the layer norms.
        num_codebooks: Codebooks in the weights, semantic ones included (32).
        num_semantic_codebooks: How many of them, the first ones, are quantised apart (1).
        codebook_size: Codes per codebook.
        codebook_dim: Width of a codebook's vectors.
    """

    sample_rate: int
    frame_rate: float
    num_filters: int
    ratios: tuple[int, ...]
    num_residual_layers: int
    dilation_growth: int
    compress: int
    kernel_size: int
    residual_kernel_size: int
    last_kernel_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    intermediate_dim: int
    context: int
    rope_base: float
    norm_eps: float
    num_codebooks: int
    num_semantic_codebooks: int
    codebook_size: int
    codebook_dim: int

    def __post_init__(self) -> None:
        problems = field_problems({name: getattr(self, name) for name in FIELD_KINDS})
        if problems:
            raise ValueError(listed("MimiConfig", problems))
        if self.embed_dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"embed_dim={self.embed_dim} must be an even multiple of num_heads="
                f"{self.num_heads} for rotary embeddings"
            )
        if self.compress > self.num_filters:
            raise ValueError(
                f"compress={self.compress} leaves no channels of num_filters={self.num_filters}"
            )
        if self.num_semantic_codebooks >= self.num_codebooks:
            raise ValueError(
                f"num_semantic_codebooks={self.num_semantic_codebooks} must be less than "
                f"num_codebooks={self.num_codebooks}"
            )
        samples = self.sample_rate / self.frame_rate
        if samples % self.encoder_stride or samples < 2 * self.encoder_stride:
            raise ValueError(
                f"sample_rate={self.sample_rate} and frame_rate={self.frame_rate} make "
                f"{samples:g} samples per frame, which must be twice or more whole times "
                f"{self.encoder_stride}, the product of ratios={self.ratios}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head (64)."""
        return self.embed_dim // self.num_heads

    @property
    def encoder_stride(self) -> int:
        """Samples per latent of SEANet (960)."""
        return math.prod(self.ratios)

    @property
    def samples_per_frame(self) -> int:
        """Samples per frame of codes (1,920)."""
        return int(self.sample_rate / self.frame_rate)

    @property
    def resample_stride(self) -> int:
        """Latents per frame (2)."""
        return self.samples_per_frame // self.encoder_stride

    @property
    def num_acoustic_codebooks(self) -> int:
        """Codebooks that are not semantic (31)."""
        return self.num_codebooks - self.num_semantic_codebooks


def is_size(value: Any) -> bool:
    """Returns whether the value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    """Returns whether the value is a number, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


FIELD_KINDS = {field.name: str(field.type) for field in dataclasses.fields(MimiConfig)}
"""The annotation of every field."""


def field_problems(values: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with each of these fields by itself."""
    problems = []
    for name, value in values.items():
        if FIELD_KINDS[name] == "int":
            kind, good = "a positive integer", is_size(value)
        elif FIELD_KINDS[name] == "float":
            kind, good = "a positive number", is_number(value) and 0 < value < math.inf
        else:
            kind = "a tuple of positive integers"
            good = isinstance(value, tuple) and value and all(map(is_size, value))
        if not good:
            problems.append(f"{name} must be {kind}, got {value!r}")
    return problems


def listed(what: str, problems: Sequence[str]) -> str:
    """Returns a message that names every problem."""
    if len(problems) == 1:
        return f"{what}: {problems[0]}"
    return f"{what}: {len(problems)} problems" + "".join(f"\n  - {line}" for line in problems)


def mimi() -> MimiConfig:
    """Returns the published Mimi's sizes (moshi `loaders._mimi_config`)."""
    return MimiConfig(
        sample_rate=24_000,
        frame_rate=12.5,
        num_filters=64,
        ratios=(8, 6, 5, 4),
        num_residual_layers=1,
        dilation_growth=2,
        compress=2,
        kernel_size=7,
        residual_kernel_size=3,
        last_kernel_size=3,
        embed_dim=512,
        num_layers=8,
        num_heads=8,
        intermediate_dim=2048,
        context=250,
        rope_base=10_000.0,
        norm_eps=1e-5,
        num_codebooks=32,
        num_semantic_codebooks=1,
        codebook_size=2048,
        codebook_dim=256,
    )


def tiny_mimi() -> MimiConfig:
    """Returns a thin Mimi for tests: the published strides, kernels, context and codebooks."""
    return dataclasses.replace(
        mimi(),
        num_filters=2,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        intermediate_dim=64,
        codebook_size=256,
        codebook_dim=16,
    )
