"""CSM: backbone and decoder joined, teacher-forced scores, one sampled frame, and what a frame costs.

Weights are plain nested dicts (`param_shapes` gives the tree); `bind` merges one into the Flax modules
inside whatever `jax.jit` is tracing, so every transform is JAX's own and there is one tree for
checkpoints, optimisers and shardings.

    frames [B, T, C+1] -> backbone -> h [B, T, D] -> c0 logits [B, T, V]
                                      h_t, frame t+1's codes -> decoder -> logits [B, T-1, C-1, V]
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from csm_jax import kvcache, sharding
from csm_jax.array_typing import Array, Bool, DTypeLike, Float, Int, Key, Params
from csm_jax.backbone import Backbone
from csm_jax.config import CSMConfig, LlamaConfig
from csm_jax.decoder import Decoder
from csm_jax.linear import StandIn, project
from csm_jax.llama import embed_codes
from csm_jax.sampling import SamplingParams, choose, gumbel


class CSM(nnx.Module):
    """The two transformers of one model."""

    def __init__(self, config: CSMConfig):
        self.config = config
        self.backbone = Backbone(config)
        self.decoder = Decoder(config)

    @staticmethod
    def bind(config: CSMConfig, params: Params) -> CSM:
        """Returns the model with these weights; call it inside the function being jitted.

        Raises:
            ValueError: The tree of `params` is not that of `param_shapes(config)`, a `StandIn` counting
                as the weight it stands for.
        """
        graph, shapes, _ = _declaration(config)
        if jax.tree.structure(params, is_leaf=_is_stand_in) != jax.tree.structure(shapes):
            raise ValueError(_tree_difference(params, shapes))
        return nnx.merge(graph, params)

    @property
    def decoder_table(self) -> Float[Array, "R D"]:
        """The audio embedding table the decoder reads: the backbone's own unless untied."""
        owner = self.backbone if self.config.tie_codebooks_embeddings else self.decoder
        return owner.audio_embeddings[...]


@functools.lru_cache(maxsize=32)
def _declaration(config: CSMConfig) -> tuple[Any, Params, Any]:
    graph, state = nnx.split(CSM(config))
    return graph, nnx.to_pure_dict(state), state


def _is_stand_in(node: Any) -> bool:
    return isinstance(node, StandIn)


def _tree_difference(params: Params, shapes: Params) -> str:
    have, want = (
        {
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_stand_in)
        }
        for tree in (params, shapes)
    )
    return (
        "params do not have the tree of param_shapes(config): "
        f"missing {sorted(want - have)}, extra {sorted(have - want)}"
    )


def _variables(config: CSMConfig) -> list[tuple[tuple[str, ...], Any]]:
    flat = nnx.to_flat_state(_declaration(config)[2])
    return [(tuple(str(part) for part in path), leaf) for path, leaf in flat]


def param_shapes(config: CSMConfig) -> Params:
    """Returns the tree of weights as `jax.ShapeDtypeStruct` leaves (float32)."""
    return jax.tree.map(lambda leaf: leaf, _declaration(config)[1])


def param_axes(config: CSMConfig) -> Params:
    """Returns the tree of weights with each leaf's tuple of logical axis names."""
    return _unflatten({path: leaf.get_metadata("axes") for path, leaf in _variables(config)})


def param_shardings(config: CSMConfig, mesh: jax.sharding.Mesh) -> Params:
    """Returns the tree of weights with each leaf's placement on `mesh`.

    Raises:
        ValueError: A size does not divide by the mesh axis that the rules split it over.
    """
    problems = []
    for axis, name, size in (
        ("heads", "backbone.num_kv_heads", config.backbone.num_kv_heads),
        ("decoder_heads", "decoder.num_kv_heads", config.decoder.num_kv_heads),
        ("mlp", "backbone.intermediate_dim", config.backbone.intermediate_dim),
        ("decoder_mlp", "decoder.intermediate_dim", config.decoder.intermediate_dim),
        ("text_vocab", "text_vocab_size", config.text_vocab_size),
        ("audio_rows", "audio embedding rows", config.num_codebooks * config.audio_vocab_size),
        ("audio_vocab", "audio_vocab_size", config.audio_vocab_size),
        ("codebook", "num_codebooks - 1", config.num_codebooks - 1),
        ("embed", "backbone.embed_dim", config.backbone.embed_dim),
        ("embed", "decoder.embed_dim", config.decoder.embed_dim),
        ("decoder_embed", "decoder.embed_dim", config.decoder.embed_dim),
    ):
        parts = sharding.parts(mesh, axis)
        if size % parts:
            over = dict(sharding.current_rules())[axis]
            problems.append(f"{name}={size:,} does not divide by the {parts} devices of {over!r}")
    if problems:
        raise ValueError(f"a mesh axis is too large: {'; '.join(problems)}")
    return _unflatten(
        {
            path: sharding.named(mesh, *leaf.get_metadata("axes"))
            for path, leaf in _variables(config)
        }
    )


def _unflatten(flat: dict[tuple[str, ...], Any]) -> Params:
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def init_params(config: CSMConfig, key: Key[Array, ""], *, dtype: DTypeLike) -> Params:
    """Returns random weights: normal with fan-in scale, norms 1, made leaf by leaf.

    Args:
        config: Sizes.
        key: Each leaf draws from this key folded with its place in the tree.
        dtype: Of every leaf; the draw itself is float32.
    """

    @functools.partial(jax.jit, static_argnames=("shape", "scale"))
    def draw(key: Array, *, shape: tuple[int, ...], scale: float | None) -> Array:
        if scale is None:
            return jnp.ones(shape, dtype)
        return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return _unflatten(
        {
            path: draw(
                jax.random.fold_in(key, i),
                shape=leaf.get_value().shape,
                scale=leaf.get_metadata("init_scale"),
            )
            for i, (path, leaf) in enumerate(_variables(config))
        }
    )


def forward(
    params: Params,
    frames: Int[Array, "B T C1"],
    mask: Bool[Array, "B T C1"],
    *,
    config: CSMConfig,
) -> tuple[Float[Array, "B T V"], Float[Array, "B T_minus_1 C_minus_1 V"]]:
    """Returns the teacher-forced float32 scores of all codebooks.

    `c0[:, t]` and `decoder[:, t]` score frame t+1; the decoder sees that frame's earlier codes.
    Scores before text positions or padding mean nothing and are the caller's to drop.

    Args:
        params: Weights, in the tree of `param_shapes`.
        frames: C audio codes and a text id per position, padded on the right.
        mask: Which columns count; all false at padding.
        config: Sizes.

    Returns:
        `(c0, decoder)`: scores of code 0, and of codes 1..C-1.
    """
    model = CSM.bind(config, params)
    with jax.named_scope("backbone"):
        hidden, _ = model.backbone.full(model.backbone.embed(frames, mask))
        c0 = model.backbone.logits(hidden)
    with jax.named_scope("decoder"):
        # Scanned over positions: all frames at once would hold T copies of the decoder's activations.
        def score(_: None, step: tuple[Array, Array]) -> tuple[None, Array]:
            return None, model.decoder.score(step[0], step[1], model.decoder_table)

        steps = (jnp.swapaxes(hidden[:, :-1], 0, 1), jnp.swapaxes(frames[:, 1:, :-1], 0, 1))
        _, scores = jax.lax.scan(score, None, steps)
    return c0, jnp.transpose(scores, (2, 0, 1, 3))


def sample_frame(
    model: CSM,
    hidden: Float[Array, "B D"],
    keys: Key[Array, "B"],
    sampling: SamplingParams,
    decoder_sampling: SamplingParams,
    *,
    ranks: int,
) -> tuple[Int[Array, "B C"], Bool[Array, "B"]]:
    """Returns the codes of the frame after `hidden`, and whether every score of a row was finite.

    Args:
        model: Bound weights.
        hidden: The backbone's normed hidden state at each row's last position.
        keys: The frame's key per row (`csm_jax.sampling.frame_keys`).
        sampling: Settings for code 0.
        decoder_sampling: Settings for codes 1..C-1.
        ranks: Static (`csm_jax.sampling.ranks_needed`).
    """
    config, decoder = model.config, model.decoder

    def draw(logits: Array, codebook: int | Array, settings: SamplingParams) -> tuple[Array, Array]:
        with jax.named_scope("sample"):
            noise = gumbel(keys, codebook, num_codes=config.audio_vocab_size)
            draw_rows = functools.partial(choose, codebook_size=config.codebook_size, ranks=ranks)
            code = sharding.by_rows(draw_rows, logits, noise, settings)
            return code, jnp.isfinite(logits).all(axis=-1)

    def embed(code: Array, codebook: int | Array) -> Array:
        rows = embed_codes(model.decoder_table, code, codebook, config.audio_vocab_size)
        return project(rows[:, None], decoder.projection[...])

    with jax.named_scope("codebook0"):
        c0, finite = draw(model.backbone.logits(hidden), 0, sampling)
    with jax.named_scope("codebook_scan"):
        cache = kvcache.init(
            config.decoder,
            batch=hidden.shape[0],
            capacity=config.num_codebooks,
            dtype=hidden.dtype,
            per_row=False,
            heads="decoder_heads",
        )
        start = project(hidden[:, None], decoder.projection[...])
        x = jnp.concatenate([start, embed(c0, 0)], axis=1)
        y, cache = decoder.step(x, cache, window=config.num_codebooks)
        cache = kvcache.advance(cache, 2)
        c1, ok = draw(decoder.logits(y[:, -1], 1), 1, decoder_sampling)

        def next_code(carry: tuple[Any, ...], codebook: Array) -> tuple[tuple[Any, ...], Array]:
            cache, code, finite = carry
            x = embed(code, codebook - 1)
            y, cache = decoder.step(x, cache, window=config.num_codebooks)
            cache = kvcache.advance(cache, 1)
            code, ok = draw(decoder.logits(y[:, 0], codebook), codebook, decoder_sampling)
            return (cache, code, finite & ok), code

        carry = (cache, c1, finite & ok)
        (_, _, finite), rest = jax.lax.scan(next_code, carry, jnp.arange(2, config.num_codebooks))
    codes = jnp.concatenate([c0[:, None], c1[:, None], jnp.swapaxes(rest, 0, 1)], axis=1)
    return codes, finite


# --- what it costs -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FrameCost:
    """What generating one frame of one row costs, by counting weights and products.

    Attributes:
        weight_bytes: Weights read, whatever the batch.
        cache_bytes: Keys and values read and written, per row.
        flops: Floating-point operations, per row.
    """

    weight_bytes: int
    cache_bytes: int
    flops: int


def num_params(config: CSMConfig) -> int:
    """Returns the number of weights."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))


def frame_cost(config: CSMConfig, *, itemsize: int, window: int) -> FrameCost:
    """Returns the cost of one frame: a backbone step, C-1 decoder steps and the heads.

    Embedding rows (33 of 2 to 8 KiB) are left out.

    Args:
        config: Sizes.
        itemsize: Bytes per weight and per cached number.
        window: Cache positions the backbone reads.
    """

    def stack(c: LlamaConfig) -> int:
        heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        return c.num_layers * c.embed_dim * (heads + 3 * c.intermediate_dim)

    def attention(c: LlamaConfig, positions: int) -> int:
        return 4 * c.num_layers * c.num_heads * c.head_dim * positions

    def cached(c: LlamaConfig, positions: int) -> int:
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * positions

    back, deco, codebooks = config.backbone, config.decoder, config.num_codebooks
    heads = config.audio_vocab_size * (back.embed_dim + (codebooks - 1) * deco.embed_dim)
    projection = deco.embed_dim * back.embed_dim
    # Positions 0 and 1 run as one step: one reading of the weights, two positions of arithmetic.
    read = stack(back) + (codebooks - 1) * (stack(deco) + projection) + heads
    multiplied = stack(back) + codebooks * (stack(deco) + projection) + heads
    attended = attention(back, window) + codebooks * attention(deco, codebooks)
    return FrameCost(
        weight_bytes=itemsize * read,
        cache_bytes=itemsize * (cached(back, window + 1) + codebooks * cached(deco, codebooks + 1)),
        flops=2 * multiplied + attended,
    )
