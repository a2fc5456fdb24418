"""One optimiser step, and one batch's evaluation, as jitted functions of plain trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from csm_jax import sharding
from csm_jax.array_typing import Array, DTypeLike, Int, Params, PyTree, pytree
from csm_jax.config import CSMConfig
from csm_jax.data.batch import Batch
from csm_jax.train.loss import Counts, LossConfig, Sums, count, loss_sums, total
from csm_jax.train.methods import Method, assemble, compute_copy
from csm_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule


@pytree
class TrainState:
    """All that a step changes.

    Attributes:
        step: Steps made.
        trainable: Of `csm_jax.train.methods.divide`, float32.
        moments: The optimiser's state.
    """

    step: Int[Array, ""]
    trainable: PyTree
    moments: PyTree


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step does; all of it goes into the compiled program.

    Attributes:
        model: Sizes.
        method: What is trained.
        loss: The objective.
        optimizer: How weights move.
        dtype: What is computed in, float32 or bfloat16.
        seed: Of the decoder's frames.
    """

    model: CSMConfig
    method: Method
    loss: LossConfig
    optimizer: OptimizerConfig
    dtype: str
    seed: int


Metrics = dict[str, Array]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def init_state(trainable: PyTree, optimizer: OptimizerConfig) -> TrainState:
    """Returns the state before the first step; moments lie where their weights lie."""
    moments = jax.jit(make_optimizer(optimizer).init)(trainable)
    return TrainState(
        step=sharding.replicate(np.int32(0)),
        trainable=trainable,
        moments=jax.tree.map(lambda x: x if x.ndim else sharding.replicate(x), moments),
    )


def make_step(config: StepConfig) -> Step:
    """Returns `step(state, frozen, batch) -> (state, metrics)`; the state is donated.

    The batch has an accumulation axis: one micro-batch after another, one update. A gradient whose norm
    is not finite moves nothing and is reported (`skipped`); the step still counts. Of a finite one the
    squares are finite, and so are the moments. The update's norm has no say: it is known when all of the
    new state is, which would have to wait beside the old until then, 3 times the weights in memory.

    Metrics, float32 scalars: loss, c0, decoder, eos_c0, eos_decoder (nats a code), accuracy (of code 0),
    grad_norm (before clipping), update_ratio (norm of the update over that of the weights),
    learning_rate, frames (weights of the trained ones), skipped; and decoder_codes, a code's loss each.
    """
    optimizer, rate = make_optimizer(config.optimizer), make_schedule(config.optimizer)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = count(batch)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        copy, pull = jax.vjp(
            lambda x: compute_copy(x, config.method, config=config.model, dtype=config.dtype),
            state.trainable,
        )

        def objective(copy: PyTree, rows: Batch, key: Array) -> tuple[Array, Sums]:
            params, prefix = assemble(copy, frozen, config.method, config=config.model)
            sums = loss_sums(
                params, rows, key, config=config.model, loss=config.loss, prefix=prefix
            )
            weight = config.loss.decoder_loss_weight
            return total(sums, counts, decoder_loss_weight=weight), sums

        def micro(carry: tuple[PyTree, Sums], piece: tuple[Array, Batch]) -> tuple[Any, None]:
            grads, sums = carry
            index, rows = piece
            grad, more = jax.grad(objective, has_aux=True)(
                copy, rows, jax.random.fold_in(key, index)
            )
            return jax.tree.map(jnp.add, (grads, sums), (pull(grad)[0], more)), None

        zeros = (jax.tree.map(jnp.zeros_like, state.trainable), _no_sums(config.model))
        indices = jnp.arange(batch.frames.shape[0])
        (grads, sums), _ = jax.lax.scan(micro, zeros, (indices, batch))

        norm = optax.tree.norm(grads)
        updates, moments = optimizer.update(grads, state.moments, state.trainable)
        moved = optax.apply_updates(state.trainable, updates)
        change = optax.tree.norm(updates)
        finite = jnp.isfinite(norm)
        trainable, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (moved, moments),
            (state.trainable, state.moments),
        )
        metrics = summary(sums, counts, config.loss) | {
            "grad_norm": norm,
            "update_ratio": change / optax.tree.norm(state.trainable),
            "learning_rate": rate(state.step),
            "skipped": 1.0 - finite,
        }
        return TrainState(step=state.step + 1, trainable=trainable, moments=moments), metrics

    return jax.jit(step, donate_argnums=0)


def make_evaluation(config: StepConfig) -> Callable[[PyTree, Params, Batch], tuple[Sums, Counts]]:
    """Returns `evaluate(trainable, frozen, batch)`: the sums and counts of one batch, all frames.

    The batch has no accumulation axis. Nothing in it is random.
    """
    every = LossConfig(
        amortization_ratio=1,
        decoder_loss_weight=config.loss.decoder_loss_weight,
        remat="none",
    )

    @jax.jit
    def evaluate(trainable: PyTree, frozen: Params, batch: Batch) -> tuple[Sums, Counts]:
        copy = compute_copy(trainable, config.method, config=config.model, dtype=config.dtype)
        params, prefix = assemble(copy, frozen, config.method, config=config.model)
        key = jax.random.key(0)  # not drawn from
        sums = loss_sums(params, batch, key, config=config.model, loss=every, prefix=prefix)
        return sums, count(batch)

    return evaluate


def summary(sums: Sums, counts: Counts, loss: LossConfig) -> dict[str, Any]:
    """Returns the losses and the accuracy of a whole batch, by name; NaN for ends where there are none."""
    frames, ends = jnp.maximum(counts.frames, 1e-9), jnp.maximum(counts.ends, 1e-9)
    codes = sums.decoder_codes.size
    return {
        "loss": total(sums, counts, decoder_loss_weight=loss.decoder_loss_weight),
        "c0": sums.c0 / frames,
        "decoder": sums.decoder / codes / frames,
        "eos_c0": jnp.where(counts.ends > 0, sums.end_c0 / ends, jnp.nan),
        "eos_decoder": jnp.where(counts.ends > 0, sums.end_decoder / (ends * codes), jnp.nan),
        "accuracy": sums.right / frames,
        "frames": counts.frames,
        "decoder_codes": sums.decoder_codes / frames,
    }


def place(batch: Batch, *, accumulated: bool) -> Batch:
    """Returns a process's own rows as part of the whole batch, split over the mesh that is set."""
    if not sharding.explicit_mesh():
        return jax.tree.map(jnp.asarray, batch)
    mesh = jax.sharding.get_mesh()

    def put(x: np.ndarray) -> Array:
        before = (None,) if accumulated else ()
        axes = (*before, "batch", *[None] * (x.ndim - len(before) - 1))
        placement: NamedSharding = sharding.named(mesh, *axes)
        return jax.make_array_from_process_local_data(placement, np.asarray(x))

    return jax.tree.map(put, batch)


def _no_sums(config: CSMConfig) -> Sums:
    zero = jnp.zeros((), jnp.float32)
    return Sums(
        c0=zero,
        decoder=zero,
        decoder_codes=jnp.zeros((config.num_codebooks - 1,), jnp.float32),
        end_c0=zero,
        end_decoder=zero,
        right=zero,
    )


def check_dtype(dtype: DTypeLike) -> str:
    """Returns the name of what is computed in.

    Raises:
        ValueError: Neither float32 nor bfloat16.
    """
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {name}")
    return name
