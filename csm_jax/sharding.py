"""Where parameters and states live on a mesh: logical axis names to mesh axes.

Every parameter names its axes logically beside its shape (`heads`, `mlp`, ...); `RULES` is the one
table that says which mesh axis each of them is split over, and `use_rules` changes it for an experiment.
Under `jax.set_mesh` with explicit axes the activations follow from the parameters and the batch:
`csm_jax.linear.project` derives the sharding of its result from its operands, so the model code names no
mesh axis at all. `docs/sharding.md` shows how to work with it.

Without a mesh, or under a mesh of automatic axes, every function here returns None and the same code
runs on one device or is partitioned by the compiler.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csm_jax.array_typing import Array

MeshAxis = str | tuple[str, ...] | None
"""What an axis is split over: a mesh axis, several one after another, or nothing."""

RULES: Mapping[str, MeshAxis] = {
    "batch": "data",
    "heads": "tensor",  # backbone query heads, and the key/value heads they share
    "mlp": "tensor",
    # Most of the decoder's weights, which are read 31 times per frame; the price is a sum over the
    # axis per layer and codebook.
    "decoder_mlp": "tensor",
    # The decoder has 2 key/value heads in CSM-1B: too few to split, and only 9 % of its weights.
    "decoder_heads": None,
    # 128,256 rows, looked up only while prompts are read.
    "text_vocab": "tensor",
    # The decoder looks up 31 rows per frame: each would be a collective of its own.
    "audio_rows": None,
    # The heads' 2,051 audio codes divide by nothing useful.
    "audio_vocab": None,
    "codebook": None,
    "embed": None,
    "decoder_embed": None,
    "norm": None,
}
"""Logical axis name to mesh axis; None keeps the axis whole."""

TRAINING_RULES: Mapping[str, MeshAxis] = {"batch": ("data", "fsdp"), "embed": "fsdp"}
"""Changes for training (`use_rules`): between steps every weight is kept in slices over `fsdp`."""

Rules = tuple[tuple[str, MeshAxis], ...]
"""Such a table as pairs: `dict(rules)` is the table, and it can be a key."""

# Tracing reads the rules, so they belong to the key under which jax.jit keeps what it has traced.
_rules = jax.make_user_context(tuple(RULES.items()))


def current_rules() -> Rules:
    """Returns the rules in force: `RULES` with the changes of `use_rules`."""
    return _rules.value


def use_rules(changes: Mapping[str, MeshAxis]) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which some logical axes go over other mesh axes.

    In it, place the parameters and build what works with them; that keeps the rules it was built under.

    Args:
        changes: Logical axis name to mesh axis, None to keep the axis whole. A mesh axis that the mesh
            does not have counts as None.

    Raises:
        ValueError: A name is no logical axis.
    """
    if unknown := changes.keys() - RULES.keys():
        raise ValueError(f"unknown logical axes {sorted(unknown)}; there are {sorted(RULES)}")
    return _rules(tuple((dict(current_rules()) | dict(changes)).items()))


def parse_mesh(text: str) -> Mesh:
    """Returns the mesh of all devices that is written as `data=4,tensor=2`.

    Raises:
        ValueError: It is not so written, names an axis that nothing is split over, or does not take
            exactly the devices there are.
    """
    known = sorted({axis for axes in dict(current_rules()).values() for axis in _axes(axes)})
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in known:
            raise ValueError(
                f"mesh {text!r}: there is no axis {name!r}; the axes are {', '.join(known)}, "
                "as in data=4,tensor=2"
            )
        if name in sizes:
            raise ValueError(f"mesh {text!r} names the axis {name!r} twice")
        if not (size.isascii() and size.isdecimal() and int(size[:9]) > 0):
            raise ValueError(
                f"mesh {text!r}: the size of {name!r} must be a whole number of 1 or more, got {size!r}"
            )
        sizes[name] = int(size[:9])
    devices = jax.devices()
    asked = math.prod(sizes.values())
    if asked != len(devices):
        raise ValueError(
            f"mesh {text!r} takes {asked:,} devices, but there are {len(devices):,} "
            f"({devices[0].device_kind}): the sizes must multiply to that"
        )
    kinds = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def explicit_mesh() -> bool:
    """Returns whether a mesh of explicit axes is set (`with jax.set_mesh(jax.make_mesh(...))`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def current_mesh() -> Mesh | None:
    """Returns the mesh of explicit axes that is set, or None; outside jitted functions."""
    return jax.sharding.get_mesh() if explicit_mesh() else None


@contextlib.contextmanager
def on(mesh: Mesh | None, rules: Rules) -> Iterator[None]:
    """Returns a context with `mesh` set, unless it is None, and with these rules.

    A mesh is set for one thread and one stretch of code; what is to work on it later keeps it, with
    the rules (`current_rules`), and comes back with this.
    """
    with _rules(rules), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def batch_multiple() -> int:
    """Returns what a batch must be a multiple of to be split over the mesh that is set."""
    if not explicit_mesh():
        return 1
    return parts(jax.sharding.get_abstract_mesh(), "batch")


def parts(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Returns into how many parts a logical axis is split on a mesh."""
    over = _axes(dict(current_rules())[axis])
    return math.prod(mesh.shape.get(name, 1) for name in over)


def _axes(over: MeshAxis) -> tuple[str, ...]:
    return () if over is None else (over,) if isinstance(over, str) else over


def split_batch(x: Array) -> Array:
    """Returns `x` with its first axis split over the mesh that is set, where it divides evenly."""
    if x.shape[0] % batch_multiple():
        return x
    partition = spec("batch", *[None] * (x.ndim - 1))
    return x if partition is None else jax.sharding.reshard(x, partition)


def whole(x: Array) -> Array:
    """Returns `x` with all of it on every device of the mesh that is set; inside a jitted function."""
    return jax.sharding.reshard(x, P()) if explicit_mesh() else x


def by_rows(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)`, each device working on its own rows; inside a jitted function.

    For operations that XLA knows no rows of: it would gather a sort's whole batch on every device.

    Args:
        function: Gives arrays with rows first, made of the rows it is given alone.
        args: Trees of arrays with the rows first, all split as those of the first array are.
    """
    if not explicit_mesh():
        return function(*args)
    rows = jax.typeof(jax.tree.leaves(args)[0]).sharding.spec[0]
    args = jax.tree.map(lambda x: jax.sharding.reshard(x, P(rows)), args)
    return jax.shard_map(function, in_specs=P(rows), out_specs=P(rows))(*args)


def readable(x: Array) -> Array:
    """Returns `x` so that this process can read all of it, whichever processes share the mesh that is set.

    They must all call it.
    """
    return x if x.is_fully_addressable else whole(x)


def check_placed(params: Any) -> None:
    """Checks that weights are where the mesh that is set, or its absence, lets programs find them.

    Raises:
        ValueError: They are not on its devices, or split without a mesh of explicit axes.
    """
    shardings = {leaf.sharding for leaf in jax.tree.leaves(params)}
    mesh = current_mesh()
    if mesh is None:
        if not all(sharding.is_fully_replicated for sharding in shardings):
            raise ValueError(
                "params are split over devices, but no mesh of explicit axes is set: "
                "use jax.set_mesh(mesh) with the mesh they were placed on"
            )
    elif any(sharding.device_set != set(mesh.devices.flat) for sharding in shardings):
        raise ValueError(
            f"params are not on the {mesh.size} devices of the mesh: place them with "
            "jax.device_put(params, csm_jax.model.param_shardings(config, mesh))"
        )


def used_at(x: Array, *axes: str | None) -> Array:
    """Returns a weight of these logical axes as the model computes with it: whole over `fsdp`.

    Inside a jitted function; its gradient comes back in slices.
    """
    if not explicit_mesh():
        return x
    return jax.sharding.reshard(x, spec(*(None if axis == "embed" else axis for axis in axes)))


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
    rules = dict(current_rules())
    found: list[MeshAxis] = []
    for axis in axes:
        over = _axes(None if axis is None else rules[axis])
        here = tuple(name for name in over if name in mesh_axes)
        found.append(here if len(here) > 1 else here[0] if here else None)
    return P(*found)


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


_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(compiled_text: str) -> dict[str, int]:
    """Returns how often each kind of collective runs in one call of a compiled program.

    Args:
        compiled_text: `compiled.as_text()` of what `jax.jit(f).lower(...).compile()` returns.

    Raises:
        ValueError: One is in a loop whose number of rounds does not stand in the code.
    """
    found: dict[str, list[str]] = {}
    calls: dict[str, list[tuple[str, int | None]]] = {}
    name = entry = ""
    for line in compiled_text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            found[name], calls[name] = [], []
        elif name:
            # The second half of an asynchronous one, "-done", is not counted.
            found[name] += re.findall(rf" ({_COLLECTIVES})(?:-start)?\(", line)
            rounds = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for kind, called in re.findall(r"(body|calls|to_apply)=%?([\w.\-]+)", line):
                times = 1 if kind != "body" else int(rounds[1]) if rounds else None
                calls[name].append((called, times))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                calls[name] += [(each.strip(" %"), 1) for each in branches.split(",")]

    def total(name: str) -> Counter[str]:
        count = Counter(found[name])
        for called, times in calls[name]:
            inner = total(called)
            if inner and times is None:
                raise ValueError(f"{dict(inner)} in a loop of unknown length, {called}")
            count.update({kind: number * (times or 0) for kind, number in inner.items()})
        return count

    return dict(sorted(total(entry).items()))
