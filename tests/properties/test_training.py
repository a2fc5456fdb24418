"""What training does to a model: it learns the batch, learns to stop, and moves only what it should."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.config import CSMConfig
from csm_jax.data.batch import Batch
from csm_jax.generate import Status, generate_frames, init_state, insert, pad_prompts, prefill
from csm_jax.model import forward, init_params
from csm_jax.train import step as steps
from csm_jax.train.lora import LoraConfig, apply_lora, merge_lora
from csm_jax.train.loss import LossConfig
from csm_jax.train.methods import Full, Lora, Method, Prefix, divide
from csm_jax.train.step import StepConfig, TrainState, make_evaluation, make_step, place
from tests.support import training
from tests.support.model import settings, short_config

CONFIG = short_config()


def fit(
    *batches: Batch,
    count: int,
    rate: float = 3e-3,
    method: Method | None = None,
    params: dict | None = None,
    config: CSMConfig = CONFIG,
    ratio: int = 1,
    decoder_loss_weight: float = 1.0,
) -> tuple[TrainState, dict, list[float], StepConfig]:
    """Returns the state after steps on these batches in turn, the frozen weights, losses and settings."""
    method = method or Full()
    if params is None:
        params = init_params(config, jax.random.key(0), dtype=jnp.float32)
    config_ = StepConfig(
        model=config,
        method=method,
        loss=LossConfig(
            amortization_ratio=ratio, decoder_loss_weight=decoder_loss_weight, remat="none"
        ),
        optimizer=training.optimizer(
            rate, count, lr_scheduler_type="cosine", warmup_steps=min(5, count - 1)
        ),
        dtype="float32",
        seed=0,
    )
    trainable, frozen = divide(
        method, params, config=config, key=jax.random.key(1), dtype="float32"
    )
    trainable = jax.tree.map(jnp.copy, trainable)  # the step donates it
    state = steps.init_state(trainable, config_.optimizer)
    step, losses = make_step(config_), []
    rows = [place(training.stack([batch]), accumulated=True) for batch in batches]
    for i in range(count):
        state, metrics = step(state, frozen, rows[i % len(rows)])
        losses.append(metrics["loss"])
    return state, frozen, [float(loss) for loss in losses], config_


# --- the batch is learnt ------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_batch_of_eight_is_learnt_by_heart(ratio):
    rng = np.random.default_rng(0)
    talks = [[training.random_turn(CONFIG, text=6, audio=12, rng=rng)] for _ in range(8)]
    batch = training.join([training.row(CONFIG, talks[i : i + 4], length=80) for i in (0, 4)])
    _, _, losses, _ = fit(batch, count=100 if ratio == 1 else 300, ratio=ratio)
    assert losses[0] > 10  # 2 ln 259 = 11.1
    assert losses[-1] < 0.01


# --- stopping -----------------------------------------------------------------------------------


@functools.cache
def clips() -> tuple[training.Turn, ...]:
    """Returns 16 clips of 5 to 20 frames whose codes count up: how long they are, the text says."""
    rng = np.random.default_rng(1)
    turns = []
    for i in range(16):
        frames = 5 + i
        codes = np.arange(frames)[:, None] * 3 + np.arange(CONFIG.num_codebooks)[None] + 1
        text = rng.integers(0, CONFIG.text_vocab_size, 4)
        turns.append(training.Turn(text=text, codes=codes))
    return tuple(turns)


def stop_rate(params: dict) -> float:
    """Returns how many of 64 sampled rows end by themselves within 40 frames."""
    prompts = []
    for turn in clips():
        frames = np.zeros((len(turn.text), CONFIG.num_codebooks + 1), np.int32)
        frames[:, -1] = turn.text
        prompts.append(
            (
                frames,
                frames[:, -1:] * 0 + np.eye(1, frames.shape[1], CONFIG.num_codebooks, dtype=bool)
                > 0,
            )
        )
    frames, mask = pad_prompts(prompts * 4, config=CONFIG)
    rows = len(prompts) * 4
    state = init_state(CONFIG, batch=rows, capacity=128, dtype=jnp.float32)
    prefix = prefill(params, frames, mask, config=CONFIG)
    asked = settings(list(range(rows)), max_frames=40)
    state = insert(state, prefix, asked, jnp.arange(rows))
    state, _, _ = generate_frames(params, state, config=CONFIG, num_frames=40, window=128, ranks=64)
    return float((np.asarray(state.status) == Status.EOS).mean())


@pytest.mark.parametrize("ends", [True, False])
def test_a_model_learns_to_stop_from_its_end_frames(ends):
    batch = training.join(
        [training.row(CONFIG, [[turn] for turn in clips()[i::4]], length=96) for i in range(4)]
    )
    if not ends:  # the control: what trainers without end frames teach
        end = batch.trained & (batch.frames[..., :-1] == 0).all(axis=-1)
        batch = dataclasses.replace(
            batch, trained=batch.trained & ~end, weight=np.where(end, 0, batch.weight)
        )
    state, *_ = fit(batch, count=200, ratio=4)
    rate = stop_rate(state.trainable)
    assert rate >= 0.95 if ends else rate <= 0.05


# --- LoRA ---------------------------------------------------------------------------------------


def random_rows(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    talks = [[training.random_turn(CONFIG, text=5, audio=8, rng=rng)] for _ in range(4)]
    return training.row(CONFIG, talks, length=64)


def test_adapters_alone_move_and_merge_into_the_same_model():
    lora = LoraConfig(rank=4, alpha=8.0)
    params = init_params(CONFIG, jax.random.key(0), dtype=jnp.float32)
    before = jax.tree.map(np.array, params)
    batch = random_rows(2)
    state, frozen, losses, _ = fit(batch, count=20, method=Lora(lora), params=params, rate=1e-2)
    assert losses[-1] < losses[0] - 0.5
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other))
    run = jax.jit(forward, static_argnames="config")
    frames, mask = jnp.asarray(batch.frames), jnp.asarray(batch.mask)
    beside = run(apply_lora(frozen, state.trainable, lora), frames, mask, config=CONFIG)
    merged = run(merge_lora(frozen, state.trainable, lora, dtype=None), frames, mask, config=CONFIG)
    for one, other in zip(beside, merged, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5 * 20)


def test_new_adapters_change_nothing():
    params = init_params(CONFIG, jax.random.key(0), dtype=jnp.float32)
    lora = LoraConfig()
    trainable, frozen = divide(
        Lora(lora), params, config=CONFIG, key=jax.random.key(1), dtype="float32"
    )
    frames, mask = (jnp.asarray(x) for x in (random_rows(3).frames, random_rows(3).mask))
    run = jax.jit(forward, static_argnames="config")
    wanted = run(params, frames, mask, config=CONFIG)
    found = run(apply_lora(frozen, trainable, lora), frames, mask, config=CONFIG)
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)


# --- a prefix -----------------------------------------------------------------------------------

_TEXT = np.arange(3)  # always the same: what is to be said does not tell how


def spoken(voice: np.ndarray, frames: int) -> training.Turn:
    """Returns a clip of a voice, which is nothing but a code for each codebook."""
    return training.Turn(text=_TEXT, codes=np.tile(voice, (frames, 1)))


def talk(voice: np.ndarray, *, prompted: bool) -> list[training.Turn]:
    """Returns a frame to be spoken, after a recording of the voice or after nothing."""
    heard = [dataclasses.replace(spoken(voice, 2), trained=False)] if prompted else []
    return [*heard, spoken(voice, 1)]


@functools.cache
def prefix_gains() -> dict[str, float]:
    """Returns the mean log-likelihood of a code of a voice's clip, in nats: with nothing before it, with
    a recording of the voice, with a prefix trained on all codes of other clips of it, and on code 0 alone.
    """
    rng = np.random.default_rng(5)

    def voice() -> np.ndarray:
        return rng.integers(1, 9, CONFIG.num_codebooks)

    def rows(talks: list[list[training.Turn]], prefix: int = 0) -> Batch:
        return training.join(
            [
                training.row(CONFIG, talks[i : i + 8], length=96, prefix=prefix)
                for i in range(0, len(talks), 8)
            ]
        )

    # Many voices, so that what is learnt is to go on in the one that is heard.
    lessons = [rows([talk(voice(), prompted=i % 4 > 0) for i in range(64)]) for _ in range(20)]
    state, _, _, config = fit(*lessons, count=200)
    model, mine = state.trainable, voice()

    def likelihood(batch: Batch, method: Method, trainable: dict, frozen: dict) -> float:
        evaluate = make_evaluation(dataclasses.replace(config, method=method))
        sums, counts = evaluate(trainable, frozen, place(batch, accumulated=False))
        whole = float(sums.c0) + float(sums.decoder.sum())
        return -whole / (float(counts.frames) * CONFIG.num_codebooks)

    clip = [talk(mine, prompted=False)]
    found = {
        "nothing": likelihood(rows(clip), Full(), model, {}),
        "prompt": likelihood(rows([talk(mine, prompted=True)]), Full(), model, {}),
    }
    for name, weight in (("prefix", 1.0), ("code 0 alone", 0.0)):
        tuned, frozen, *_ = fit(
            rows([talk(mine, prompted=False)] * 4, prefix=8),
            count=60,
            rate=3e-2,
            method=Prefix(8),
            params=model,
            decoder_loss_weight=weight,
        )
        found[name] = likelihood(rows(clip, prefix=8), Prefix(8), tuned.trainable, frozen)
    return found


def test_a_prefix_does_what_a_prompt_does():
    found = prefix_gains()
    gain = found["prompt"] - found["nothing"]
    assert gain > 0.3, found
    assert found["prefix"] - found["nothing"] >= 0.7 * gain, found


def test_a_prefix_trained_on_code_0_alone_does_harm():
    found = prefix_gains()
    assert found["code 0 alone"] < found["nothing"], found
