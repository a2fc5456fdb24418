from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from csm_jax.array_typing import Array
from csm_jax.sampling import (
    choose,
    filter_logits,
    frame_keys,
    gumbel,
    ranks_needed,
    request_keys,
    sampling_params,
)
from tests.support.model import sampling

VOCAB = 64


def logits(rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 2


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.6, 0.0),
        (0.9, 20, 0.8, 0.0),
        (1.1, 0, 1.0, 0.2),
        (0.8, 30, 0.9, 0.1),
        (1.0, 1, 0.1, 1.0),
    ],
)
def test_filters_equal_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = logits(rows=8)
    want = torch.from_numpy(scores)
    want = TemperatureLogitsWarper(temperature)(None, want)  # pyright: ignore
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)  # pyright: ignore
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)  # pyright: ignore
    if min_p:
        want = MinPLogitsWarper(min_p)(None, want)  # pyright: ignore
    settings = sampling(8, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = filter_logits(jnp.asarray(scores), settings, codebook_size=VOCAB, ranks=VOCAB)
    np.testing.assert_allclose(np.asarray(got), want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("ranks", [7, 20, VOCAB])
def test_sorting_fewer_scores_changes_nothing(ranks: int) -> None:
    scores = np.round(logits(rows=16), 1)  # many ties
    settings = sampling(16, top_k=7, top_p=0.8)
    got = filter_logits(jnp.asarray(scores), settings, codebook_size=VOCAB, ranks=ranks)
    want = filter_logits(jnp.asarray(scores), settings, codebook_size=VOCAB, ranks=VOCAB)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize(
    ("top_k", "top_p", "want"),
    [
        ([0, 0], [1.0, 1.0], 0),
        ([50, 0], [1.0, 1.0], 64),
        ([50, 64], [0.5, 1.0], 64),
        ([50, 65], [1.0, 1.0], 2048),
        ([50, 0], [1.0, 0.9], 2048),
    ],
)
def test_ranks_needed(top_k: list[int], top_p: list[float], want: int) -> None:
    assert ranks_needed(top_k, top_p, codebook_size=2048) == want
    assert ranks_needed(top_k, top_p, codebook_size=48) in (0, 48)


def test_rows_have_their_own_settings() -> None:
    scores = np.repeat(logits(), 3, axis=0)
    settings = sampling_params(
        temperature=[1.0, 1.0, 0.5], top_k=[1, 7, 0], top_p=[1.0] * 3, min_p=[0.0] * 3
    )
    kept = np.isfinite(
        filter_logits(jnp.asarray(scores), settings, codebook_size=VOCAB, ranks=VOCAB)
    )
    assert kept.sum(axis=1).tolist() == [1, 7, VOCAB]


def test_ties_at_the_kth_value_are_all_kept() -> None:
    scores = jnp.zeros((1, VOCAB)).at[0, :3].set(5.0).at[0, 3:9].set(4.0)
    kept = np.isfinite(
        filter_logits(scores, sampling(1, top_k=5), codebook_size=VOCAB, ranks=VOCAB)
    )
    assert np.flatnonzero(kept).tolist() == list(range(9))


def test_reserved_codes_are_never_drawn() -> None:
    scores = jnp.zeros((1, VOCAB)).at[0, VOCAB - 3 :].set(100.0)
    for temperature in (0.0, 1.0):
        drawn = [
            int(
                choose(
                    scores,
                    gumbel(frame_keys(request_keys([seed]), jnp.array([0])), 0, num_codes=VOCAB),
                    sampling(1, temperature=temperature, top_k=0),
                    codebook_size=VOCAB - 3,
                    ranks=VOCAB,
                )[0]
            )
            for seed in range(20)
        ]
        assert max(drawn) < VOCAB - 3


def test_temperature_zero_ignores_the_noise_and_takes_the_first_of_equals() -> None:
    scores = jnp.zeros((1, VOCAB)).at[0, jnp.array([9, 20])].set(3.0)
    noise = jnp.zeros((1, VOCAB)).at[0, 20].set(1e6)
    assert (
        int(
            choose(scores, noise, sampling(1, temperature=0.0), codebook_size=VOCAB, ranks=VOCAB)[0]
        )
        == 9
    )


def test_noise_replays_sesames_draw() -> None:
    scores = logits(rows=32)
    noise = np.random.default_rng(1).exponential(size=scores.shape).astype(np.float32)
    probabilities = torch.softmax(torch.from_numpy(scores), dim=-1)
    want = torch.argmax(probabilities / torch.from_numpy(noise), dim=-1)
    got = choose(
        jnp.asarray(scores),
        jnp.asarray(-np.log(noise)),
        sampling(32, temperature=1.0, top_k=0),
        codebook_size=VOCAB,
        ranks=0,
    )
    assert np.asarray(got).tolist() == want.tolist()


def test_draws_follow_the_distribution() -> None:
    scores = jnp.asarray([[0.0, 1.0, 2.0, -1.0]])
    count = 4000
    keys = frame_keys(request_keys(list(range(count))), jnp.zeros(count, jnp.int32))
    drawn = choose(
        jnp.repeat(scores, count, axis=0),
        gumbel(keys, 3, num_codes=4),
        sampling(count, temperature=1.0, top_k=0),
        codebook_size=4,
        ranks=0,
    )
    shares = np.bincount(np.asarray(drawn), minlength=4) / count
    want = np.asarray(jax.nn.softmax(scores[0]))
    # Five standard deviations of a binomial share.
    np.testing.assert_array_less(np.abs(shares - want), 5 * np.sqrt(want * (1 - want) / count))


def test_noise_depends_on_seed_frame_and_codebook_and_on_nothing_else() -> None:
    keys = request_keys([7, 8, 2**40 + 7])
    frames = jnp.array([0, 0, 0])
    noise = np.asarray(gumbel(frame_keys(keys, frames), 0, num_codes=VOCAB))
    assert len({row.tobytes() for row in noise}) == 3
    alone = gumbel(frame_keys(request_keys([8]), jnp.array([0])), 0, num_codes=VOCAB)
    np.testing.assert_array_equal(noise[1:2], np.asarray(alone))
    for frame, codebook in ((1, 0), (0, 1)):
        other = gumbel(frame_keys(keys, frames + frame), codebook, num_codes=VOCAB)
        assert not np.any(np.all(np.asarray(other) == noise, axis=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, r"finite number from 0\.001 to 1,000,000, got inf"),
        ({"temperature": 1e40}, r"finite number from 0\.001 to 1,000,000, got 1e\+40"),
        ({"temperature": 10**400}, "finite number"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**31}, "whole number up to 2,147,483,647, got 2147483648"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling(1, **changes)


def unchecked(function: Any) -> Any:
    """Returns a function past the type checker of the tests, which users do not have."""
    return function.__wrapped__


def test_the_settings_have_the_callers_names() -> None:
    for name, bad in (("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("min_p", 2.0)):
        settings = {"temperature": [1.0], "top_k": [1], "top_p": [1.0], "min_p": [0.0], name: [bad]}
        with pytest.raises(ValueError, match=f"^decoder_{name} must"):
            sampling_params(**settings, prefix="decoder_")  # pyright: ignore
    settings = {"temperature": [1.0], "top_k": [float("inf")], "top_p": [1.0], "min_p": [0.0]}
    with pytest.raises(ValueError, match=r"^top_k must"):
        unchecked(sampling_params)(**settings)


def test_the_largest_temperature_is_a_number_to_float32() -> None:
    scores = jnp.asarray(logits())
    got = filter_logits(scores, sampling(1, temperature=1e6, top_k=0), codebook_size=VOCAB, ranks=0)
    assert len(np.unique(np.asarray(got))) == VOCAB


@pytest.mark.parametrize("seed", [-1, 2**64, True, float("inf"), float("nan")])
def test_bad_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="seed"):
        unchecked(request_keys)([seed])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA makes of it for a CPU")
def test_a_cpu_does_not_sort_all_scores() -> None:
    def step(scores: Array, _: None) -> tuple[Array, None]:
        return filter_logits(scores, params, codebook_size=2048, ranks=64), None

    rows = 4
    params = sampling_params(
        temperature=[0.9] * rows, top_k=[50] * rows, top_p=[0.9] * rows, min_p=[0.0] * rows
    )
    scores = jnp.zeros((rows, 2051))
    frame = jax.jit(lambda scores: jax.lax.scan(step, scores, length=3))
    text = frame.lower(scores).compile().as_text()
    assert 'custom_call_target="TopK"' in text
    assert " sort(" not in text
