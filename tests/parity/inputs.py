"""Random weights, activations and prompts for the parity tests, and what a mismatch of codes means.

Weights keep every activation at the scale of a trained model: projections have standard deviation
1/sqrt(fan-in), so blocks add about one unit to a residual stream of a few units, attention scores and
logits have unit spread or more (few near-ties among the largest), and norm scales differ from 1 so
that a scale applied twice or not at all shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from csm_jax.config import CSMConfig, LlamaConfig


@dataclass(frozen=True)
class Prompt:
    """One prompt: `frames` int32 [T, C+1] (text id last) and `mask` bool of the same shape."""

    frames: np.ndarray
    mask: np.ndarray


# --- weights in Sesame's names ------------------------------------------------------------------


def _block_shapes(part: str, sizes: LlamaConfig) -> dict[str, tuple[int, ...]]:
    dim, mlp = sizes.embed_dim, sizes.intermediate_dim
    q, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(sizes.num_layers):
        at = f"{part}.layers.{layer}"
        shapes |= {
            f"{at}.attn.q_proj.weight": (q, dim),
            f"{at}.attn.k_proj.weight": (kv, dim),
            f"{at}.attn.v_proj.weight": (kv, dim),
            f"{at}.attn.output_proj.weight": (dim, q),
            f"{at}.mlp.w1.weight": (mlp, dim),
            f"{at}.mlp.w2.weight": (dim, mlp),
            f"{at}.mlp.w3.weight": (mlp, dim),
            f"{at}.sa_norm.scale": (dim,),
            f"{at}.mlp_norm.scale": (dim,),
        }
    return shapes | {f"{part}.norm.scale": (dim,)}


def sesame_shapes(config: CSMConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of Sesame's `model.safetensors`, by its published name."""
    dim, vocab = config.backbone.embed_dim, config.audio_vocab_size
    return {
        **_block_shapes("backbone", config.backbone),
        **_block_shapes("decoder", config.decoder),
        "text_embeddings.weight": (config.text_vocab_size, dim),
        "audio_embeddings.weight": (config.num_codebooks * vocab, dim),
        "projection.weight": (config.decoder.embed_dim, dim),
        "codebook0_head.weight": (vocab, dim),
        "audio_head": (config.num_codebooks - 1, config.decoder.embed_dim, vocab),
    }


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns mean and standard deviation of a tensor's entries."""
    if name.endswith(".scale"):
        return 1.0, 0.2
    if name.endswith("embeddings.weight"):
        return 0.0, 1.0
    fan_in = shape[1]  # of [out, in] matrices and of the audio heads' [C-1, E, V] alike
    # Sharper attention than 1/sqrt(fan-in) gives, so that a wrong rotation moves its output.
    gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    # Logits of trained heads spread over several units.
    gain = 2.0 if name.startswith(("codebook0_head", "audio_head")) else gain
    return 0.0, gain / fan_in**0.5


def random_weights(
    config: CSMConfig, *, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Returns random weights under Sesame's names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sesame_shapes(config).items():
        mean, std = _spread(name, shape)
        tensor = torch.empty(shape).normal_(mean, std, generator=generator)
        weights[name] = tensor.to(dtype)
    return weights


def halves_from_pairs(weight: torch.Tensor, *, head_dim: int) -> torch.Tensor:
    """Returns q or k rows reordered from interleaved pairs to the two halves of each head.

    Row 2i of a head (the first of pair i) goes to row i, row 2i+1 to row i + head_dim/2.
    """
    heads = weight.reshape(-1, head_dim, weight.shape[1])
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).reshape(weight.shape)


def to_params(config: CSMConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns our nested tree of torch tensors from Sesame's weights.

    Written out here by hand, apart from the tables of `csm_jax.weights`, so that neither can hide a
    mistake of the other. Tensors that need no reordering stay views of the given ones.
    """

    def transformer(part: str, sizes: LlamaConfig) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        for layer in range(sizes.num_layers):
            at = f"{part}.layers.{layer}"
            q, k = (weights[f"{at}.attn.{x}_proj.weight"] for x in "qk")
            layers[str(layer)] = {
                "attn_norm": weights[f"{at}.sa_norm.scale"],
                "mlp_norm": weights[f"{at}.mlp_norm.scale"],
                "attn": {
                    "q_proj": halves_from_pairs(q, head_dim=sizes.head_dim),
                    "k_proj": halves_from_pairs(k, head_dim=sizes.head_dim),
                    "v_proj": weights[f"{at}.attn.v_proj.weight"],
                    "o_proj": weights[f"{at}.attn.output_proj.weight"],
                },
                "mlp": {
                    "w_gate": weights[f"{at}.mlp.w1.weight"],
                    "w_down": weights[f"{at}.mlp.w2.weight"],
                    "w_up": weights[f"{at}.mlp.w3.weight"],
                },
            }
        return {"layers": layers, "final_norm": weights[f"{part}.norm.scale"]}

    return {
        "backbone": {
            **transformer("backbone", config.backbone),
            "text_embeddings": weights["text_embeddings.weight"],
            "audio_embeddings": weights["audio_embeddings.weight"],
            "codebook0_head": weights["codebook0_head.weight"],
        },
        "decoder": {
            **transformer("decoder", config.decoder),
            "projection": weights["projection.weight"],
            "audio_head": weights["audio_head"].transpose(1, 2).contiguous(),
        },
    }


# --- activations and prompts --------------------------------------------------------------------


def activations(*shape: int, seed: int) -> np.ndarray:
    """Returns float32 activations of unit spread, exactly representable in bfloat16."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(x).bfloat16().float().numpy()


def text_frames(config: CSMConfig, ids: Sequence[int]) -> Prompt:
    """Returns one frame per text id; the audio columns are zero and masked."""
    frames = np.zeros((len(ids), config.num_codebooks + 1), np.int32)
    frames[:, -1] = ids
    mask = np.zeros(frames.shape, bool)
    mask[:, -1] = True
    return Prompt(frames, mask)


def audio_frames(config: CSMConfig, codes: np.ndarray) -> Prompt:
    """Returns one frame per row of codes [n, C]; the text column is zero and masked."""
    frames = np.pad(codes.astype(np.int32), ((0, 0), (0, 1)))
    mask = np.ones(frames.shape, bool)
    mask[:, -1] = False
    return Prompt(frames, mask)


def join(*parts: Prompt) -> Prompt:
    """Returns the parts one after the other."""
    return Prompt(
        np.concatenate([p.frames for p in parts]), np.concatenate([p.mask for p in parts])
    )


def random_text(config: CSMConfig, length: int, *, seed: int) -> Prompt:
    """Returns a prompt of random text ids; below transformers' ids for audio, the last two."""
    rng = np.random.default_rng(seed)
    # transformers replaces its audio ids by audio embeddings; in CSM-1B they start at 128,002.
    end = min(config.text_vocab_size - 2, 128_002)
    return text_frames(config, rng.integers(0, end, length).tolist())


def random_prompt(config: CSMConfig, *, text: int, audio: int, seed: int) -> Prompt:
    """Returns a prompt as a dialogue has it: text, its audio, the frame that ends it, more text."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, config.codebook_size, (audio, config.num_codebooks))
    codes = np.concatenate([codes, np.zeros((1, config.num_codebooks), np.int64)])
    return join(
        random_text(config, text, seed=seed + 1),
        audio_frames(config, codes),
        random_text(config, text, seed=seed + 2),
    )


def pad(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Returns frames and mask [B, T, C+1] of prompts padded on the right with masked zeros."""
    length = max(len(p.frames) for p in prompts)

    def grow(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, length - len(x)), (0, 0)))

    return np.stack([grow(p.frames) for p in prompts]), np.stack([grow(p.mask) for p in prompts])


# --- what a mismatch of codes means -------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """How greedy codes [n, C] stand against a reference's logits for the same history.

    Attributes:
        deficit: [n, C], how far the chosen code's logit lies below the largest allowed one; 0 where
            the reference would have chosen the same.
        margin: [n, C], distance of the two largest allowed logits: the smallest change of logits
            that can turn the choice.
    """

    deficit: np.ndarray
    margin: np.ndarray

    def describe(self) -> str:
        """Returns one line to read in a failed test."""
        worst = np.unravel_index(self.deficit.argmax(), self.deficit.shape)
        wrong = int((self.deficit > 0).sum())
        return (
            f"{wrong} of {self.deficit.size} codes differ from the reference's choice; the worst, "
            f"frame {worst[0]} codebook {worst[1]}, is {self.deficit[worst]:.3g} below the best "
            f"(margin there {self.margin[worst]:.3g}, smallest margin {self.margin.min():.3g})"
        )


def judge(
    config: CSMConfig, prompt: Prompt, codes: np.ndarray, c0: np.ndarray, decoder: np.ndarray
) -> Choices:
    """Returns how codes [n, C] fare under logits of prompt and codes joined.

    Args:
        config: The model's sizes.
        prompt: What was generated from.
        codes: What was generated.
        c0: Teacher-forced logits [T+n, V] of a reference over prompt and codes.
        decoder: The same for the decoder's codebooks, [T+n-1, C-1, V].
    """
    first = len(prompt.frames) - 1
    c0, decoder = c0[first : first + len(codes)], decoder[first:]
    logits = np.concatenate([c0[:, None], decoder], axis=1)[..., : config.codebook_size]
    top = np.sort(logits, axis=-1)[..., -2:]
    chosen = np.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return Choices(deficit=top[..., 1] - chosen, margin=top[..., 1] - top[..., 0])
