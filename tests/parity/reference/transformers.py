"""transformers' `CsmForConditionalGeneration` over the same weights, as the second oracle.

It shares no code with torchtune: RoPE rotates halves (q and k rows are reordered), norms cast before
the scale, attention is written out in matrix products, the cache grows, and generation goes through
transformers' own `generate` with the depth decoder's `generate` inside. The codec is tiny and random:
no test here decodes audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CsmConfig, CsmForConditionalGeneration, DynamicCache, MimiConfig
from transformers.models.csm import modeling_csm

from csm_jax.config import CSMConfig, LlamaConfig

from ..inputs import Prompt, halves_from_pairs, pad


def tiny_codec(config: CSMConfig) -> MimiConfig:
    """Returns the smallest Mimi with as many codebooks and codes as `config` has."""
    return MimiConfig(
        hidden_size=16,
        num_filters=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        codebook_size=config.codebook_size,
        codebook_dim=4,
        vector_quantization_hidden_dimension=4,
        num_quantizers=config.num_codebooks,
        upsample_groups=16,
    )


def _sizes(sizes: LlamaConfig) -> dict[str, Any]:
    # transformers wants `original_max_position_embeddings` below the model's length, so all three
    # numbers are divided by 1,024 (a power of two: the frequencies stay the same to the last bit).
    rope = {
        "rope_type": "llama3",
        "rope_theta": sizes.rope_base,
        "factor": sizes.scale_factor,
        "low_freq_factor": sizes.low_freq_factor / 1024,
        "high_freq_factor": sizes.high_freq_factor / 1024,
        "original_max_position_embeddings": int(sizes.old_context_len) // 1024,
    }
    return {
        "hidden_size": sizes.embed_dim,
        "intermediate_size": sizes.intermediate_dim,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "rms_norm_eps": sizes.norm_eps,
        "rope_parameters": rope,
    }


def to_config(config: CSMConfig) -> CsmConfig:
    """Returns transformers' configuration of a model of our sizes, with a tiny codec."""
    last = config.text_vocab_size - 1
    return CsmConfig(
        **_sizes(config.backbone),
        num_codebooks=config.num_codebooks,
        vocab_size=config.audio_vocab_size,
        text_vocab_size=config.text_vocab_size,
        max_position_embeddings=config.backbone.max_seq_len,
        codebook_pad_token_id=config.audio_vocab_size - 1,
        bos_token_id=min(128_000, last),
        # The library's pad id equals its audio id, which the mask of a padded batch cannot undo.
        pad_token_id=min(128_001, last - 2),
        audio_token_id=min(128_002, last - 1),
        audio_eos_token_id=min(128_003, last),
        tie_codebooks_embeddings=config.tie_codebooks_embeddings,
        depth_decoder_config={
            **_sizes(config.decoder),
            "num_codebooks": config.num_codebooks,
            "vocab_size": config.audio_vocab_size,
            "backbone_hidden_size": config.backbone.embed_dim,
            "max_position_embeddings": config.num_codebooks + 1,
        },
        codec_config=tiny_codec(config),
        attn_implementation="eager",
    )


def to_weights(config: CSMConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns Sesame's weights under transformers' names, q and k reordered to halves."""
    parts = {
        "backbone.": ("backbone_model.", config.backbone),
        "decoder.": ("depth_decoder.model.", config.decoder),
    }
    suffixes = {
        "attn.q_proj.": "self_attn.q_proj.",
        "attn.k_proj.": "self_attn.k_proj.",
        "attn.v_proj.": "self_attn.v_proj.",
        "attn.output_proj.": "self_attn.o_proj.",
        "mlp.w1.": "mlp.gate_proj.",
        "mlp.w2.": "mlp.down_proj.",
        "mlp.w3.": "mlp.up_proj.",
        "sa_norm.scale": "input_layernorm.weight",
        "mlp_norm.scale": "post_attention_layernorm.weight",
        ".norm.scale": ".norm.weight",
    }
    renamed = {
        "lm_head.weight": weights["codebook0_head.weight"],
        "embed_text_tokens.weight": weights["text_embeddings.weight"],
        "backbone_model.embed_tokens.embed_audio_tokens.weight": weights["audio_embeddings.weight"],
        "depth_decoder.model.embed_tokens.weight": weights["audio_embeddings.weight"],
        "depth_decoder.model.inputs_embeds_projector.weight": weights["projection.weight"],
        "depth_decoder.codebooks_head.weight": weights["audio_head"],
    }
    for name, tensor in weights.items():
        for start, (new_start, sizes) in parts.items():
            if name.startswith(start):
                new = new_start + name.removeprefix(start)
                for old, replacement in suffixes.items():
                    new = new.replace(old, replacement)
                reorder = "q_proj" in name or "k_proj" in name
                renamed[new] = (
                    halves_from_pairs(tensor, head_dim=sizes.head_dim) if reorder else tensor
                )
    return renamed


def build(
    config: CSMConfig, weights: Mapping[str, torch.Tensor], *, device: str = "cpu"
) -> CsmForConditionalGeneration:
    """Returns the model over Sesame's `weights`, used in place where no reordering is needed."""
    theirs = to_config(config)
    codec = modeling_csm.AutoModel.from_config(theirs.codec_config)
    with torch.device("meta"):
        model = CsmForConditionalGeneration(theirs)
    model.codec_model = codec
    missing, unexpected = model.load_state_dict(
        to_weights(config, weights), strict=False, assign=True
    )
    missing = [name for name in missing if not name.startswith("codec_model.")]
    if missing or unexpected:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    # Buffers that no checkpoint holds are still without memory: make them anew.
    rebuild = modeling_csm.CsmRotaryEmbedding
    model.backbone_model.rotary_emb = rebuild(theirs)
    model.depth_decoder.model.rotary_emb = rebuild(theirs.depth_decoder_config)
    offsets = torch.arange(config.num_codebooks) * config.audio_vocab_size
    model.backbone_model.embed_tokens.audio_tokens_offsets = nn.Buffer(offsets, persistent=False)
    model.generation_config.pad_token_id = theirs.pad_token_id
    return model.eval().requires_grad_(False).to(device)


class TransformersReference:
    """transformers' model behind the layer-by-layer interface of `cases.Implementation`."""

    name = "transformers"

    def __init__(
        self, config: CSMConfig, weights: Mapping[str, torch.Tensor], *, device: str = "cpu"
    ) -> None:
        self.config = config
        self.model = build(config, weights, device=device)

    @classmethod
    def over(cls, config: CSMConfig, model: CsmForConditionalGeneration) -> TransformersReference:
        """Returns the interface over a model that transformers itself loaded."""
        reference = cls.__new__(cls)
        reference.config, reference.model = config, model.eval().requires_grad_(False)
        return reference

    def _part(self, part: str) -> Any:
        return self.model.backbone_model if part == "backbone" else self.model.depth_decoder.model

    def _in(self, x: np.ndarray) -> torch.Tensor:
        weight = self.model.lm_head.weight
        return torch.from_numpy(np.array(x)).to(weight.device, weight.dtype)

    def _ids(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(x)).to(self.model.lm_head.weight.device).long()

    @staticmethod
    def _out(x: torch.Tensor) -> np.ndarray:
        return x.float().cpu().numpy()

    def _embed(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns embeddings as the processor and the model make them: text or audio, never both."""
        text = self.model.embed_text_tokens(frames[..., -1])
        audio = self.model.backbone_model.embed_tokens(frames[..., :-1])
        return torch.where(mask[..., -1:], text, audio)

    @torch.inference_mode()
    def embed_frames(self, frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns the backbone's inputs [B, T, D]."""
        return self._out(self._embed(self._ids(frames), self._ids(mask).bool()))

    @torch.inference_mode()
    def norm(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's attention norm of x [B, T, D]."""
        return self._out(self._part(part).layers[0].input_layernorm(self._in(x)))

    @torch.inference_mode()
    def scores(self, part: str, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns rotated q·k [B, N, T, T] of the first block, before scaling and mask."""
        attn, x_ = self._part(part).layers[0].self_attn, self._in(x)
        shape = (*x_.shape[:2], -1, attn.head_dim)
        q, k = (p(x_).view(shape).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
        cos, sin = self._part(part).rotary_emb(x_, position_ids=self._ids(positions))
        q, k = modeling_csm.apply_rotary_pos_emb(q, k, cos, sin)
        k = modeling_csm.repeat_kv(k, attn.num_key_value_groups)
        return self._out(q.float() @ k.float().transpose(2, 3))

    def _causal(self, length: int) -> torch.Tensor:
        lowest = torch.finfo(self.model.lm_head.weight.dtype).min
        return torch.full((length, length), lowest, device=self.model.device).triu(1)[None, None]

    @torch.inference_mode()
    def attention(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's causal attention of x [B, T, D], without norm and residual."""
        x_, body = self._in(x), self._part(part)
        at = torch.arange(x_.shape[1], device=x_.device)[None]
        output, _ = body.layers[0].self_attn(
            x_, body.rotary_emb(x_, at), self._causal(x_.shape[1]).to(x_.dtype)
        )
        return self._out(output)

    @torch.inference_mode()
    def mlp(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's MLP of x [B, T, D], without norm and residual."""
        return self._out(self._part(part).layers[0].mlp(self._in(x)))

    @torch.inference_mode()
    def block(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block of x [B, T, D]."""
        x_, body = self._in(x), self._part(part)
        at = torch.arange(x_.shape[1], device=x_.device)[None]
        return self._out(
            body.layers[0](
                x_,
                attention_mask=self._causal(x_.shape[1]).to(x_.dtype),
                position_embeddings=body.rotary_emb(x_, at),
            )
        )

    @torch.inference_mode()
    def stack(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns all blocks and the final norm of x [B, T, D].

        The library's depth decoder projects its inputs; it gets the identity instead here.
        """
        body = self._part(part)
        if part == "backbone":
            return self._out(body(inputs_embeds=self._in(x), use_cache=False).last_hidden_state)
        projector, body.inputs_embeds_projector = body.inputs_embeds_projector, nn.Identity()
        try:
            return self._out(body(inputs_embeds=self._in(x), use_cache=True).last_hidden_state)
        finally:
            body.inputs_embeds_projector = projector

    @torch.inference_mode()
    def heads(self, backbone: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits ([B, T, V], [B, C-1, V]) of hidden states ([B, T, D], [B, C-1, E])."""
        c0 = self.model.lm_head(self._in(backbone))
        positions = torch.arange(1, self.config.num_codebooks, device=self.model.device)
        rest = self.model.depth_decoder.codebooks_head(self._in(decoder), positions)
        return self._out(c0), self._out(rest)

    @torch.inference_mode()
    def logits(self, frames: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns teacher-forced logits ([B, T, V], [B, T-1, C-1, V]); padding on the right."""
        frames_, mask_ = self._ids(frames), self._ids(mask).bool()
        hidden = self.model.backbone_model(
            inputs_embeds=self._embed(frames_, mask_), use_cache=False
        ).last_hidden_state
        # As in training: a place for the hidden state, then the codes but the last.
        codes = nn.functional.pad(frames_[:, 1:, : self.config.num_codebooks - 1], (1, 0))
        # Without a cache transformers 5.23 takes the depth decoder's positions for packed sequences
        # and fails on their shape; an empty cache changes nothing else.
        rest = self.model.depth_decoder(
            input_ids=codes.flatten(0, 1),
            backbone_last_hidden_state=hidden[:, :-1].flatten(0, 1),
            use_cache=True,
        ).logits
        shape = (frames_.shape[0], frames_.shape[1] - 1)
        return self._out(self.model.lm_head(hidden)), self._out(rest.unflatten(0, shape))

    def _reserved(self) -> list[int]:
        return list(range(self.config.codebook_size, self.config.audio_vocab_size))

    @torch.inference_mode()
    def generate_text(self, prompts: Sequence[Prompt], num_frames: int) -> np.ndarray:
        """Returns greedy codes [B, n, C] by `generate` for text-only prompts, padded on the left."""
        length = max(len(p.frames) for p in prompts)
        ids = torch.full((len(prompts), length), self.model.config.pad_token_id)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt.frames) :] = self._ids(prompt.frames[:, -1]).cpu()
            attention[row, length - len(prompt.frames) :] = 1
        device = self.model.device
        codes = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            max_new_tokens=num_frames,
            do_sample=False,
            depth_decoder_do_sample=False,
            suppress_tokens=self._reserved(),
            depth_decoder_suppress_tokens=self._reserved(),
        )
        return codes.cpu().numpy().astype(np.int32)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], num_frames: int) -> list[np.ndarray]:
        """Returns greedy codes [n, C] after each prompt, generated one prompt after the other.

        `generate` takes audio context only as sound through the codec, so the outer loop is written
        out here; cache, backbone and the depth decoder's `generate` are transformers'.
        """
        return [self._generate_one(p, num_frames) for p in prompts]

    def _generate_one(self, prompt: Prompt, num_frames: int) -> np.ndarray:
        model, cache = self.model, DynamicCache()
        frames, mask = pad([prompt])
        inputs = self._embed(self._ids(frames), self._ids(mask).bool())
        codes: list[torch.Tensor] = []
        for _ in range(num_frames):
            hidden = model.backbone_model(
                inputs_embeds=inputs, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            first = model.lm_head(hidden)[:, : self.config.codebook_size].argmax(-1, keepdim=True)
            frame = model.depth_decoder.generate(
                input_ids=nn.functional.pad(first, (1, 0)),
                backbone_last_hidden_state=hidden,
                do_sample=False,
                min_new_tokens=self.config.num_codebooks - 1,
                max_new_tokens=self.config.num_codebooks - 1,
                suppress_tokens=self._reserved(),
            )[:, 1:]
            if not frame.any():
                break
            codes.append(frame)
            inputs = model.backbone_model.embed_tokens(frame[:, None])
        empty = torch.zeros(0, self.config.num_codebooks)
        return (torch.cat(codes) if codes else empty).cpu().numpy().astype(np.int32)
