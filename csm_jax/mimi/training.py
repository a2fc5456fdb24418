"""Training a Mimi from nothing: the loss, the quantizer's learning, and the step.

    audio -> encode_features -> quantise -> decode_features -> audio

The loss is `spectral_loss` between the two audios, the commitment of the vectors to their codes, and the
error of a linear head that reads the frame's log-mel bands off the first codebooks' output. The head makes
the first codes tell what is said (Mimi itself distils a speech model there); it is thrown away.

Matrices move by Muon, everything else by AdamW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from csm_jax.array_typing import Array, Float, Int, Key, Params, PyTree, pytree
from csm_jax.linear import project
from csm_jax.mimi import whole
from csm_jax.mimi.codebooks import (
    PARTS,
    Quantised,
    perplexity,
    quantise,
    start_codebooks,
    update_codebooks,
)
from csm_jax.mimi.config import MimiConfig
from csm_jax.mimi.params import init_params
from csm_jax.mimi.spectral_loss import SpectralLossConfig, frame_log_mel, spectral_loss

_TARGET_PARTS = 2
_LAYER_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a Mimi is trained.

    Attributes:
        mimi: Sizes.
        spectral: Loss between the audio made and the audio given.
        commitment_weight: Of the mean square between the vectors and their codes'.
        semantic_weight: Of the mean square error of log10 mel bands.
        semantic_mels: Mel bands that the head reads for each half of a frame.
        decay: Of the codebooks' running sums, per step.
        least_usage: A code chosen less often than this share of the mean is put elsewhere.
        matrix_rate: Learning rate of Muon.
        other_rate: Learning rate of AdamW.
    """

    mimi: MimiConfig
    spectral: SpectralLossConfig
    commitment_weight: float
    semantic_weight: float
    semantic_mels: int
    decay: float
    least_usage: float
    matrix_rate: float
    other_rate: float


@pytree
class TrainState:
    """All that changes.

    Attributes:
        step: Steps made, int32.
        weights: A Mimi's parameters without its codebooks, and the `head`.
        codebooks: See `csm_jax.mimi.codebooks`.
        optimizer: The moments.
    """

    step: Int[Array, ""]
    weights: Params
    codebooks: Params
    optimizer: Any


Step = Callable[[TrainState, Array, Array, Array], tuple[TrainState, dict[str, Array]]]


# --- what a run begins with ---------------------------------------------------------------------


def init_state(config: TrainingConfig, key: Key[Array, ""]) -> TrainState:
    """Returns the state before the first step: random weights, codebooks not started."""
    sizes = config.mimi
    weights_key, head_key = jax.random.split(key)
    weights = jax.tree_util.tree_map_with_path(_plain, init_params(sizes, weights_key))
    codebooks = {}
    for part in PARTS:
        stacked = _stack(weights["quantizer"][part].pop("codebooks"))
        codebooks[part] = jax.tree.map(jnp.zeros_like, stacked)
    rows = _TARGET_PARTS * config.semantic_mels
    weights["head"] = jax.random.normal(head_key, (rows, sizes.embed_dim)) * sizes.embed_dim**-0.5
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        weights=weights,
        codebooks=codebooks,
        optimizer=_optimizer(config).init(weights),
    )


def _plain(path: tuple[Any, ...], leaf: Array) -> Array:
    # `init_params` makes every scale and bias unlike the others, so that tests see a mix-up.
    name, parent = path[-1].key, path[-2].key
    if name == "bias":
        return jnp.zeros_like(leaf)
    if parent in ("attn_norm", "mlp_norm"):
        return jnp.ones_like(leaf)
    if name in ("attn_scale", "mlp_scale"):
        return jnp.full_like(leaf, _LAYER_SCALE)
    return leaf


def _stack(codebooks: Params) -> Params:
    books = [codebooks[name] for name in sorted(codebooks, key=int)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *books)


def mimi_params(state: TrainState) -> Params:
    """Returns the parameters as a checkpoint has them (`csm_jax.mimi.params`)."""
    params = {name: part for name, part in state.weights.items() if name != "head"}
    params["quantizer"] = {
        part: {
            **state.weights["quantizer"][part],
            "codebooks": {
                str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
                for i in range(stacked["cluster_usage"].shape[0])
            },
        }
        for part, stacked in state.codebooks.items()
    }
    return params


def with_codebooks(
    state: TrainState,
    audio: Sequence[Int[Array, "B W"]],
    key: Key[Array, ""],
    *,
    iterations: int,
    config: TrainingConfig,
) -> TrainState:
    """Returns the state with its codebooks started.

    Args:
        state: After the steps without codebooks.
        audio: Batches like those of a step, with at least as many frames as a codebook has codes.
        key: For where k-means begins.
        iterations: Of k-means.
        config: How a Mimi is trained.

    Raises:
        ValueError: There are fewer frames than codes.
    """
    found = [_features(state.weights, batch, config=config.mimi) for batch in audio]
    started = start_codebooks(
        state.weights["quantizer"],
        state.codebooks,
        jnp.concatenate(found).reshape(-1, config.mimi.embed_dim),
        key,
        frames=found[0].shape[0] * found[0].shape[1],
        iterations=iterations,
    )
    return TrainState(
        step=state.step, weights=state.weights, codebooks=started, optimizer=state.optimizer
    )


@functools.partial(jax.jit, static_argnames="config")
def _features(weights: Params, audio: Array, *, config: MimiConfig) -> Array:
    return whole.encode_features(weights, as_float(audio), config=config)


# --- the step -----------------------------------------------------------------------------------


def reconstruct(
    state: TrainState, audio: Float[Array, "B W"], *, config: MimiConfig
) -> tuple[Float[Array, "B W"], Int[Array, "B n C"]]:
    """Returns what the codec makes of audio (a multiple of the samples per frame), and its codes."""
    x = whole.encode_features(state.weights, audio, config=config)
    quantised = quantise(state.weights["quantizer"], state.codebooks, x)
    made = whole.decode_features(state.weights, quantised.features, config=config)
    return made, jnp.concatenate([quantised.codes[part] for part in PARTS], axis=-1)


def loss(
    weights: Params, codebooks: Params, audio: Float[Array, "B W"], *, config: TrainingConfig
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Quantised]]:
    """Returns the loss, and its parts (unweighted) with what the quantizer did.

    Args:
        weights: As in `TrainState`.
        codebooks: As in `TrainState`.
        audio: A multiple of the samples per frame.
        config: How a Mimi is trained.
    """
    sizes = config.mimi
    x = whole.encode_features(weights, audio, config=sizes)
    quantised = quantise(weights["quantizer"], codebooks, x)
    made = whole.decode_features(weights, quantised.features, config=sizes)
    spectral, parts = spectral_loss(made, audio, config=config.spectral)
    wanted = frame_log_mel(
        audio,
        sample_rate=sizes.sample_rate,
        samples_per_frame=sizes.samples_per_frame,
        parts=_TARGET_PARTS,
        num_mels=config.semantic_mels,
    )
    error = project(quantised.semantic, weights["head"]) - wanted
    # The head's bias is whatever is best for the batch: levels far from 0 need not be learned first.
    semantic = jnp.mean(jnp.square(error - error.mean(axis=(0, 1))))
    total = (
        spectral
        + config.commitment_weight * quantised.commitment
        + config.semantic_weight * semantic
    )
    parts |= {"commitment": quantised.commitment, "semantic": semantic, "loss": total}
    return total, (parts, quantised)


@functools.cache
def make_step(config: TrainingConfig) -> Step:
    """Returns the jitted step, always the same for a config: (state, audio, rate, key) to the next state and metrics.

    The state is donated. `audio` is int16 [B, W], `rate` scales both learning rates, and the metrics are the
    parts of the loss and `perplexity`, of each codebook: how many codes it uses, as if all alike.
    """
    optimizer = _optimizer(config)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, audio: Int[Array, "B W"], rate: Float[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        gradient = jax.grad(functools.partial(loss, config=config), has_aux=True)
        changes, (metrics, quantised) = gradient(state.weights, state.codebooks, as_float(audio))
        moves, moments = optimizer.update(changes, state.optimizer, state.weights)
        weights = jax.tree.map(lambda weight, move: weight + rate * move, state.weights, moves)
        codebooks = {}
        for part, own in zip(PARTS, jax.random.split(key), strict=True):
            books = state.codebooks[part]
            vectors, codes = quantised.vectors[part], quantised.codes[part]
            after = update_codebooks(
                books,
                vectors.reshape(-1, *vectors.shape[2:]),
                codes.reshape(-1, codes.shape[2]),
                own,
                decay=config.decay,
                least_usage=config.least_usage,
            )
            started = books["initialized"][0, 0] > 0
            codebooks[part] = jax.tree.map(functools.partial(jnp.where, started), after, books)
        metrics["perplexity"] = jnp.concatenate(
            [perplexity(codebooks[part]["cluster_usage"]) for part in PARTS]
        )
        return TrainState(
            step=state.step + 1, weights=weights, codebooks=codebooks, optimizer=moments
        ), metrics

    return step


def as_float(audio: Int[Array, "B W"]) -> Float[Array, "B W"]:
    """Returns 16-bit samples as -1..1."""
    return audio.astype(jnp.float32) / 32_768


# optax's own coefficients, written out for each iteration: so it makes a loop of them, where otherwise it
# writes five iterations for every matrix, which take a minute to compile.
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def _optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    return muon(
        config.matrix_rate,
        ns_coeffs=_NEWTON_SCHULZ,
        adam_learning_rate=config.other_rate,
        muon_weight_dimension_numbers=_matrices,
    )


def _matrices(weights: PyTree) -> PyTree:
    """Returns how each weight that Muon moves is a matrix, None for AdamW's."""

    def matrix(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        # The waveform has one channel, and the upsampling treats each channel by itself.
        vector = leaf.ndim < 2 or names[:2] in (["encoder", "conv_in"], ["decoder", "conv_out"])
        if vector or names[0] in ("head", "upsample"):
            return None
        if "up" in names:  # [kernel, out, in]
            return MuonDimensionNumbers(reduction_axis=2, output_axis=(0, 1))
        return MuonDimensionNumbers(reduction_axis=tuple(range(1, leaf.ndim)), output_axis=0)

    return jax.tree_util.tree_map_with_path(matrix, weights)
