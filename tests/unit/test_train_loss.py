"""The draw of the decoder's frames, and what the objective looks at."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.data.batch import Batch
from csm_jax.model import init_params
from csm_jax.train import loss as objective
from csm_jax.train.frames import draw_frames, places
from csm_jax.train.loss import LossConfig, loss_sums, total
from tests.support import training
from tests.support.checkpoints import small

CONFIG = dataclasses.replace(
    small(), num_codebooks=4, decoder=dataclasses.replace(small().decoder, max_seq_len=4)
)
EVERY = LossConfig(amortization_ratio=1, decoder_loss_weight=1.0, remat="none")


count = jax.jit(objective.count)


@functools.cache
def params():
    return init_params(CONFIG, jax.random.key(1), dtype=jnp.float32)


def turns(seed: int, *sizes: tuple[int, int, bool]) -> list[training.Turn]:
    rng = np.random.default_rng(seed)
    return [training.random_turn(CONFIG, text=t, audio=a, rng=rng, trained=x) for t, a, x in sizes]


@functools.partial(jax.jit, static_argnames="loss")
def value(params, batch: Batch, *, loss: LossConfig = EVERY) -> jax.Array:
    sums = loss_sums(params, batch, jax.random.key(0), config=CONFIG, loss=loss)
    return total(sums, count(batch), decoder_loss_weight=loss.decoder_loss_weight)


# --- the draw -----------------------------------------------------------------------------------


def masks(kinds: str) -> tuple[jax.Array, jax.Array]:
    """Returns trained and end masks of a row: `.` not trained, `a` audio, `e` end."""
    letters = np.array(list(kinds))
    return jnp.asarray(letters != ".")[None], jnp.asarray(letters == "e")[None]


def test_every_frame_is_kept_in_its_share_and_weighs_the_rest():
    trained, end = masks("..aaaaaaaaae.aaaaaaaaae..aaaaaaaaae" + "a" * 29)
    keys = jax.random.split(jax.random.key(0), 4000)
    index, weight = jax.vmap(lambda key: draw_frames(key, trained, end, ratio=8))(keys)
    assert index.shape == (4000, 1, places(64, 8)) == (4000, 1, 8)
    for one in np.asarray(index[:50, 0]):
        assert len(set(one.tolist())) == 8
    total = np.zeros(64)
    np.add.at(total, np.asarray(index).ravel(), np.asarray(weight).ravel())
    # The expected weight of each frame is 1; of what is not trained, nothing. A frame is kept in one of
    # 11 draws, so that its mean over 4,000 strays by 5 %.
    np.testing.assert_allclose(total[np.asarray(trained)[0]] / 4000, 1.0, atol=0.25)
    assert total[~np.asarray(trained)[0]].max() == 0
    assert (
        total[np.asarray(end)[0]] / 4000 == 1.0
    ).all()  # three ends in eight places: all of them, always


def test_the_ends_take_no_more_than_half():
    trained, end = masks("ae" * 20)
    keys = jax.random.split(jax.random.key(1), 4000)
    index, weight = jax.vmap(lambda key: draw_frames(key, trained, end, ratio=5))(keys)
    ends = np.asarray(end)[0][np.asarray(index)]
    assert (ends.sum(axis=-1) == 4).all()
    assert np.unique(np.asarray(weight)).tolist() == [5.0]
    assert np.bincount(np.asarray(index).ravel(), minlength=40).min() > 600  # of 800 expected


def test_a_row_with_few_trained_frames_keeps_them_all():
    trained, end = masks("." * 40 + "aaae" + "." * 20)
    index, weight = draw_frames(jax.random.key(2), trained, end, ratio=8)
    kept = np.asarray(index)[np.asarray(weight) > 0]
    assert sorted(kept.tolist()) == [40, 41, 42, 43]
    assert sorted(np.asarray(weight)[0].tolist()) == [0.0] * 4 + [1.0] * 4


def test_rows_too_short_are_refused():
    trained, end = masks("aaaae")
    with pytest.raises(ValueError, match="rows of 5 positions are too short"):
        draw_frames(jax.random.key(0), trained, end, ratio=16)


# --- the amortised gradient ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def estimates():
    """Returns how far the mean gradient of the decoder's loss is from that of all frames.

    By estimator: ours after 400 and 1,600 draws, and csm-hf's (a floor of one in 16 per utterance,
    unweighted) after 400. Utterances of very different lengths, as in speech.
    """
    sizes = [(4, n, True) for n in (75, 8, 5, 28, 6, 60)]
    talks = [[turn] for turn in turns(5, *sizes)]
    for talk in talks:  # the short ones sound alike, and unlike the long ones
        talk[0].codes = talk[0].codes % 2 + (1 if len(talk[0].codes) > 16 else 5)
    batch = training.join(
        [training.row(CONFIG, talks[:3], length=128), training.row(CONFIG, talks[3:], length=128)]
    )
    batch = jax.tree.map(jnp.asarray, batch)
    frames = count(batch).frames

    def decoder_loss(part, rows: Batch, key, ratio: int):
        loss = dataclasses.replace(EVERY, amortization_ratio=ratio)
        whole = params() | {"decoder": part}
        return loss_sums(whole, rows, key, config=CONFIG, loss=loss).decoder / frames

    def ours(key):
        return jax.grad(decoder_loss)(params()["decoder"], batch, key, 16)

    numbers = [
        [(row, segment, np.flatnonzero(batch.trained[row] & (batch.segments[row] == segment)))
         for segment in (1, 2, 3)] for row in (0, 1)
    ]  # fmt: skip

    def floors(key):
        weight = jnp.zeros_like(batch.weight)
        kept = 0
        for line, segment, frames_of in itertools.chain(*numbers):
            few = max(1, len(frames_of) // 16)
            chosen = jax.random.choice(
                jax.random.fold_in(key, 10 * line + segment),
                jnp.asarray(frames_of),
                (few,),
                replace=False,
            )
            weight = weight.at[line, chosen].set(1.0)
            kept += few
        rows = dataclasses.replace(batch, weight=weight * frames / kept)
        return jax.grad(decoder_loss)(params()["decoder"], rows, key, 1)

    def mean(estimator, draws: int, seed: int):
        keys = jax.random.split(jax.random.key(seed), draws)

        each = jax.jit(lambda keys: jax.lax.map(estimator, keys, batch_size=50))(keys)
        return jax.tree.map(lambda x: np.asarray(x).mean(axis=0), each)

    exact = jax.jit(jax.grad(decoder_loss), static_argnums=3)(
        params()["decoder"], batch, jax.random.key(0), 1
    )
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(exact)])

    def error(found) -> float:
        other = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])
        return float(np.linalg.norm(other - flat) / np.linalg.norm(flat))

    return {
        "400": error(mean(ours, 400, 1)),
        "1600": error(mean(ours, 1600, 2)),
        "floors": error(mean(floors, 400, 3)),
    }


def test_the_amortised_gradient_is_unbiased(estimates):
    assert estimates["1600"] < 0.05
    assert 1.4 < estimates["400"] / estimates["1600"] < 2.9  # halves with four times the draws


def test_an_unweighted_floor_per_utterance_is_not(estimates):
    assert estimates["floors"] > 0.05


# --- what is looked at --------------------------------------------------------------------------


def test_packed_loss_is_the_unpacked_one_in_any_order():
    talks = [turns(i, (3, 4 + i, True), (2, 3, i % 2 == 0)) for i in range(4)]
    alone = training.join([training.row(CONFIG, [talk], length=24) for talk in talks])
    wanted = float(value(params(), alone))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        packed = training.row(CONFIG, [talks[i] for i in order], length=96)
        assert float(value(params(), packed)) == pytest.approx(wanted, rel=1e-6)


def test_a_neighbour_in_the_row_changes_nothing():
    talk, other = turns(1, (3, 5, True)), turns(2, (3, 6, False))
    with_one = training.row(CONFIG, [other, talk], length=40)
    with_another = training.row(CONFIG, [turns(3, (3, 6, False)), talk], length=40)
    assert float(value(params(), with_one)) == float(value(params(), with_another))
    # The control: one conversation of both turns does hear the first.
    heard = [
        training.row(CONFIG, [[*first, *talk]], length=40)
        for first in (other, turns(3, (3, 6, False)))
    ]
    assert abs(float(value(params(), heard[0])) - float(value(params(), heard[1]))) > 1e-4


def test_context_is_heard_and_not_trained():
    context, answer = turns(7, (3, 6, False), (3, 5, True))
    batch = training.row(CONFIG, [[context, answer]], length=32)
    assert float(count(batch).frames) == 6  # five and the end
    louder = dataclasses.replace(context, codes=context.codes % 7 + 1)
    other = training.row(CONFIG, [[louder, answer]], length=32)
    assert abs(float(value(params(), batch)) - float(value(params(), other))) > 1e-4
    trained = training.row(
        CONFIG, [[dataclasses.replace(context, trained=True), answer]], length=32
    )
    assert float(count(trained).frames) == 13


def test_nothing_is_predicted_across_a_boundary():
    # An audio-first segment, which no data here has: its first frame has nothing before it.
    batch = training.row(CONFIG, [turns(1, (3, 4, True)), turns(2, (3, 4, True))], length=24)
    first = int(np.flatnonzero(batch.segments[0] == 2)[0])
    batch.trained[0, first], batch.weight[0, first] = True, 1.0
    assert float(count(batch).frames) == 10


def test_the_end_frame_is_a_target():
    batch = training.row(CONFIG, [turns(1, (3, 4, True))], length=16)
    counts = count(batch)
    assert (float(counts.frames), float(counts.ends)) == (5, 1)
    sums = jax.jit(loss_sums, static_argnames=("config", "loss"))(
        params(), batch, jax.random.key(0), config=CONFIG, loss=EVERY
    )
    assert float(sums.end_c0) > 1
    assert float(sums.end_decoder) > 1


def test_weights_weigh():
    talks = [turns(1, (3, 4, True)), turns(2, (3, 4, True))]
    rows = [training.row(CONFIG, [talk], length=16) for talk in talks]
    one, other = (float(value(params(), row)) for row in rows)
    both = training.join(rows)
    both.weight[1] *= 3
    assert float(value(params(), both)) == pytest.approx((one + 3 * other) / 4, rel=1e-6)


def test_a_batch_without_trained_frames_has_loss_0():
    batch = training.row(CONFIG, [turns(1, (3, 4, False))], length=16)
    assert float(value(params(), batch)) == 0
    grads = jax.grad(lambda p: value(p, batch))(params())
    assert all(bool((x == 0).all()) for x in jax.tree.leaves(grads))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="amortization_ratio must be at least 1"):
        dataclasses.replace(EVERY, amortization_ratio=0)
    batch = training.row(CONFIG, [turns(1, (3, 4, True))], length=16)
    with pytest.raises(ValueError, match="remat must be one of"):
        value(params(), batch, loss=dataclasses.replace(EVERY, remat="some"))


def test_pieces_of_frames_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's sums and gradients do not depend on how many frames it scores at a time."""
    batch = training.join(
        [
            training.row(CONFIG, [turns(1, (3, 9, True), (2, 6, False))], length=32),
            training.row(CONFIG, [turns(2, (4, 15, True))], length=32),
        ]
    )

    def both(size: int):
        monkeypatch.setattr(objective, "_DECODER_FRAMES", size)

        def decoder(p):
            sums = loss_sums(p, batch, jax.random.key(0), config=CONFIG, loss=EVERY)
            return sums.decoder, (sums.decoder_codes, sums.end_decoder)

        return jax.jit(jax.value_and_grad(decoder, has_aux=True))(params())

    whole, parts = both(256), both(7)
    assert float(whole[0][0]) > 10
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.linalg.norm(np.asarray(one - other)) <= 1e-5 * np.linalg.norm(np.asarray(one))
    np.testing.assert_allclose(whole[0][0], whole[0][1][0].sum(), rtol=1e-6)


def test_the_decoder_s_gradient_scales_as_the_loss_does_in_bfloat16() -> None:
    batch = training.row(CONFIG, [turns(3, (3, 20, True))], length=32)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())

    @jax.jit
    def gradients(p, scale):
        def decoder(p):
            sums = loss_sums(p, batch, jax.random.key(0), config=CONFIG, loss=EVERY)
            return sums.decoder * scale

        return jax.grad(decoder)(p)["decoder"]

    def gradient(scale: float) -> np.ndarray:
        leaves = jax.tree.leaves(gradients(half, scale))
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])

    exact, odd = gradient(1 / 32) * 32, gradient(1 / 37) * 37  # 1/37 is no bfloat16
    assert odd @ exact / (exact @ exact) == pytest.approx(1, abs=5e-4)
