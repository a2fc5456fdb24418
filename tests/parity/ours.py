"""csm_jax behind the layer-by-layer interface of `cases.Implementation`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from csm_jax import generate as generation
from csm_jax import llama, model
from csm_jax.config import CSMConfig
from csm_jax.llama import Block, Stack
from csm_jax.model import CSM
from csm_jax.sampling import ranks_needed, request_keys, sampling_params

from .inputs import Prompt, to_params

CHUNK = 4
"""Frames per call of `generate_frames`."""


class Ours:
    """Our model over Sesame's weights, on one device."""

    name = "csm_jax"

    def __init__(
        self, config: CSMConfig, weights: Mapping[str, torch.Tensor], *, device: jax.Device
    ) -> None:
        self._start(config, jax.tree.map(_to_jax(device), to_params(config, weights)), device)

    @classmethod
    def over(cls, config: CSMConfig, params: dict[str, Any], *, device: jax.Device) -> Ours:
        """Returns the interface over a tree of weights that csm_jax itself made."""
        ours = cls.__new__(cls)
        ours._start(config, jax.tree.map(lambda x: jax.device_put(x, device), params), device)
        return ours

    def _start(self, config: CSMConfig, params: dict[str, Any], device: jax.Device) -> None:
        self.config, self.params, self.device = config, params, device
        self.dtype = params["decoder"]["audio_head"].dtype

    def _run(self, function: Callable[..., Any], *arrays: np.ndarray) -> Any:
        """Returns the outputs of `function(model, *arrays)`, jitted, as numpy float32."""

        @functools.partial(jax.jit)
        def run(params: dict[str, Any], *inputs: jax.Array) -> Any:
            return function(CSM.bind(self.config, params), *inputs)

        return jax.tree.map(_out, run(self.params, *(self._in(x) for x in arrays)))

    def _in(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(x.astype(self.dtype) if x.dtype == np.float32 else x, self.device)

    def embed_frames(self, frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns the backbone's inputs [B, T, D]."""
        return self._run(lambda m, f, k: m.backbone.embed(f, k), frames, mask)

    def norm(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's attention norm of x [B, T, D]."""

        def run(m: CSM, x: jax.Array) -> jax.Array:
            block = _first(m, part)
            return llama.rms_norm(x, block.attn_norm[...], eps=block.eps)

        return self._run(run, x)

    def scores(self, part: str, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns rotated q·k [B, N, T, T] of the first block, before scaling and mask."""

        def run(m: CSM, x: jax.Array, positions: jax.Array) -> jax.Array:
            q, k, _ = _turned(m, part, x, positions)
            q, k = q.astype(jnp.float32), k.astype(jnp.float32)
            scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, precision="highest")
            return scores.reshape(scores.shape[0], -1, *scores.shape[3:])

        return self._run(run, x, positions)

    def attention(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's causal attention of x [B, T, D], without norm and residual."""

        def run(m: CSM, x: jax.Array) -> jax.Array:
            attn, steps = _first(m, part).attn, jnp.arange(x.shape[1])
            q, k, v = _turned(m, part, x, steps[None])
            return attn.out(llama.attend(q, k, v, (steps[None] <= steps[:, None])[None]))

        return self._run(run, x)

    def mlp(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block's MLP of x [B, T, D], without norm and residual."""
        return self._run(lambda m, x: _first(m, part).mlp(x), x)

    def block(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block of x [B, T, D]."""

        def run(m: CSM, x: jax.Array) -> jax.Array:
            block, steps = _first(m, part), jnp.arange(x.shape[1])
            turn = llama.rotation(steps[None], _stack(m, part).config)
            q, k, v = block.qkv(x, turn)
            return block.rest(x, llama.attend(q, k, v, (steps[None] <= steps[:, None])[None]))

        return self._run(run, x)

    def stack(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns all blocks and the final norm of x [B, T, D]."""
        return self._run(lambda m, x: _stack(m, part).full(x)[0], x)

    def heads(self, backbone: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits ([B, T, V], [B, C-1, V]) of hidden states ([B, T, D], [B, C-1, E])."""

        def run(m: CSM, h: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            codebooks = jnp.arange(1, self.config.num_codebooks)
            rest = jax.lax.map(lambda c: m.decoder.logits(y[:, c - 1], c), codebooks)
            return m.backbone.logits(h), jnp.swapaxes(rest, 0, 1)

        return self._run(run, backbone, decoder)

    def logits(self, frames: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns teacher-forced logits ([B, T, V], [B, T-1, C-1, V])."""
        forward = jax.jit(model.forward, static_argnames="config")
        c0, rest = forward(self.params, self._in(frames), self._in(mask), config=self.config)
        return _out(c0), _out(rest)

    def generate(self, prompts: Sequence[Prompt], num_frames: int) -> list[np.ndarray]:
        """Returns greedy codes [n, C] after each prompt, all prompts in one batch."""
        return self.sample(prompts, num_frames, temperature=0.0, topk=0, seed=0)

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_frames: int,
        *,
        temperature: float,
        topk: int,
        seed: int,
    ) -> list[np.ndarray]:
        """Returns codes [n, C] after each prompt, all prompts in one batch with one seed.

        Args:
            prompts: What to continue.
            num_frames: Most frames per row.
            temperature: 0 for greedy.
            topk: 0 for all codes.
            seed: Of every row.
        """
        rows, config = len(prompts), self.config
        # Few sizes, so that few programs are compiled; frames beyond a row's cap are not valid.
        needed = max(len(p.frames) for p in prompts) + num_frames
        capacity = math.ceil(needed / 64) * 64
        with jax.default_device(self.device):
            sampling = [
                sampling_params(
                    temperature=[temperature] * rows,
                    top_k=[topk] * rows,
                    top_p=[1.0] * rows,
                    min_p=[0.0] * rows,
                )
                for _ in range(2)
            ]
            settings = generation.RowSettings(
                key=request_keys([seed] * rows),
                max_frames=jnp.full((rows,), num_frames, jnp.int32),
                segment=jnp.full((rows,), -1, jnp.int32),
                sampling=sampling[0],
                decoder_sampling=sampling[1],
            )
            ranks = ranks_needed([topk], [1.0], codebook_size=config.codebook_size)
            frames, mask = generation.pad_prompts(
                [(p.frames, p.mask) for p in prompts], config=config
            )
            prefix = generation.prefill(self.params, frames, mask, config=config)
            state = generation.init_state(config, batch=rows, capacity=capacity, dtype=self.dtype)
            state = generation.insert(state, prefix, settings, jnp.arange(rows))
            codes, valid = [], []
            for _ in range(0, num_frames, CHUNK):
                state, new_codes, new_valid = generation.generate_frames(
                    self.params,
                    state,
                    config=config,
                    num_frames=CHUNK,
                    window=capacity,
                    ranks=ranks,
                )
                codes.append(np.asarray(new_codes))
                valid.append(np.asarray(new_valid))
        codes_BnC, valid_Bn = np.concatenate(codes, axis=1), np.concatenate(valid, axis=1)
        return [c[v] for c, v in zip(codes_BnC, valid_Bn, strict=True)]


def _to_jax(device: jax.Device) -> Callable[[torch.Tensor], jax.Array]:
    # dlpack shares the memory of a CPU tensor: at full size two copies would not fit.
    return lambda tensor: jax.device_put(jnp.from_dlpack(tensor.contiguous()), device)


def _out(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


def _stack(m: CSM, part: str) -> Stack:
    return m.backbone if part == "backbone" else m.decoder


def _turned(m: CSM, part: str, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
    turn = llama.rotation(positions, _stack(m, part).config)
    return _first(m, part).attn.qkv(x, turn)


def _first(m: CSM, part: str) -> Block:
    return _stack(m, part).blocks()[0]
