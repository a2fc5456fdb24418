"""Sesame's CSM put together from torchtune's parts, as the oracle for everything else.

The architecture is that of SesameAILabs/csm `models.py`: two Llama-3.2 transformers out of torchtune
modules (interleaved RoPE, key and value heads expanded inside attention, float32 norms), one shared
audio table, and a generation loop that fills KV caches frame by frame and resets the decoder's caches
every frame. Tensor names and shapes are exactly those of the published `model.safetensors`.

Differences from the published code, none of which changes a number: sizes come from our `CSMConfig`
(the published builder fixes the low and high RoPE factors, which are arguments here), the choice of a
code is a function passed in (so greedy choice, the reserved codes and the noise are the caller's), and
`teacher_forced` scores given frames without caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from csm_jax.config import CSMConfig, LlamaConfig

from ..inputs import Prompt

Chooser = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Maps logits [B, V], the frame's number and the codebook's number to codes [B, 1]."""


def greedy(*, codebook_size: int | None = None) -> Chooser:
    """Returns a chooser of the most likely code; ids from `codebook_size` on are never chosen."""

    def choose(logits: torch.Tensor, frame: int, codebook: int) -> torch.Tensor:
        del frame, codebook
        return logits[:, :codebook_size].argmax(dim=-1, keepdim=True)

    return choose


def sample_topk(
    *,
    topk: int,
    temperature: float,
    exponential: Chooser,
    codebook_size: int | None = None,
) -> Chooser:
    """Returns Sesame's top-k sampler, its noise drawn by `exponential(logits, frame, codebook)`.

    As in the published `sample_topk`: ties with the k-th logit stay, and the drawn code maximises
    probability over noise. Ids from `codebook_size` on are removed before the k largest are taken.
    """

    def choose(logits: torch.Tensor, frame: int, codebook: int) -> torch.Tensor:
        scores = logits / temperature
        if codebook_size is not None:
            scores[:, codebook_size:] = -torch.inf
        kth = scores.topk(topk, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
        probabilities = scores.log_softmax(dim=-1).softmax(dim=-1)
        return (probabilities / exponential(logits, frame, codebook)).argmax(dim=-1, keepdim=True)

    return choose


def _transformer(sizes: LlamaConfig) -> TransformerDecoder:
    """Returns a torchtune Llama-3.2 without token embedding and output layer."""
    dim, heads, kv_heads = sizes.embed_dim, sizes.num_heads, sizes.num_kv_heads

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    # The tables are buffers that no state dict holds: real memory even when weights are not.
    with torch.device("cpu"):
        rope = Llama3ScaledRoPE(
            sizes.head_dim,
            max_seq_len=sizes.max_seq_len,
            base=sizes.rope_base,
            scale_factor=sizes.scale_factor,
            low_freq_factor=sizes.low_freq_factor,
            high_freq_factor=sizes.high_freq_factor,
            old_context_len=sizes.old_context_len,
        )
    layers = [
        TransformerSelfAttentionLayer(
            attn=MultiHeadAttention(
                embed_dim=dim,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=sizes.head_dim,
                q_proj=linear(dim, heads * sizes.head_dim),
                k_proj=linear(dim, kv_heads * sizes.head_dim),
                v_proj=linear(dim, kv_heads * sizes.head_dim),
                output_proj=linear(heads * sizes.head_dim, dim),
                pos_embeddings=rope,
                max_seq_len=sizes.max_seq_len,
            ),
            mlp=FeedForward(
                gate_proj=linear(dim, sizes.intermediate_dim),
                down_proj=linear(sizes.intermediate_dim, dim),
                up_proj=linear(dim, sizes.intermediate_dim),
            ),
            sa_norm=RMSNorm(dim, eps=sizes.norm_eps),
            mlp_norm=RMSNorm(dim, eps=sizes.norm_eps),
        )
        for _ in range(sizes.num_layers)
    ]
    return TransformerDecoder(
        tok_embeddings=nn.Identity(),
        layers=nn.ModuleList(layers),
        max_seq_len=sizes.max_seq_len,
        num_heads=heads,
        head_dim=sizes.head_dim,
        norm=RMSNorm(dim, eps=sizes.norm_eps),
        output=nn.Identity(),
    )


def _causal(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class SesameModel(nn.Module):
    """Sesame's CSM; parameters carry the published names."""

    def __init__(self, config: CSMConfig) -> None:
        super().__init__()
        if not config.tie_codebooks_embeddings:
            raise ValueError(
                "Sesame's model has one audio table; tie_codebooks_embeddings is false"
            )
        self.config = config
        dim, vocab, codebooks = (
            config.backbone.embed_dim,
            config.audio_vocab_size,
            config.num_codebooks,
        )
        self.backbone = _transformer(config.backbone)
        self.decoder = _transformer(config.decoder)
        self.text_embeddings = nn.Embedding(config.text_vocab_size, dim)
        self.audio_embeddings = nn.Embedding(vocab * codebooks, dim)
        self.projection = nn.Linear(dim, config.decoder.embed_dim, bias=False)
        self.codebook0_head = nn.Linear(dim, vocab, bias=False)
        self.audio_head = nn.Parameter(torch.empty(codebooks - 1, config.decoder.embed_dim, vocab))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all parameters."""
        return self.audio_head.dtype

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.audio_head.device

    def embed_audio(self, codebook: int, codes: torch.Tensor) -> torch.Tensor:
        """Returns embeddings [..., D] of one codebook's codes [...]."""
        return self.audio_embeddings(codes + codebook * self.config.audio_vocab_size)

    def embed_frames(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the backbone's inputs [B, T, D]: the masked sum of each frame's embeddings."""
        audio = [self.embed_audio(c, frames[..., c]) for c in range(self.config.num_codebooks)]
        columns = torch.stack([*audio, self.text_embeddings(frames[..., -1])], dim=2)
        return (columns * mask[..., None]).sum(dim=2)

    def teacher_forced(
        self, frames: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits (c0 [B, T, V], decoder [B, T-1, C-1, V]); position t scores frame t+1.

        Padding must be on the right; there the values mean nothing.
        """
        hidden = self.backbone(self.embed_frames(frames, mask)).to(self.dtype)
        c0 = self.codebook0_head(hidden)
        codebooks = self.config.num_codebooks
        # The decoder reads the backbone's hidden state, then codes 0..C-2 of the frame it scores.
        inputs = [hidden[:, :-1]]
        inputs += [self.embed_audio(c, frames[:, 1:, c]) for c in range(codebooks - 1)]
        sequence = torch.stack(inputs, dim=2).flatten(0, 1)
        output = self.decoder(self.projection(sequence)).to(self.dtype)
        heads = [output[:, c] @ self.audio_head[c - 1] for c in range(1, codebooks)]
        logits = torch.stack(heads, dim=1)
        return c0, logits.view(frames.shape[0], -1, *logits.shape[1:])

    def setup_caches(self, batch_size: int, max_seq_len: int) -> None:
        """Allocates both KV caches for `batch_size` rows and `max_seq_len` backbone positions."""
        codebooks = self.config.num_codebooks
        with self.device:
            self.backbone.setup_caches(batch_size, self.dtype, decoder_max_seq_len=max_seq_len)
            self.decoder.setup_caches(batch_size, self.dtype, decoder_max_seq_len=codebooks)
        self._backbone_mask = _causal(max_seq_len, self.device)
        self._decoder_mask = _causal(codebooks, self.device)

    def remove_caches(self) -> None:
        """Frees the KV caches; `teacher_forced` needs a model without them."""
        for layer in (*self.backbone.layers, *self.decoder.layers):
            layer.attn.kv_cache = None
            layer.attn.cache_enabled = False

    def generate_frame(
        self,
        frames: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        *,
        index: int,
        choose: Chooser,
    ) -> torch.Tensor:
        """Returns codes [B, C] of frame `index`, after `frames` [B, T, C+1] at `positions` [B, T]."""
        hidden = self.backbone(
            self.embed_frames(frames, mask),
            input_pos=positions,
            mask=self._backbone_mask[positions],
        ).to(self.dtype)
        last = hidden[:, -1]
        codes = [choose(self.codebook0_head(last), index, 0)]

        self.decoder.reset_caches()
        inputs = torch.stack([last, self.embed_audio(0, codes[0][:, 0])], dim=1)
        positions = torch.arange(2, device=self.device).expand(frames.shape[0], 2)
        for codebook in range(1, self.config.num_codebooks):
            output = self.decoder(
                self.projection(inputs), input_pos=positions, mask=self._decoder_mask[positions]
            ).to(self.dtype)
            logits = output[:, -1] @ self.audio_head[codebook - 1]
            codes.append(choose(logits, index, codebook))
            inputs = self.embed_audio(codebook, codes[-1])
            positions = positions[:, -1:] + 1
        return torch.cat(codes, dim=1)


@torch.inference_mode()
def generate(
    model: SesameModel,
    frames: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_frames: int,
    choose: Chooser,
) -> torch.Tensor:
    """Returns codes [n, C] after one prompt ([T, C+1]), n <= `num_frames`, by Sesame's loop.

    A frame of zeros only ends the audio and is not kept.
    """
    length = frames.shape[0]
    model.setup_caches(1, length + num_frames)
    try:
        current, current_mask = frames[None], mask[None]
        positions = torch.arange(length, device=model.device)[None]
        codes: list[torch.Tensor] = []
        for index in range(num_frames):
            frame = model.generate_frame(
                current, current_mask, positions, index=index, choose=choose
            )
            if not frame.any():
                break
            codes.append(frame)
            no_text = torch.zeros_like(frame[:, :1])
            current = torch.cat([frame, no_text], dim=1)[:, None]
            current_mask = torch.cat([torch.ones_like(frame), no_text], dim=1)[:, None].bool()
            positions = positions[:, -1:] + 1
    finally:
        model.remove_caches()
    width = model.config.num_codebooks
    return torch.cat(codes) if codes else torch.zeros(0, width, dtype=frames.dtype)


def build(
    config: CSMConfig, weights: Mapping[str, torch.Tensor], *, device: str = "cpu"
) -> SesameModel:
    """Returns the model over `weights`, which it uses in place and in their own dtype."""
    with torch.device("meta"):
        model = SesameModel(config)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    return model.requires_grad_(False).to(device)


class SesameReference:
    """Sesame's model behind the layer-by-layer interface of `cases.Implementation`."""

    name = "sesame"

    def __init__(
        self, config: CSMConfig, weights: Mapping[str, torch.Tensor], *, device: str = "cpu"
    ) -> None:
        self.config = config
        self.model = build(config, weights, device=device)

    def _stack(self, part: str) -> TransformerDecoder:
        return getattr(self.model, part)

    def _in(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(x)).to(self.model.device, self.model.dtype)

    def _ids(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(x)).to(self.model.device).long()

    @staticmethod
    def _out(x: torch.Tensor) -> np.ndarray:
        return x.float().cpu().numpy()

    @torch.inference_mode()
    def embed_frames(self, frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns the backbone's inputs [B, T, D]."""
        return self._out(self.model.embed_frames(self._ids(frames), self._ids(mask).bool()))

    @torch.inference_mode()
    def norm(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's attention norm of x [B, T, D]."""
        return self._out(self._stack(part).layers[0].sa_norm(self._in(x)))

    @torch.inference_mode()
    def scores(self, part: str, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns rotated q·k [B, N, T, T] of the first block, before scaling and mask."""
        attn = self._stack(part).layers[0].attn
        x_, at = self._in(x), self._ids(positions)
        shape = (*x_.shape[:2], -1, attn.head_dim)
        q = attn.pos_embeddings(attn.q_proj(x_).view(shape), input_pos=at)
        k = attn.pos_embeddings(attn.k_proj(x_).view(shape), input_pos=at)
        k = k.repeat_interleave(attn.num_heads // attn.num_kv_heads, dim=2)
        return self._out(torch.einsum("btnh,bsnh->bnts", q.float(), k.float()))

    @torch.inference_mode()
    def attention(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's causal attention of x [B, T, D], without norm and residual."""
        x_ = self._in(x)
        return self._out(self._stack(part).layers[0].attn(x_, x_))

    @torch.inference_mode()
    def mlp(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's MLP of x [B, T, D], without norm and residual."""
        return self._out(self._stack(part).layers[0].mlp(self._in(x)))

    @torch.inference_mode()
    def block(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block of x [B, T, D]."""
        return self._out(self._stack(part).layers[0](self._in(x)))

    @torch.inference_mode()
    def stack(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns all blocks and the final norm of x [B, T, D]."""
        return self._out(self._stack(part)(self._in(x)))

    @torch.inference_mode()
    def heads(self, backbone: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits ([B, T, V], [B, C-1, V]) of hidden states ([B, T, D], [B, C-1, E])."""
        c0 = self.model.codebook0_head(self._in(backbone))
        rest = torch.einsum("bce,cev->bcv", self._in(decoder), self.model.audio_head)
        return self._out(c0), self._out(rest)

    @torch.inference_mode()
    def logits(self, frames: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns teacher-forced logits ([B, T, V], [B, T-1, C-1, V])."""
        c0, rest = self.model.teacher_forced(self._ids(frames), self._ids(mask).bool())
        return self._out(c0), self._out(rest)

    def generate(self, prompts: Sequence[Prompt], num_frames: int) -> list[np.ndarray]:
        """Returns greedy codes [n, C] after each prompt, generated one prompt after the other."""
        return [self.generate_one(p, num_frames, self.greedy()) for p in prompts]

    def greedy(self) -> Chooser:
        """Returns the greedy chooser that never draws a reserved code."""
        return greedy(codebook_size=self.config.codebook_size)

    def generate_one(self, prompt: Prompt, num_frames: int, choose: Chooser) -> np.ndarray:
        """Returns codes [n, C] after one prompt."""
        frames, mask = self._ids(prompt.frames), self._ids(prompt.mask).bool()
        codes = generate(self.model, frames, mask, num_frames=num_frames, choose=choose)
        return codes.cpu().numpy().astype(np.int32)
