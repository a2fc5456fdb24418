"""A training loop of one's own: the objective under plain `jax.jit`, weights in slices over a mesh.

Random weights learn three conversations of random codes by heart. Change the objective, the optimiser or
the rules: nothing here but `loss_sums` and `total` knows about CSM.

On a machine with one device, let the CPU pose as eight:
`XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/train_step.py`.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np
import optax

from csm_jax import config, sharding
from csm_jax.data.examples import Example, Turn
from csm_jax.data.packing import empty_batch, fill_row
from csm_jax.model import init_params, param_shardings
from csm_jax.train.loss import LossConfig, count, loss_sums, total
from csm_jax.train.methods import Full, compute_copy
from csm_jax.train.step import place

MODEL = config.tiny()
LOSS = LossConfig(amortization_ratio=8, decoder_loss_weight=1.0, remat="none")


def main() -> None:
    """Trains, and prints the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", default=f"fsdp={len(jax.devices())}")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    optimizer = optax.adamw(3e-3)

    @jax.jit
    def step(params, moments, batch, key):
        def objective(params):
            whole = compute_copy(params, Full(), config=MODEL, dtype="float32")
            sums = loss_sums(whole, batch, key, config=MODEL, loss=LOSS)
            return total(sums, count(batch), decoder_loss_weight=LOSS.decoder_loss_weight)

        loss, grads = jax.value_and_grad(objective)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    with sharding.use_rules(sharding.TRAINING_RULES):
        mesh = sharding.parse_mesh(args.mesh)
        with jax.set_mesh(mesh):
            params = init_params(MODEL, jax.random.key(0), dtype="float32")
            params = jax.device_put(params, param_shardings(MODEL, mesh))
            moments = jax.jit(optimizer.init)(params)
            batch = place(talks(rows=sharding.batch_multiple()), accumulated=False)
            print("q_proj:", jax.typeof(params["backbone"]["layers"]["0"]["attn"]["q_proj"]))
            for i in range(args.steps):
                key = jax.random.fold_in(jax.random.key(1), i)
                params, moments, loss = step(params, moments, batch, key)
                print(f"step {i + 1}: loss {float(loss):.3f}")


def talks(rows: int):
    """Returns rows of three conversations each, all the same."""
    rng = np.random.default_rng(0)
    examples = []
    for frames in (9, 12, 15):
        text = rng.integers(0, MODEL.text_vocab_size, 5)
        codes = rng.integers(1, MODEL.codebook_size, (frames, MODEL.num_codebooks))
        turn = Turn(text=text, codes=codes.astype(np.uint16), trained=True, weight=1.0)
        examples.append(Example(turns=(turn,), facts={}))
    batch = empty_batch((rows,), 64, MODEL.num_codebooks)
    for row in range(rows):
        fill_row(batch, (row,), examples, prefix_positions=0)
    return batch


if __name__ == "__main__":
    main()
