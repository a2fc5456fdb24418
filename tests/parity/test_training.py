"""The training objective against transformers' own loss and gradients, in float32."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch

from csm_jax.config import CSMConfig
from csm_jax.data.batch import Batch
from csm_jax.train.loss import LossConfig, count, loss_sums, total
from csm_jax.weights import tables
from tests.support import training
from tests.support.checkpoints import small

from . import inputs
from .reference import transformers as theirs

EVERY = LossConfig(amortization_ratio=1, decoder_loss_weight=1.0, remat="none")


def conversations(config: CSMConfig, *, seed: int) -> list[list[training.Turn]]:
    """Returns four conversations of one to three turns, the earlier ones of some only heard."""
    rng = np.random.default_rng(seed)
    sizes = [
        [(5, 7, True)],
        [(4, 6, False), (6, 9, True)],
        [(3, 2, True), (2, 5, True)],
        [(7, 3, True)],
    ]
    return [
        [training.random_turn(config, text=t, audio=a, rng=rng, trained=x) for t, a, x in turns]
        for turns in sizes
    ]


@functools.cache
def ours(config: CSMConfig, loss: LossConfig = EVERY):
    """Returns the function of weights and a batch that gives the loss and its gradient, compiled once."""

    def objective(params: dict, batch: Batch) -> jax.Array:
        sums = loss_sums(params, batch, jax.random.key(0), config=config, loss=loss)
        return total(sums, count(batch), decoder_loss_weight=loss.decoder_loss_weight)

    return jax.jit(jax.value_and_grad(objective))


def reference(
    config: CSMConfig, weights: dict, batch: Batch
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns transformers' bare loss of rows with one conversation each, and its gradients by name."""
    model = theirs.build(config, weights)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("codec_model."))
    frames, mask = (torch.from_numpy(np.asarray(x)) for x in (batch.frames, batch.mask))
    text = model.embed_text_tokens(frames[..., -1].long())
    audio = model.backbone_model.embed_tokens(frames[..., :-1].long())
    labels = torch.where(
        torch.from_numpy(batch.trained)[..., None], frames[..., :-1].long(), torch.tensor(-100)
    )
    attended = torch.from_numpy(batch.segments > 0)
    result = model(
        inputs_embeds=torch.where(mask[..., -1:], text, audio),
        attention_mask=attended.long(),
        labels=labels,
    )
    result.loss.backward()
    return result.loss.item(), {
        name: parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def in_their_names(config: CSMConfig, grads: dict) -> dict[str, np.ndarray]:
    """Returns our gradients as transformers stores the weights."""
    flat = tables.flatten(grads)
    return {
        binding.name: binding.transform.inverse(np.asarray(flat[binding.path]), binding.num_heads)
        for binding in tables.bind(tables.LAYOUTS["transformers"], config)
    }


@pytest.fixture(scope="module")
def compared():
    """Returns config, our params, the conversations, and what transformers made of them."""
    config = small()
    weights = inputs.random_weights(config, seed=3)
    talks = conversations(config, seed=4)
    single = training.join([training.row(config, [talk], length=40) for talk in talks])
    loss, grads = reference(config, weights, single)
    params = jax.tree.map(lambda x: x.numpy(), inputs.to_params(config, weights))
    return config, params, talks, single, loss, grads


def check(config: CSMConfig, found: tuple, loss: float, grads: dict[str, np.ndarray]) -> None:
    """Checks the loss to 1e-5 and every gradient to 1e-4 of its norm."""
    value, tree = found
    assert float(value) == pytest.approx(loss, rel=1e-5)
    mine = in_their_names(config, tree)
    tied = {
        "backbone_model.embed_tokens.embed_audio_tokens.weight",
        "depth_decoder.model.embed_tokens.weight",
    }
    wanted = {name: grad for name, grad in grads.items() if name not in tied}
    # Tied: here two tensors over one storage, each with its own part of the gradient.
    whole = sum(grads[name] for name in tied)
    for name in tied & mine.keys():
        wanted[name] = whole
    assert wanted.keys() == mine.keys()
    for name, grad in wanted.items():
        scale = np.linalg.norm(grad)
        assert scale > 0, name
        assert np.linalg.norm(mine[name] - grad) < 1e-4 * scale, name


def test_loss_and_every_gradient_are_those_of_transformers(compared):
    config, params, _, single, loss, grads = compared
    check(config, ours(config)(params, single), loss, grads)


def test_packed_rows_have_the_same_loss_and_gradients(compared):
    config, params, talks, _, loss, grads = compared
    rows = [[talks[2], talks[0]], [talks[3], talks[1]], [], []]
    packed = training.join([training.row(config, row, length=40) for row in rows])
    check(config, ours(config)(params, packed), loss, grads)


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_computing_again_changes_nothing(compared, remat):
    config, params, _, single, loss, grads = compared
    again = LossConfig(amortization_ratio=1, decoder_loss_weight=1.0, remat=remat)
    check(config, ours(config, again)(params, single), loss, grads)


def test_the_frame_itself_is_not_what_predicts_it(compared):
    # The hidden state of the same frame instead of the one before: an old mistake of others.
    config, params, _, single, loss, _ = compared
    late = Batch(
        **{
            name: np.roll(getattr(single, name), 1, axis=1) if name in ("trained", "weight")
            else getattr(single, name)
            for name in ("frames", "mask", "segments", "positions", "trained", "weight")
        }
    )  # fmt: skip
    value, _ = ours(config)(params, late)
    assert abs(float(value) - loss) > 1e-3 * loss
