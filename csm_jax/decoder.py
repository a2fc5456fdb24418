"""The decoder: the codes 1..C-1 of one frame, one after another.

It is a small Llama over C positions, started afresh for every frame:

    position 0     projection(h), the backbone's hidden state
    position p     projection(embedding of code p-1), p = 1 .. C-1
    output at p    scored by audio_head[p-1], gives code p

The last code is never fed back. Teacher-forced (`score`), all positions of many frames run at once;
sampling (`csm_jax.model.sample_frame`) runs positions 0 and 1 together and then one at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, Float, Int
from csm_jax.config import CSMConfig
from csm_jax.linear import project
from csm_jax.llama import Stack, embed_codes, linear, parameter


class Decoder(Stack):
    """Projection into the decoder's width, Llama stack and one head per codebook 1..C-1."""

    def __init__(self, config: CSMConfig):
        super().__init__(config.decoder, heads_axis="decoder_heads", mlp_axis="decoder_mlp")
        dim, backbone_dim = config.decoder.embed_dim, config.backbone.embed_dim
        self.num_codebooks = config.num_codebooks
        self.audio_vocab_size = config.audio_vocab_size
        self.projection = linear(dim, backbone_dim, ("decoder_embed", "embed"))
        self.audio_head = parameter(
            (config.num_codebooks - 1, config.audio_vocab_size, dim),
            ("codebook", "audio_vocab", "embed"),
            scale=dim**-0.5,
        )
        if not config.tie_codebooks_embeddings:
            self.audio_embeddings = parameter(
                (config.num_codebooks * config.audio_vocab_size, backbone_dim),
                ("audio_rows", "embed"),
                scale=backbone_dim**-0.5,
            )

    def logits(self, y: Float[Array, "B E"], codebook: int | Int[Array, ""]) -> Float[Array, "B V"]:
        """Returns the float32 scores of code `codebook` (1..C-1) from the output at that position."""
        head = jax.lax.dynamic_index_in_dim(
            self.audio_head[...], codebook - 1, axis=0, keepdims=False
        )
        return project(y, head, float32=True)

    def score(
        self,
        hidden: Float[Array, "M D"],
        codes: Int[Array, "M C"],
        table: Float[Array, "R D"],
    ) -> Float[Array, "C_minus_1 M V"]:
        """Returns the float32 scores of codes 1..C-1 of `M` frames whose codes are given.

        A codebook after the other, as the products with their heads make them: the largest array
        there is would have to be turned around otherwise.

        Args:
            hidden: The backbone's hidden state before each frame.
            codes: The frames' codes; the last is not read.
            table: The audio embedding table the decoder reads.
        """
        # One gather: the gradient of each is an array of the table's size.
        codebooks = jnp.arange(self.num_codebooks - 1)
        rows = embed_codes(table, codes[:, :-1], codebooks, self.audio_vocab_size)
        x = project(jnp.concatenate([hidden[:, None], rows], axis=1), self.projection[...])
        y, _ = self.full(x)
        return jnp.einsum(
            "MCE,CVE->CMV",
            y[:, 1:],
            self.audio_head[...],
            precision=jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
            out_sharding=sharding.follow(y, None, 0, None),
        )
