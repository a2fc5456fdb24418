"""The backbone: frames in, one hidden state per position out.

A position is a frame of C + 1 columns, C audio codes and a text id last, with a mask saying which
columns count. Its input is the masked sum of their embeddings (Sesame `Model._embed_tokens`): a text
position is its text embedding, an audio position the sum of C code embeddings. The sums pass through
the Llama stack; the normed hidden state h_t at the last position of the past both scores code 0 of the
next frame (`codebook0_head`) and starts the decoder.

    frames [B, T, C+1], mask  ->  embed [B, T, D]  ->  stack  ->  h [B, T, D]  ->  logits [B, T, V]

The audio table has C·V rows, row codebook·V + code, and is the decoder's input table too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Bool, Float, Int
from csm_jax.config import CSMConfig
from csm_jax.linear import project
from csm_jax.llama import Stack, embed_codes, linear, parameter


class Backbone(Stack):
    """Embedding sum, Llama stack and the head of codebook 0."""

    def __init__(self, config: CSMConfig):
        super().__init__(config.backbone, heads_axis="heads", mlp_axis="mlp")
        dim = config.backbone.embed_dim
        self.num_codebooks = config.num_codebooks
        self.audio_vocab_size = config.audio_vocab_size
        rows = config.num_codebooks * config.audio_vocab_size
        self.text_embeddings = parameter(
            (config.text_vocab_size, dim), ("text_vocab", "embed"), scale=dim**-0.5
        )
        self.audio_embeddings = parameter((rows, dim), ("audio_rows", "embed"), scale=dim**-0.5)
        self.codebook0_head = linear(config.audio_vocab_size, dim, ("audio_vocab", "embed"))

    def embed(
        self, frames: Int[Array, "B T C1"], mask: Bool[Array, "B T C1"]
    ) -> Float[Array, "B T D"]:
        """Returns the masked sum of each frame's embeddings, added in float32."""
        table = self.audio_embeddings[...]
        total = _masked(self._text(frames[:, :, -1]), mask[:, :, -1])
        total = total + _sum_codebooks(table, frames[:, :, :-1], mask[:, :, :-1])
        return total.astype(table.dtype)

    def embed_audio(self, codes: Int[Array, "B C"]) -> Float[Array, "B 1 D"]:
        """Returns the input of one audio frame: the sum of its code embeddings, added in float32."""
        offsets = jnp.arange(self.num_codebooks) * self.audio_vocab_size
        table = self.audio_embeddings[...]
        rows = table.at[codes + offsets].get(out_sharding=sharding.follow(codes, 0, None, None))
        return rows.astype(jnp.float32).sum(axis=1, keepdims=True).astype(table.dtype)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Returns the float32 scores of code 0 of the frame that follows each hidden state."""
        return project(hidden, self.codebook0_head[...], float32=True)

    def _text(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.text_embeddings[...].at[ids].get(out_sharding=sharding.follow(ids, 0, 1, None))


def _masked(rows: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
    return jnp.where(mask[:, :, None], rows.astype(jnp.float32), 0.0)


@jax.custom_vjp
def _sum_codebooks(
    table: Float[Array, "R D"], codes: Int[Array, "B T C"], mask: Bool[Array, "B T C"]
) -> Float[Array, "B T D"]:
    """Returns the masked sum of the embeddings of each position's codes, in float32.

    One gather per codebook, added as they come: gathering [B, T, C, D] first would hold 32 times the
    activations. The gradient is written out here, a codebook's rows at a time: JAX would make an array of the
    whole table's size for each of the gathers, and add them.
    """
    vocab = table.shape[0] // codes.shape[2]
    total = _masked(embed_codes(table, codes[:, :, 0], 0, vocab), mask[:, :, 0])
    for i in range(1, codes.shape[2]):
        total = total + _masked(embed_codes(table, codes[:, :, i], i, vocab), mask[:, :, i])
    return total


def _sum_forwards(table: Array, codes: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    return _sum_codebooks(table, codes, mask), (table, codes, mask)


def _sum_backwards(kept: tuple[Array, ...], grad: Array) -> tuple[Array, None, None]:
    table, codes, mask = kept
    vocab = table.shape[0] // codes.shape[2]
    parts = []
    for i in range(codes.shape[2]):

        def rows(part: Array, i: int = i) -> Array:
            return _masked(embed_codes(part, codes[:, :, i], 0, vocab), mask[:, :, i])

        part = jax.lax.slice_in_dim(table, i * vocab, (i + 1) * vocab)
        parts += jax.vjp(rows, part)[1](grad)
    return jnp.concatenate(parts), None, None


_sum_codebooks.defvjp(_sum_forwards, _sum_backwards)
