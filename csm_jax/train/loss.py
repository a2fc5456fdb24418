"""The training objective.

    loss = mean over trained frames of  CE(code 0)
         + decoder_loss_weight · mean over trained frames and codes 1..C-1 of  CE(code)

The hidden state of position t-1 predicts frame t; nothing is predicted across the boundary of two
conversations in a row. The end frame (all codes 0) is a frame like any other. With `amortization_ratio`
above 1 the decoder sees a new draw of the frames at every step (`csm_jax.train.frames`), weighted so that
the expected loss and gradient are those of all frames.

Everything is a sum; whoever knows the whole batch divides by its counts (`count`), so that neither the
split into micro-batches nor that over devices changes the loss. With ratio 1 and weight 1.0 it is
transformers' `CsmForConditionalGeneration(...).loss` (5.x, called by itself: its Trainer scales the
decoder's part by C-1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from csm_jax import sharding
from csm_jax.array_typing import Array, Float, Int, Key, Params, pytree
from csm_jax.closures import hoist
from csm_jax.config import CSMConfig
from csm_jax.data.batch import Batch
from csm_jax.model import CSM
from csm_jax.train.augment import AugmentConfig, augment
from csm_jax.train.frames import draw_frames

# Frames per device that the decoder scores at a time: their 31 · 2,051 float32 scores are 65 MB.
_DECODER_FRAMES = 256

_Piece = tuple[Array, tuple[Array, Array]]  # of all codes; per code, of end frames


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised and what is kept for its gradient.

    Attributes:
        amortization_ratio: The decoder sees one in this many frames; 1 for all.
        decoder_loss_weight: Of codes 1..C-1 against code 0.
        remat: A name of `csm_jax.llama.REMAT`, for the backbone.
        augmentation: What is done to the audio that the backbone reads, if anything.
    """

    amortization_ratio: int
    decoder_loss_weight: float
    remat: str
    augmentation: AugmentConfig | None = None

    def __post_init__(self) -> None:
        if self.amortization_ratio < 1:
            raise ValueError(
                f"amortization_ratio must be at least 1, got {self.amortization_ratio}"
            )
        if not self.decoder_loss_weight >= 0:
            raise ValueError(
                f"decoder_loss_weight must not be negative, got {self.decoder_loss_weight}"
            )


@pytree
class Counts:
    """What the sums of a whole batch are divided by.

    Attributes:
        frames: Weights of all trained frames, end frames included.
        ends: Those of the end frames.
    """

    frames: Float[Array, ""]
    ends: Float[Array, ""]


@pytree
class Sums:
    """Weighted sums over some rows, in nats; the decoder's are estimates if it saw a draw.

    Attributes:
        c0: Cross entropy of code 0.
        decoder: That of codes 1..C-1; no gradient goes to the frames' own weights.
        decoder_codes: The same, code by code, without a gradient.
        end_c0: That of code 0 over end frames.
        end_decoder: That of codes 1..C-1 over end frames, without a gradient.
        right: Frames whose code 0 has the highest score.
    """

    c0: Float[Array, ""]
    decoder: Float[Array, ""]
    decoder_codes: Float[Array, "C_minus_1"]
    end_c0: Float[Array, ""]
    end_decoder: Float[Array, ""]
    right: Float[Array, ""]


def targets(batch: Batch) -> tuple[Int[Array, "*rows S C"], Float[Array, "*rows S"]]:
    """Returns what positions 0..T-2 are to predict: the next frame's codes, and its weight, 0 for none."""
    within = batch.segments[..., 1:] == batch.segments[..., :-1]
    trained = batch.trained[..., 1:] & within
    codes = jnp.asarray(batch.frames)[..., 1:, :-1]
    return codes, jnp.where(trained, batch.weight[..., 1:], 0.0)


def count(batch: Batch) -> Counts:
    """Returns the counts of a whole batch, all its micro-batches and rows."""
    codes, weight = targets(batch)
    end = ~(codes != 0).any(axis=-1)
    return Counts(frames=weight.sum(), ends=jnp.where(end, weight, 0.0).sum())


def loss_sums(
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    config: CSMConfig,
    loss: LossConfig,
    prefix: Float[Array, "P D"] | None = None,
) -> Sums:
    """Returns the sums over the rows of one micro-batch.

    Args:
        params: Weights as they are computed with.
        batch: Without an accumulation axis.
        key: For the draw of the decoder's frames, and for the augmentation.
        config: Sizes.
        loss: The objective; its weight of the decoder is `total`'s business.
        prefix: Trained inputs of the first P positions of every segment.
    """
    model = CSM.bind(config, params)
    codes, weight = targets(batch)
    end = ~(codes != 0).any(axis=-1)
    with jax.named_scope("backbone"):
        frames, mask = jnp.asarray(batch.frames), jnp.asarray(batch.mask)
        if loss.augmentation is not None:
            own = jax.random.fold_in(key, 0)
            frames, mask = augment(own, batch, config=config, augmentation=loss.augmentation)
        x = model.backbone.embed(frames, mask)
        if prefix is not None:
            x = put_prefix(x, prefix, batch)
        positions, segments = jnp.asarray(batch.positions), jnp.asarray(batch.segments)
        hidden = model.backbone.packed(x, positions, segments, remat=loss.remat)
        hidden = hidden[:, :-1]
        scores = model.backbone.logits(hidden)
        c0 = weight * _cross_entropy(scores, codes[..., 0])
        right = weight * (scores.argmax(axis=-1) == codes[..., 0])
    with jax.named_scope("decoder"):
        if loss.amortization_ratio > 1:
            index, share = draw_frames(key, weight > 0, end, ratio=loss.amortization_ratio)
            hidden, codes, weight, seen_end = sharding.by_rows(
                lambda index, *arrays: tuple(_pick(x, index) for x in arrays),
                index, hidden, codes, weight, end,
            )  # fmt: skip
            weight = weight * share
        else:
            seen_end = end
        decoder, decoder_codes, end_decoder = _decoder_sums(model, hidden, codes, weight, seen_end)
    return Sums(
        c0=c0.sum(),
        decoder=decoder,
        decoder_codes=decoder_codes,
        end_c0=jnp.where(end, c0, 0.0).sum(),
        end_decoder=end_decoder,
        right=right.sum(),
    )


def total(sums: Sums, counts: Counts, *, decoder_loss_weight: float) -> Float[Array, ""]:
    """Returns the loss; 0 for a batch without a trained frame."""
    frames = jnp.maximum(counts.frames, 1e-9)
    decoder = sums.decoder / sums.decoder_codes.size
    return sums.c0 / frames + decoder_loss_weight * decoder / frames


def put_prefix(
    x: Float[Array, "B T D"], prefix: Float[Array, "P D"], batch: Batch
) -> Float[Array, "B T D"]:
    """Returns the inputs with the trained prefix at the first places of every segment."""
    here = (batch.positions < prefix.shape[0]) & (batch.segments > 0)
    rows = jnp.where(here, batch.positions, 0)
    spec = sharding.follow(x, 0, 1, None)
    vectors = prefix.astype(x.dtype).at[rows].get(out_sharding=spec)
    return jnp.where(here[:, :, None], vectors, x)


def _pick(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _cross_entropy(
    scores: Float[Array, "*batch V"], codes: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    # As a masked sum and not a gather, which a mesh would have to be told about.
    right = jnp.arange(scores.shape[-1]) == codes[..., None]
    return jax.nn.logsumexp(scores, axis=-1) - jnp.where(right, scores, 0.0).sum(axis=-1)


def _decoder_sums(
    model: CSM, hidden: Array, codes: Array, weight: Array, end: Array
) -> tuple[Float[Array, ""], Float[Array, "C_minus_1"], Float[Array, ""]]:
    """Returns the sums over the given frames: of all codes, per code, and of end frames.

    Only the first has a gradient. It is computed along with the sum, piece after piece, so that what one
    piece of frames needs is all that is kept, and pieces without a trained frame cost nothing.
    """
    hidden, codes, weight, end = sharding.by_rows(_trained_first, hidden, codes, weight, end)
    groups, frames = weight.shape
    count = -(-frames // _DECODER_FRAMES)
    size = -(-frames // count)

    def padded(x: Array) -> Array:
        fill = count * size - frames
        return jnp.pad(x, ((0, 0), (0, fill)) + ((0, 0),) * (x.ndim - 2))

    def flat(x: Array) -> Array:
        spec = sharding.follow(x, 0, *range(2, x.ndim))
        return jnp.reshape(x, (groups * size, *x.shape[2:]), out_sharding=spec)

    def piece(x: Array, index: Array | int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)

    def score(hidden: Array, codes: Array, weight: Array, end: Array) -> _Piece:
        hidden, codes, weight, end = (flat(x) for x in (hidden, codes, weight, end))
        scores = model.decoder.score(hidden, codes, model.decoder_table)
        each = weight * _cross_entropy(scores, codes[:, 1:].T)
        return each.sum(), (each.sum(axis=1), jnp.where(end, each, 0.0).sum())

    hidden, codes, weight, end = (padded(x) for x in (hidden, codes, weight, end))

    def nothing() -> _Piece:
        zero = jnp.zeros((), jnp.float32)
        return zero, (jnp.zeros((codes.shape[-1] - 1,), jnp.float32), zero)

    pure, consts = hoist(score, *(piece(x, 0) for x in (hidden, codes, weight, end)))

    def forwards(
        consts: Sequence[Any], hidden: Array, codes: Array, weight: Array, end: Array
    ) -> _Piece:
        def body(index: Array, so_far: _Piece) -> _Piece:
            more = pure(consts, *(piece(x, index) for x in (hidden, codes, weight, end)))
            return jax.tree.map(jnp.add, so_far, more)

        return jax.lax.fori_loop(0, _used(weight, size), body, nothing())

    def both(*args: Any) -> tuple[_Piece, Any]:
        trained = [each.perturbed for each in args[0]]
        consts, hidden, codes, weight, end = custom_vjp_primal_tree_values(args)
        asked, others = _divide(consts, trained)

        def body(index: Array, carry: Any) -> Any:
            so_far, by_weights, by_hidden = carry
            slices = tuple(piece(x, index) for x in (codes, weight, end))
            more, pull, aside = jax.vjp(
                lambda asked, hidden: pure(_merge(asked, others, trained), hidden, *slices),
                asked,
                piece(hidden, index),
                has_aux=True,
            )
            of_weights, of_hidden = pull(jnp.ones_like(more))
            return (
                jax.tree.map(jnp.add, so_far, (more, aside)),
                jax.tree.map(jnp.add, by_weights, of_weights),
                jax.lax.dynamic_update_slice_in_dim(by_hidden, of_hidden, index * size, axis=1),
            )

        zeros = [jnp.zeros_like(x, dtype=jnp.float32) for x in asked]
        found, by_weights, by_hidden = jax.lax.fori_loop(
            0, _used(weight, size), body, (nothing(), zeros, jnp.zeros_like(hidden))
        )
        by_weights = [x.astype(like.dtype) for x, like in zip(by_weights, asked, strict=True)]
        return found, (_merge(by_weights, [None] * len(others), trained), by_hidden)

    def backwards(gradients: Any, of_sums: Any) -> Any:
        scale = of_sums[0]
        if isinstance(scale, SymbolicZero):
            return (None,) * 5
        # The scale stays float32: rounded, it would shift all of the gradient by as much.
        scaled = jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)
        return (*scaled, None, None, None)

    sums = jax.custom_vjp(forwards)
    sums.defvjp(both, backwards, symbolic_zeros=True)
    every, (each, ends) = sums(consts, hidden, codes, weight, end)
    return every, jax.lax.stop_gradient(each), jax.lax.stop_gradient(ends)


def _divide(values: Sequence[Any], chosen: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    pairs = list(zip(values, chosen, strict=True))
    return [x for x, yes in pairs if yes], [x for x, yes in pairs if not yes]


def _merge(chosen: Sequence[Any], others: Sequence[Any], order: Sequence[bool]) -> list[Any]:
    """Returns what `_divide` was given."""
    yes, no = iter(chosen), iter(others)
    return [next(yes) if each else next(no) for each in order]


def _used(weight: Array, size: int) -> Array:
    """Returns how many pieces there are frames for."""
    return -(-(weight != 0).sum(axis=1).max() // size)


def _trained_first(
    hidden: Array, codes: Array, weight: Array, end: Array
) -> tuple[Array, Array, Array, Array]:
    """Returns one row of all the rows' frames, those that count before the others."""
    arrays = tuple(x.reshape(1, -1, *x.shape[2:]) for x in (hidden, codes, weight, end))
    order = jnp.argsort(arrays[2] == 0, axis=1, stable=True)
    hidden, codes, weight, end = (_pick(x, order) for x in arrays)
    return hidden, codes, weight, end
