"""What a compiled program does, read from its code: operations, aliased buffers, conversions."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax._src.lib import _jax, hlo  # pyright: ignore  (nothing public reads a module's code)

from csm_jax.array_typing import Params
from csm_jax.config import CSMConfig
from csm_jax.model import param_shapes

_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_WHILE = re.compile(r'while\(.*?body=%?([\w.\-]+).*?known_trip_count":\{"n":"(\d+)"')


def abstract_params(config: CSMConfig, dtype: str) -> Params:
    """Returns the weights' shapes: enough to compile, and no memory."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=place), param_shapes(config)
    )


def once_flops(text: str) -> float:
    """Returns the operations that XLA's cost analysis finds in a module, loop bodies counted once."""
    module = hlo.hlo_module_from_text(text)
    return _jax.hlo_module_cost_analysis(jax.devices()[0].client, module)["flops"]


def loop_flops(compiled: Any, *, unknown: int | None = None) -> float:
    """Returns the operations of a compiled program, every loop as often as it runs.

    XLA counts a loop's body once, so each body is counted by itself and multiplied.

    Args:
        compiled: Of `jax.jit(f).lower(...).compile()`.
        unknown: Rounds of the loops whose number depends on the data.

    Raises:
        ValueError: There is such a loop, and `unknown` is not given.
    """
    text = compiled.as_text()
    computations, entry = _computations(text)

    def only(name: str) -> float:
        return once_flops(_with_entry(text, name))

    def whole(name: str) -> float:
        flops = only(name)
        for body, rounds in _loops(computations, name, unknown):
            flops += rounds * whole(body) - only(body)
        return flops

    return whole(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the entry's name."""
    computations: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            current = computations[start[2]] = []
            entry = start[2] if start[1] else entry
        else:
            current.append(line)
    return computations, entry


def _loops(
    computations: dict[str, list[str]], name: str, unknown: int | None
) -> list[tuple[str, int]]:
    """Returns body and rounds of the loops in a computation and what it calls, not of loops in them."""
    loops = []
    for line in computations[name]:
        if " while(" in line:
            found = _WHILE.search(line)
            if found is None and unknown is None:
                raise ValueError(f"a loop of unknown length: {line[:200]}")
            [body] = _BODY.findall(line)
            loops.append((body, int(found[2]) if found else unknown or 0))
            continue
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"[\w.\-]+", branches)
        for other in called:
            loops += _loops(computations, other, unknown)
    return loops


def _with_entry(text: str, name: str) -> str:
    """Returns the module with another computation as its entry."""
    lines = []
    for line in text.splitlines():
        if line.startswith("HloModule "):
            line = "HloModule part"
        line = line.removeprefix("ENTRY ")
        if re.match(rf"%?{re.escape(name)} \(", line):
            line = f"ENTRY {line}"
        lines.append(line)
    return "\n".join(lines)


def aliased_shapes(compiled: Any) -> list[tuple[int, ...]]:
    """Returns the shapes of the arguments whose memory a result takes over."""
    text = compiled.as_text()
    computations, entry = _computations(text)
    shapes = {}
    for line in computations[entry]:
        found = re.search(r"= \w+\[([\d,]*)\]\S* parameter\((\d+)\)", line)
        if found:
            shapes[int(found[2])] = tuple(int(n) for n in found[1].split(",") if n)
    header = text.splitlines()[0]
    return [shapes[int(number)] for number in re.findall(r"\{[\d, ]*\}: \((\d+),", header)]


def widened(stablehlo: str) -> list[tuple[int, ...]]:
    """Returns the shapes of all conversions from bfloat16 to float32 in lowered code, largest first."""
    pattern = r"stablehlo\.convert .*tensor<((?:\d+x)*)bf16>\) -> tensor<(?:\d+x)*f32>"
    shapes = [
        tuple(int(n) for n in found.split("x") if n) for found in re.findall(pattern, stablehlo)
    ]
    return sorted(shapes, key=math.prod, reverse=True)
