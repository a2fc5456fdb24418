"""A sharding experiment: a rules table of one's own, what it moves between devices, and what it costs.

Prints how each kind of weight is split, the bytes on each device, and the collectives per frame, for the
package's rules and for yours. Weights are random: nothing is downloaded.

On a machine with one device, let the CPU pose as eight:
`XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/research.py --rule mlp=none`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import jax
import jax.numpy as jnp

from csm_jax import config, sharding
from csm_jax.model import init_params, param_axes, param_shardings
from csm_jax.slots import Slots, SlotSizes

SIZES = {"tiny": config.tiny, "csm-1b": config.csm_1b}


def main() -> None:
    """Compares the rules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--tensor", type=int, default=2, help="devices of the mesh axis `tensor`")
    parser.add_argument("--slots", type=int, default=8, help="rows of the batch")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="AXIS=MESH_AXIS",
        help="such as mlp=none or audio_rows=tensor; may be repeated",
    )
    parser.add_argument("--trace", metavar="DIR", help="profile three chunks into this directory")
    args = parser.parse_args()
    pairs = [rule.split("=", 1) for rule in args.rule]
    rules = {name: None if over == "none" else over for name, over in pairs}

    devices = len(jax.devices())
    mesh = jax.make_mesh((devices // args.tensor, args.tensor), ("data", "tensor"))
    print(f"mesh: {dict(mesh.shape)} of {jax.devices()[0].device_kind}")
    model = SIZES[args.size]()
    sizes = SlotSizes(slots=args.slots, capacity=256, chunk_frames=2, prefill_rows=1)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params = init_params(model, jax.random.key(0), dtype=dtype)

    for title, changes in {"the package's rules": {}, f"with {rules}": rules}.items():
        print(f"\n{title}")
        with sharding.use_rules(changes):
            placed = jax.device_put(params, param_shardings(model, mesh))
            slots = Slots(model, placed, sizes, mesh=mesh)
        report(slots, placed, param_axes(model))
        if args.trace and changes == rules:
            profile(slots, args.trace)


def report(slots: Slots, params: dict, axes: dict) -> None:
    """Prints where everything is and what moves."""
    where: dict[tuple[str, str], int] = defaultdict(int)
    leaves = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    for names, leaf in zip(leaves, jax.tree.leaves(params), strict=True):
        where[", ".join(names), str(jax.typeof(leaf).sharding.spec)] += leaf.nbytes
    for (names, spec), size in sorted(where.items(), key=lambda item: -item[1]):
        print(f"  {size / 2**20:9.2f} MiB  ({names}) as {spec}")

    first = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    print(f"  weights on each device: {held / 2**20:.2f} MiB")

    program = slots.compiled(window=256, ranks=64)
    memory = program.memory_analysis()
    print(f"  state and weights on each device: {memory.argument_size_in_bytes / 2**20:.2f} MiB")
    print(f"  temporaries on each device: {memory.temp_size_in_bytes / 2**20:.2f} MiB")
    frames = slots.sizes.chunk_frames
    # The report's three arrays are gathered once per chunk; everything else runs once per frame.
    for kind, count in sorted(sharding.collectives(program.as_text()).items()):
        print(f"  {kind}: {count} in a chunk of {frames} frames, {count / frames:g} per frame")


def profile(slots: Slots, directory: str) -> None:
    """Writes a trace of a few chunks."""
    slots.advance(1, 64).wait()
    with jax.profiler.trace(directory):
        for _ in range(3):
            slots.advance(1, 64).wait()
    print(f"  trace: {directory}")


if __name__ == "__main__":
    main()
