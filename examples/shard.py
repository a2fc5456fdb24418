"""Speaks a batch on several devices: rows over the mesh axis `data`, heads over `tensor`.

On a machine with one device, let the CPU pose as eight:
`XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/shard.py --model DIR`.
"""

from __future__ import annotations

import argparse

import jax

from csm_jax import Request, load_csm_1b
from csm_jax.model import param_shardings


def main() -> None:
    """Prints where the weights are and what each row of the batch became."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sesame/csm-1b")
    parser.add_argument("--tensor", type=int, default=1, help="devices the heads are split over")
    parser.add_argument("--max-audio-length-ms", type=float, default=10_000)
    args = parser.parse_args()

    devices = len(jax.devices())
    if devices % args.tensor:
        parser.error(f"{devices} devices cannot be split by --tensor {args.tensor}")
    mesh = jax.make_mesh((devices // args.tensor, args.tensor), ("data", "tensor"))
    print(f"mesh: {dict(mesh.shape)} of {jax.devices()[0].device_kind}")

    generator = load_csm_1b(args.model)
    with jax.set_mesh(mesh):
        shardings = param_shardings(generator.config, mesh)
        generator.params = jax.device_put(generator.params, shardings)
        layer = generator.params["backbone"]["layers"]["0"]
        for name, weight in (
            ("q_proj", layer["attn"]["q_proj"]),
            ("w_down", layer["mlp"]["w_down"]),
        ):
            shard = weight.sharding.shard_shape(weight.shape)
            print(f"{name}: {weight.shape} as {weight.sharding.spec}, {shard} on each device")
        requests = [
            Request(
                text=f"This is row {row}.",
                speaker=row % 2,
                seed=row,
                max_audio_length_ms=args.max_audio_length_ms,
            )
            for row in range(mesh.shape["data"])
        ]
        for row, audio in enumerate(generator.generate_batch(requests)):
            print(f"row {row}: {len(audio) / generator.sample_rate:.2f} s")


if __name__ == "__main__":
    main()
