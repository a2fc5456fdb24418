"""Low-rank adapters: their sizes and start, how they join the weights, and merging them.

An adapter of a weight `[O, I]` is `down [r, I]` and `up [O, r]`; with it the weight acts as
`weight + alpha / r · up @ down`. Adapters are a tree of their own, float32, with a pair in the place of
each adapted weight, so that an optimiser sees nothing else and the weights below stay as they are.
`up` starts at zero: the adapted model starts as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from csm_jax import sharding
from csm_jax.array_typing import Array, DTypeLike, Float, Key, Params
from csm_jax.config import CSMConfig
from csm_jax.linear import LowRank
from csm_jax.model import param_axes
from csm_jax.weights.tables import flatten, model_shapes, unflatten
from csm_jax.weights.transforms import Shape

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "w_gate", "w_up", "w_down")
"""Every projection inside a block."""
TRUNKS = ("backbone", "decoder")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which weights have adapters, and of what size.

    Attributes:
        rank: Rows of `down`.
        alpha: The correction is multiplied by `alpha / rank`.
        targets: Names among `TARGETS`.
        trunks: Names among `TRUNKS`.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    trunks: tuple[str, ...] = TRUNKS

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"LoraConfig.rank must be a whole number of 1 or more, got {self.rank!r}"
            )
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"LoraConfig.alpha must be a positive number, got {self.alpha!r}")
        for name, chosen, known in (
            ("targets", self.targets, TARGETS),
            ("trunks", self.trunks, TRUNKS),
        ):
            if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
                raise ValueError(
                    f"LoraConfig.{name} must be some of {', '.join(known)}, each once; got {chosen!r}"
                )

    @property
    def scale(self) -> float:
        """What the correction is multiplied by."""
        return self.alpha / self.rank


def adapted(config: CSMConfig, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Returns the shape `[O, I]` of every weight that has an adapter, by dotted path."""
    return _chosen(model_shapes(config), lora)


def num_lora_params(config: CSMConfig, lora: LoraConfig) -> int:
    """Returns the number of trained parameters: `r · (O + I)` of every adapted weight."""
    return sum(lora.rank * (out + into) for out, into in adapted(config, lora).values())


def init_lora(config: CSMConfig, lora: LoraConfig, key: Key[Array, ""]) -> Params:
    """Returns new adapters: `{"down", "up"}` in the place of each adapted weight, float32.

    Args:
        config: Sizes.
        lora: Which weights, and the rank.
        key: Each `down` draws from this key folded with its weight's place in the tree, so what it
            draws does not depend on which other weights have adapters.
    """
    places = {path: i for i, path in enumerate(model_shapes(config))}

    @partial(jax.jit, static_argnames="inputs")
    def draw(key: Array, *, inputs: int) -> Array:
        return inputs**-0.5 * jax.random.normal(key, (lora.rank, inputs), jnp.float32)

    return unflatten(
        {
            path: {
                "down": draw(jax.random.fold_in(key, places[path]), inputs=into),
                "up": jnp.zeros((out, lora.rank), jnp.float32),
            }
            for path, (out, into) in adapted(config, lora).items()
        }
    )


def lora_axes(config: CSMConfig, lora: LoraConfig) -> Params:
    """Returns the tree of adapters with each leaf's tuple of logical axis names.

    Each follows its weight: `down` is split as the weight's inputs are and `up` as its outputs.
    """
    axes = flatten(param_axes(config))
    return unflatten(
        {
            path: {"down": (None, axes[path][1]), "up": (axes[path][0], None)}
            for path in adapted(config, lora)
        }
    )


def lora_shardings(config: CSMConfig, lora: LoraConfig, mesh: jax.sharding.Mesh) -> Params:
    """Returns the tree of adapters with each leaf's placement on `mesh`."""
    return unflatten(
        {
            path: sharding.named(mesh, *axes)
            for path, axes in flatten(lora_axes(config, lora)).items()
        }
    )


def apply_lora(params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """Returns the tree of weights with a `LowRank` in the place of each adapted one.

    Nothing of a weight's size is computed, so this can be part of every step; the correction's factor goes
    into `up`. To generate with adapters, call it once and use what it returns as params.

    Args:
        params: The weights below.
        adapters: As `init_lora` returns them.
        lora: Their configuration.

    Raises:
        ValueError: The adapters are not of this configuration or do not fit the weights; lists all.
    """
    flat = flatten(params)
    for path, (down, up) in adapter_pairs(adapters, _shapes(flat), lora).items():
        weight = flat[path]
        flat[path] = LowRank(
            weight=weight,
            down=down.astype(weight.dtype),
            up=(lora.scale * up).astype(weight.dtype),
        )
    return unflatten(flat)


def merge_lora(
    params: Params, adapters: Params, lora: LoraConfig, *, dtype: DTypeLike | None
) -> Params:
    """Returns plain weights that act as the adapted ones do.

    Args:
        params: The weights below.
        adapters: As `init_lora` returns them.
        lora: Their configuration.
        dtype: Of every leaf; None to keep each one's. The sums are float32 and rounded once.

    Raises:
        ValueError: As `apply_lora`.
    """
    flat = flatten(params)
    for path, (down, up) in adapter_pairs(adapters, _shapes(flat), lora).items():
        flat[path] = _merged(flat[path], down, up, scale=lora.scale, dtype=dtype)
    return unflatten({path: leaf.astype(dtype or leaf.dtype) for path, leaf in flat.items()})


@partial(jax.jit, static_argnames=("scale", "dtype"))
def _merged(
    weight: Any,
    down: Float[Array, "R I"],
    up: Float[Array, "O R"],
    *,
    scale: float,
    dtype: DTypeLike | None,
) -> Float[Array, "O I"]:
    correction = jnp.einsum(
        "OR,RI->OI",
        scale * up.astype(jnp.float32),
        down.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (weight.astype(jnp.float32) + correction).astype(dtype or weight.dtype)


def adapter_pairs(
    adapters: Params, shapes: Mapping[str, Shape], lora: LoraConfig
) -> dict[str, tuple[Array, Array]]:
    """Returns `(down, up)` of every adapted weight by dotted path, held against the weights.

    Args:
        adapters: As `init_lora` returns them.
        shapes: Of all weights of the model.
        lora: Their configuration.

    Raises:
        ValueError: Everything that is missing, extra or of another shape.
    """
    leaves, chosen = flatten(adapters), _chosen(shapes, lora)
    wanted = {f"{path}.down": (lora.rank, into) for path, (_, into) in chosen.items()}
    wanted |= {f"{path}.up": (out, lora.rank) for path, (out, _) in chosen.items()}
    problems = [f"missing {path}" for path in wanted if path not in leaves]
    problems += [f"extra {path}" for path in leaves if path not in wanted]
    problems += [
        f"{path} has shape {list(leaf.shape)}, expected {list(wanted[path])}"
        for path, leaf in leaves.items()
        if path in wanted and tuple(leaf.shape) != wanted[path]
    ]
    if problems:
        raise ValueError(f"the adapters are not those of {lora}: {'; '.join(problems)}")
    return {path: (leaves[f"{path}.down"], leaves[f"{path}.up"]) for path in chosen}


def _chosen(shapes: Mapping[str, Shape], lora: LoraConfig) -> dict[str, tuple[int, int]]:
    chosen: dict[str, tuple[int, int]] = {}
    for path, shape in shapes.items():
        trunk, *_, name = path.split(".")
        if trunk in lora.trunks and name in lora.targets:
            out, into = shape
            chosen[path] = (out, into)
    return chosen


def _shapes(flat: Mapping[str, Any]) -> dict[str, Shape]:
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}
