"""Where parameters and states live on a mesh: logical axis names to mesh axes.

Every parameter names its axes logically beside its shape (`heads`, `mlp`, ...); `RULES` is the one
table that says which mesh axis each of them is split over. Under `jax.set_mesh` with explicit axes the
activations follow from the parameters and the batch: `csm_jax.linear.project` derives the sharding of
its result from its operands, so the model code names no mesh axis at all.

Without a mesh, or under a mesh of automatic axes, every function here returns None and the same code
runs on one device or is partitioned by the compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csm_jax.array_typing import Array

RULES: Mapping[str, str | None] = {
    "batch": "data",
    "heads": "tensor",  # backbone query heads, and the key/value heads they share
    "mlp": "tensor",
    # The decoder has 2 key/value heads in CSM-1B: too few to split, and only 9 % of its weights.
    "decoder_heads": None,
    # 2,051 audio codes divide by nothing useful, and replicated tables make a gather local.
    "vocab": None,
    "codebook": None,
    "embed": None,
    "norm": None,
}
"""Logical axis name to mesh axis; None keeps the axis whole."""


def explicit_mesh() -> bool:
    """Returns whether a mesh of explicit axes is set (`with jax.set_mesh(jax.make_mesh(...))`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def current_mesh() -> Mesh | None:
    """Returns the mesh of explicit axes that is set, or None; outside jitted functions."""
    return jax.sharding.get_mesh() if explicit_mesh() else None


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Returns a context with `mesh` set, or with nothing changed for None.

    A mesh is set for one thread and one stretch of code; what is to work on it later keeps it and
    comes back with this.
    """
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_multiple() -> int:
    """Returns what a batch must be a multiple of to be split over the mesh that is set."""
    if not explicit_mesh():
        return 1
    return jax.sharding.get_abstract_mesh().shape.get(RULES["batch"], 1)


def split_batch(x: Array) -> Array:
    """Returns `x` with its first axis split over the mesh that is set, where it divides evenly."""
    if x.shape[0] % batch_multiple():
        return x
    partition = spec("batch", *[None] * (x.ndim - 1))
    return x if partition is None else jax.sharding.reshard(x, partition)


def whole(x: Array) -> Array:
    """Returns `x` with all of it on every device of the mesh that is set; inside a jitted function."""
    return jax.sharding.reshard(x, P()) if explicit_mesh() else x


def replicate(x: Any) -> Array:
    """Returns host data as a device array, all of it on every device of the mesh that is set.

    Processes that share a mesh must all call it with the same data.
    """
    if not explicit_mesh():
        return jnp.asarray(x)
    placement = NamedSharding(jax.sharding.get_mesh(), P())
    if jax.process_count() == 1:
        return jax.device_put(x, placement)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, placement, lambda index: x[index])


def spec(*axes: str | None) -> P | None:
    """Returns the partition of an array with these logical axes, or None without an explicit mesh.

    Raises:
        KeyError: An axis name is not in `RULES`.
    """
    if not explicit_mesh():
        return None
    return _partition(axes, jax.sharding.get_abstract_mesh().axis_names)


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Returns the placement on `mesh` of an array with these logical axes.

    Raises:
        KeyError: An axis name is not in `RULES`.
    """
    return NamedSharding(mesh, _partition(axes, mesh.axis_names))


def _partition(axes: tuple[str | None, ...], mesh_axes: tuple[str, ...]) -> P:
    resolved = [None if axis is None else RULES[axis] for axis in axes]
    return P(*(axis if axis in mesh_axes else None for axis in resolved))


def follow(x: Array, *axes: int | str | None) -> P | None:
    """Returns a partition built from that of `x`, or None without an explicit mesh.

    Args:
        x: The array to follow.
        axes: Per axis of the result: an int takes the mesh axis of that axis of `x`, a name is
            looked up in `RULES`, None keeps the axis whole.
    """
    if not explicit_mesh():
        return None
    mine = jax.typeof(x).sharding.spec
    names = jax.sharding.get_abstract_mesh().axis_names
    return P(
        *(mine[axis] if isinstance(axis, int) else _partition((axis,), names)[0] for axis in axes)
    )
