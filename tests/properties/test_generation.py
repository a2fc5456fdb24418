"""What must hold of generation whatever the weights: rows, chunks, slots and caches do not matter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.array_typing import Params
from csm_jax.config import tiny
from csm_jax.generate import Status, bucket, insert, pad_prompts, prefill
from csm_jax.kvcache import KVCache
from csm_jax.model import CSM, forward
from tests.support.model import (
    CAPACITY,
    params_of,
    prompt,
    run,
    settings,
    short_config,
    start,
)

CONFIG = short_config()
SCORES = jax.jit(forward, static_argnames="config")


@pytest.fixture(scope="module")
def params() -> Params:
    return params_of(CONFIG)


# Few sizes of chunks and batches below: each of both is a program that takes seconds to compile.
def solo(params: Params, which: int, **changes: float) -> np.ndarray:
    """Returns 12 frames of a row by itself."""
    state = start(CONFIG, params, [PROMPTS[which]], settings([which], **changes))
    return run(CONFIG, params, state, [4, 4, 4])[1][0]


PROMPTS = [
    prompt(CONFIG, 5, 3, seed=1),
    prompt(CONFIG, 20, 0, seed=2),
    prompt(CONFIG, 3, 30, seed=3),
]


def test_rows_of_a_mixed_batch_equal_single_runs(params: Params) -> None:
    state = start(CONFIG, params, PROMPTS, settings([0, 1, 2]))
    _, codes, valid = run(CONFIG, params, state, [12])
    assert valid.all()
    for row in range(3):
        np.testing.assert_array_equal(codes[row], solo(params, row))


def test_order_and_slots_do_not_matter(params: Params) -> None:
    state = start(CONFIG, params, PROMPTS, settings([0, 1, 2]), slots=[3, 0, 2], batch=5)
    state, codes, valid = run(CONFIG, params, state, [4, 4, 4])
    for row, slot in enumerate([3, 0, 2]):
        np.testing.assert_array_equal(codes[slot], solo(params, row))
    assert not valid[[1, 4]].any()
    assert state.status.tolist() == [Status.RUNNING, 0, Status.RUNNING, Status.RUNNING, 0]


@pytest.mark.parametrize("chunks", [[1] * 12, [4, 1, 1, 4, 1, 1], [4, 4, 4]])
def test_chunk_size_does_not_matter(params: Params, chunks: list[int]) -> None:
    state = start(CONFIG, params, PROMPTS, settings([0, 1, 2]))
    np.testing.assert_array_equal(
        run(CONFIG, params, state, chunks)[1],
        run(CONFIG, params, start(CONFIG, params, PROMPTS, settings([0, 1, 2])), [12])[1],
    )


def test_seeds_matter(params: Params) -> None:
    state = start(CONFIG, params, [PROMPTS[0]] * 3, settings([0, 1, 1]))
    codes = run(CONFIG, params, state, [12])[1]
    assert (codes[0] != codes[1]).any()
    np.testing.assert_array_equal(codes[1], codes[2])


def test_cached_generation_equals_teacher_forced_scores(params: Params) -> None:
    frames, mask = PROMPTS[2]
    codes = solo(params, 2, temperature=0.0)
    text = np.zeros((len(codes), 1), np.int32)
    frames = np.concatenate([frames, np.concatenate([codes, text], axis=1)])
    mask = np.concatenate([mask, np.concatenate([codes >= 0, text > 0], axis=1)])
    c0, decoder = SCORES(params, jnp.asarray(frames)[None], jnp.asarray(mask)[None], config=CONFIG)
    first = len(PROMPTS[2][0]) - 1
    size = CONFIG.codebook_size
    want = np.concatenate(
        [
            np.asarray(c0)[0, first:-1, None, :size].argmax(-1),
            np.asarray(decoder)[0, first:, :, :size].argmax(-1),
        ],
        axis=1,
    )
    np.testing.assert_array_equal(codes, want)


def test_scores_do_not_see_the_future(params: Params) -> None:
    """The gradient of a score with respect to later inputs is exactly zero, and not to earlier."""
    frames, mask = (jnp.asarray(part)[None] for part in prompt(CONFIG, 2, 6))
    rows = params["backbone"]["audio_embeddings"].shape[0]

    def scores(shift: jax.Array) -> jax.Array:
        # One added vector per position: what each position adds to its own embedding sum.
        model = CSM.bind(CONFIG, params)
        hidden, _ = model.backbone.full(model.backbone.embed(frames, mask) + shift)
        codes = frames[0, 5:6, :-1]
        decoded = model.decoder.score(hidden[0, 4][None], codes, model.decoder_table)
        return jnp.stack([model.backbone.logits(hidden)[0, 4].sum(), decoded.sum()])

    assert rows == CONFIG.num_codebooks * CONFIG.audio_vocab_size
    shift = jnp.zeros((1, frames.shape[1], CONFIG.backbone.embed_dim))
    for gradient in np.asarray(jax.jit(jax.jacrev(scores))(shift)):
        influence = np.abs(gradient[0]).max(axis=-1)
        assert not influence[5:].any()
        assert (influence[:5] > 0).all()


def test_a_decoder_score_sees_earlier_codes_only(params: Params) -> None:
    frames, mask = prompt(CONFIG, 2, 6)
    base = SCORES(params, jnp.asarray(frames)[None], jnp.asarray(mask)[None], config=CONFIG)[1]
    for codebook in range(CONFIG.num_codebooks):
        changed = frames.copy()
        changed[-1, codebook] = (changed[-1, codebook] + 1) % CONFIG.codebook_size
        other = SCORES(params, jnp.asarray(changed)[None], jnp.asarray(mask)[None], config=CONFIG)
        differs = np.asarray(jnp.abs(other[1] - base)[0, -1].max(axis=-1)) > 0
        # Head i scores code i + 1; it sees codes 0..i.
        assert differs.tolist() == [i >= codebook for i in range(CONFIG.num_codebooks - 1)]


def test_a_row_stops_at_its_own_cap(params: Params) -> None:
    rows = settings([0, 1, 2], max_frames=[3, 12, 7])
    state, codes, valid = run(CONFIG, params, start(CONFIG, params, PROMPTS, rows), [4, 4, 4])
    assert valid.sum(axis=1).tolist() == [3, 12, 7]
    assert state.status.tolist() == [Status.LENGTH] * 3
    assert not codes[~valid].any()
    np.testing.assert_array_equal(codes[1], solo(params, 1))


def ends_at_once(params: Params) -> Params:
    """Returns weights whose every code is 0: heads that score all codes alike, so the first wins."""
    heads = {
        "backbone": params["backbone"]
        | {"codebook0_head": jnp.zeros_like(params["backbone"]["codebook0_head"])},
        "decoder": params["decoder"]
        | {"audio_head": jnp.zeros_like(params["decoder"]["audio_head"])},
    }
    return params | heads


def test_a_frame_of_zeros_ends_a_row_and_is_not_part_of_it(params: Params) -> None:
    rows = settings([0], temperature=0.0)
    state = start(CONFIG, ends_at_once(params), [PROMPTS[0]], rows)
    state, _, valid = run(CONFIG, ends_at_once(params), state, [4])
    assert not valid.any()
    assert state.status.tolist() == [Status.EOS]
    assert state.frame.tolist() == [0]


def test_a_single_zero_code_does_not_end_a_row(params: Params) -> None:
    only_first = params | {
        "backbone": params["backbone"]
        | {"codebook0_head": jnp.zeros_like(params["backbone"]["codebook0_head"])}
    }
    rows = settings([0], temperature=0.0)
    state = start(CONFIG, only_first, [PROMPTS[0]], rows)
    state, codes, valid = run(CONFIG, only_first, state, [4])
    assert valid.all()
    assert not codes[0, :, 0].any()


def test_one_row_ends_and_the_others_go_on(params: Params) -> None:
    """Greedy zeros for one row only: its temperature is 0, and the heads score all codes alike."""
    mixed = settings([0, 1, 2])
    cold = dataclasses.replace(mixed.sampling, temperature=jnp.array([0.0, 1.0, 1.0]))
    mixed = dataclasses.replace(mixed, sampling=cold, decoder_sampling=jax.tree.map(jnp.copy, cold))
    weights = ends_at_once(params)
    state = start(CONFIG, weights, PROMPTS, mixed)
    state, codes, valid = run(CONFIG, weights, state, [4])
    assert valid.tolist() == [[False] * 4, [True] * 4, [True] * 4]
    assert state.status.tolist() == [Status.EOS, Status.RUNNING, Status.RUNNING]
    # Scores that are all alike leave nothing but the noise: the neighbour's draw is its own.
    only = dataclasses.replace(
        settings([1]),
        sampling=dataclasses.replace(settings([1]).sampling, temperature=jnp.array([1.0])),
        decoder_sampling=dataclasses.replace(settings([1]).sampling, temperature=jnp.array([1.0])),
    )
    alone = run(CONFIG, weights, start(CONFIG, weights, [PROMPTS[1]], only), [4])[1]
    np.testing.assert_array_equal(codes[1], alone[0])


def test_not_a_number_fails_its_row_alone_and_the_next_user_is_clean(params: Params) -> None:
    state = start(CONFIG, params, PROMPTS, settings([0, 1, 2]))
    state, before, _ = run(CONFIG, params, state, [4])
    poisoned = jax.tree.map(jnp.copy, state)
    poison = [k.at[1].set(jnp.nan) for k in poisoned.cache.k]
    poisoned = dataclasses.replace(
        poisoned,
        cache=KVCache(k=tuple(poison), v=poisoned.cache.v, length=poisoned.cache.length),
    )
    poisoned, codes, valid = run(CONFIG, params, poisoned, [4])
    assert poisoned.status.tolist() == [Status.RUNNING, Status.ERROR, Status.RUNNING]
    assert valid[1].sum() <= 1  # the frame after the poison was already decided by the hidden state
    for row in (0, 2):
        both = np.concatenate([before[row], codes[row]])
        np.testing.assert_array_equal(both, solo(params, row)[:8])
    frames, mask = pad_prompts([PROMPTS[0]], config=CONFIG)
    again = insert(
        poisoned, prefill(params, frames, mask, config=CONFIG), settings([0]), jnp.array([1])
    )
    codes = run(CONFIG, params, again, [4, 4])[1]
    np.testing.assert_array_equal(codes[1], solo(params, 0)[:8])


def test_the_read_window_does_not_matter(params: Params) -> None:
    from csm_jax.generate import generate_frames

    rows = settings([0, 1, 2])
    codes = [
        np.asarray(
            generate_frames(
                params,
                start(CONFIG, params, PROMPTS, rows),
                config=CONFIG,
                num_frames=4,
                window=window,
                ranks=64,
            )[1]
        )
        for window in (48, CAPACITY)
    ]
    np.testing.assert_array_equal(*codes)


def test_the_state_is_updated_in_place(params: Params) -> None:
    """Every cache array of the new state takes over a buffer of the old one."""
    from csm_jax.generate import generate_frames

    state = start(CONFIG, params, PROMPTS, settings([0, 1, 2]))
    pointers = {array.unsafe_buffer_pointer() for array in (*state.cache.k, *state.cache.v)}
    new, _, _ = generate_frames(
        params, state, config=CONFIG, num_frames=4, window=CAPACITY, ranks=64
    )
    assert {array.unsafe_buffer_pointer() for array in (*new.cache.k, *new.cache.v)} == pointers
    assert state.cache.k[0].is_deleted()


def test_32_codebooks_run_too() -> None:
    config = tiny()
    params = params_of(config)
    state = start(config, params, [prompt(config, 4, 4)], settings([0]))
    _, codes, valid = run(config, params, state, [2])
    assert codes.shape == (1, 2, 32)
    assert valid.all()
    assert len(np.unique(codes)) > 20


@pytest.mark.parametrize(("length", "want"), [(1, 32), (32, 32), (33, 64), (90, 96)])
def test_buckets(length: int, want: int) -> None:
    assert bucket(length, (32, 64, 128), limit=96) == want


def test_bad_prompts_are_refused() -> None:
    frames, mask = prompt(CONFIG, 4, 4)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pad_prompts([(frames, mask), (frames[:0], mask[:0])], config=CONFIG)
    left = np.concatenate([np.zeros((2, frames.shape[1]), np.int32), frames])
    with pytest.raises(ValueError, match="positions without any column"):
        pad_prompts([(left, left > 0)], config=CONFIG)
    with pytest.raises(ValueError, match=r"must both be \[T, 5\]"):
        pad_prompts([(frames[:, :-1], mask[:, :-1])], config=CONFIG)
    frames = frames.copy()
    frames[0, -1] = CONFIG.text_vocab_size
    with pytest.raises(ValueError, match=r"text ids in \[0, 512\)"):
        pad_prompts([(frames, mask)], config=CONFIG)
    with pytest.raises(ValueError, match="2,100 positions do not fit max_seq_len=2,048"):
        pad_prompts([prompt(CONFIG, 2100, 0)], config=CONFIG)


def test_weights_of_another_tree_are_refused(params: Params) -> None:
    frames, mask = (jnp.asarray(part)[None] for part in PROMPTS[0])
    broken = {"backbone": params["backbone"], "decoder": dict(params["decoder"])}
    del broken["decoder"]["projection"]
    with pytest.raises(ValueError, match=r"missing \[.*projection"):
        forward(broken, frames, mask, config=CONFIG)


def test_a_row_that_outgrows_its_window_says_so(params: Params) -> None:
    from csm_jax.generate import generate_frames

    state, made = start(CONFIG, params, PROMPTS, settings([0, 1, 2])), []
    for _ in range(4):
        state, _, valid = generate_frames(
            params, state, config=CONFIG, num_frames=4, window=48, ranks=64
        )
        made.append(np.asarray(valid))
    assert [len(frames) for frames, _ in PROMPTS] == [8, 20, 33]
    assert np.concatenate(made, axis=1).sum(axis=1).tolist() == [16, 16, 15]
    assert state.status.tolist() == [Status.RUNNING, Status.RUNNING, Status.ERROR]


def test_a_prompt_beyond_the_capacity_says_so(params: Params) -> None:
    long = prompt(CONFIG, CAPACITY + 1, 0)
    assert start(CONFIG, params, [long], settings([0])).status.tolist() == [Status.ERROR]


def test_an_untied_decoder_reads_its_own_table() -> None:
    untied = dataclasses.replace(CONFIG, tie_codebooks_embeddings=False)
    params = params_of(untied)
    frames, mask = (jnp.asarray(part)[None] for part in prompt(CONFIG, 3, 4))
    c0, decoder = SCORES(params, frames, mask, config=untied)
    other = params | {
        "decoder": params["decoder"]
        | {"audio_embeddings": params["decoder"]["audio_embeddings"][::-1]}
    }
    other_c0, other_decoder = SCORES(other, frames, mask, config=untied)
    np.testing.assert_array_equal(np.asarray(other_c0), np.asarray(c0))
    assert float(jnp.abs(other_decoder - decoder).max()) > 0.1
    codes = [
        run(untied, weights, start(untied, weights, [PROMPTS[0]], settings([0])), [4])[1]
        for weights in (params, other)
    ]
    assert (codes[0] != codes[1]).any()
