"""Small random models and prompts for tests."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.array_typing import Params
from csm_jax.config import CSMConfig, tiny
from csm_jax.generate import (
    DecodeState,
    RowSettings,
    generate_frames,
    init_state,
    insert,
    pad_prompts,
    prefill,
)
from csm_jax.model import init_params
from csm_jax.sampling import SamplingParams, request_keys, sampling_params

CAPACITY = 256


def short_config() -> CSMConfig:
    """Returns tiny sizes with 4 codebooks: one frame compiles and runs in no time."""
    sizes = tiny()
    return dataclasses.replace(
        sizes, num_codebooks=4, decoder=dataclasses.replace(sizes.decoder, max_seq_len=4)
    )


@functools.lru_cache(maxsize=4)
def params_of(config: CSMConfig, seed: int = 0) -> Params:
    """Returns random float32 weights."""
    return init_params(config, jax.random.key(seed), dtype=jnp.float32)


def prompt(
    config: CSMConfig, text: int, audio: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a prompt of `text` text positions and then `audio` audio positions."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((text + audio, config.num_codebooks + 1), np.int32)
    mask = np.zeros(frames.shape, bool)
    frames[:text, -1] = rng.integers(0, config.text_vocab_size, text)
    mask[:text, -1] = True
    frames[text:, :-1] = rng.integers(0, config.codebook_size, (audio, config.num_codebooks))
    mask[text:, :-1] = True
    return frames, mask


def sampling(rows: int, **changes: float) -> SamplingParams:
    """Returns Sesame's defaults for every row, with changes."""
    values = {"temperature": 0.9, "top_k": 50, "top_p": 1.0, "min_p": 0.0} | changes
    return sampling_params(
        temperature=[values["temperature"]] * rows,
        top_k=[int(values["top_k"])] * rows,
        top_p=[values["top_p"]] * rows,
        min_p=[values["min_p"]] * rows,
    )


def settings(
    seeds: list[int], *, max_frames: int | list[int] = 1000, **changes: float
) -> RowSettings:
    """Returns row settings with these seeds."""
    rows = len(seeds)
    caps = [max_frames] * rows if isinstance(max_frames, int) else max_frames
    return RowSettings(
        key=request_keys(seeds),
        max_frames=jnp.asarray(np.array(caps, np.int32)),
        segment=jnp.full((rows,), -1, jnp.int32),
        sampling=sampling(rows, **changes),
        decoder_sampling=sampling(rows, **changes),
    )


def start(
    config: CSMConfig,
    params: Params,
    prompts: list[tuple[np.ndarray, np.ndarray]],
    rows: RowSettings,
    *,
    slots: list[int] | None = None,
    batch: int | None = None,
) -> DecodeState:
    """Returns a state with the prompts in the given slots."""
    slots = list(range(len(prompts))) if slots is None else slots
    frames, mask = pad_prompts(prompts, config=config)
    prefix = prefill(params, frames, mask, config=config)
    state = init_state(config, batch=batch or len(prompts), capacity=CAPACITY, dtype=jnp.float32)
    return insert(state, prefix, rows, jnp.asarray(slots))


def run(
    config: CSMConfig, params: Params, state: DecodeState, chunks: list[int]
) -> tuple[DecodeState, np.ndarray, np.ndarray]:
    """Returns the state, codes [B, n, C] and validity [B, n] after chunks of frames."""
    codes, valid = [], []
    for size in chunks:
        state, new_codes, new_valid = generate_frames(
            params, state, config=config, num_frames=size, window=CAPACITY, ranks=64
        )
        codes.append(np.asarray(new_codes))
        valid.append(np.asarray(new_valid))
    return state, np.concatenate(codes, axis=1), np.concatenate(valid, axis=1)
