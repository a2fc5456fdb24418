"""The engine's device side: a batch of slots, compiled for every size it may need.

    start    prompts -> prefill -> insert into slots        one program of each per prefill bucket
    advance  n frames of all slots                          one program per read window and `ranks`
    free     slots of requests that were given up
    share    a voice's prompt -> a segment that rows name   one program per prefill bucket

Programs are compiled ahead of time for fixed sizes: `chunk_frames` frames, and `prefill_rows` prompts at a
time, filled up with others. So nothing compiles while the engine runs, and what happens beside a row changes
nothing it computes with but the read window, which is that of the longest row: on a CPU its codes are the
same in the last bit even so, and on a device whose products of another size round otherwise, up to that.
This module knows device arrays and sizes; who sits where is `csm_jax.engine`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax import generate, kvcache, sharding
from csm_jax.array_typing import Array, Params, pytree
from csm_jax.config import CSMConfig
from csm_jax.generate import (
    PREFILL_BUCKETS,
    WINDOW_BUCKETS,
    DecodeState,
    Prefix,
    RowSettings,
    bucket,
    stack_prompts,
)
from csm_jax.kvcache import SharedKV
from csm_jax.sampling import SamplingParams, rank_sizes, request_keys, sampling_params

# One layer's attention scores of a prefill are rows · heads · T² numbers: bound rows · T².
_PREFILL_AREA = 2**22

Programs = dict[tuple[Any, ...], Callable[..., Any]]
"""Compiled programs by what they are for."""
Frames = tuple[np.ndarray, np.ndarray]
"""A prompt: codes and text id per position, int32 [T, C+1], and which columns count, bool."""


@dataclass(frozen=True, kw_only=True)
class SlotSizes:
    """What is compiled. Memory is `slots · capacity` positions, and `segments · segment_capacity`.

    Attributes:
        slots: Rows of the batch; on a mesh a multiple of its data axis.
        capacity: Positions a row can hold, its segment not counted.
        chunk_frames: Frames made per call.
        prefill_rows: Most prompts prefilled at a time.
        segments: Shared voice prompts held at a time; 0 for none.
        segment_capacity: Positions a shared voice prompt can have.
    """

    slots: int
    capacity: int
    chunk_frames: int
    prefill_rows: int
    segments: int = 0
    segment_capacity: int = 0

    def __post_init__(self) -> None:
        for name in ("slots", "capacity", "chunk_frames", "prefill_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.segments < 0 or (self.segments > 0) != (self.segment_capacity > 0):
            raise ValueError(
                f"segments={self.segments} and segment_capacity={self.segment_capacity} must both be "
                "positive, or both 0"
            )

    def prefill_group(self, length: int) -> int:
        """Returns how many prompts of a prefill bucket are prefilled at a time."""
        return max(1, min(self.prefill_rows, self.slots, _PREFILL_AREA // length**2))


@pytree
class Report:
    """What a chunk made, in arrays of its own: the state goes on to the next chunk.

    Attributes:
        codes: `[B, n, C]`.
        counts: How many of its n frames each row really made, `[B]`.
        status: A `csm_jax.generate.Status` per row, `[B]`.
    """

    codes: Array
    counts: Array
    status: Array

    def wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the arrays on the host, as soon as they are there."""
        return jax.device_get((self.codes, self.counts, self.status))


class Slots:
    """A `DecodeState` on its devices, and the programs that move it."""

    def __init__(
        self,
        config: CSMConfig,
        params: Params,
        sizes: SlotSizes,
        *,
        mesh: jax.sharding.Mesh | None = None,
        programs: Programs | None = None,
    ):
        """Makes empty slots; compiles nothing yet.

        Args:
            config: The model's sizes.
            params: Weights on their devices (`csm_jax.model.param_shardings` on a mesh).
            sizes: What to compile.
            mesh: Explicit axes; None runs on one device.
            programs: What other slots of the same model, sizes and mesh have compiled, to share.

        Raises:
            ValueError: The sizes do not fit the model or the mesh.
        """
        limit = config.backbone.max_seq_len
        if max(sizes.capacity, sizes.segment_capacity) > limit:
            raise ValueError(
                f"capacity={sizes.capacity:,} and segment_capacity={sizes.segment_capacity:,} must not "
                f"exceed the model's max_seq_len={limit:,}"
            )
        self.config, self.sizes = config, sizes
        self.windows = [*(size for size in WINDOW_BUCKETS if size < sizes.capacity), sizes.capacity]
        longest = max(sizes.capacity, sizes.segment_capacity)
        self.prefills = sorted({self.prefill_size(min(n, longest)) for n in PREFILL_BUCKETS})
        self.compilations = 0
        self._params, self._mesh, self._rules = params, mesh, sharding.current_rules()
        self._dtype = params["backbone"]["final_norm"].dtype
        self._programs: Programs = {} if programs is None else programs
        self._state: DecodeState | None = None
        self._shared: SharedKV | None = None
        with sharding.on(self._mesh, self._rules):
            sharding.check_placed(params)
            multiple = sharding.batch_multiple()
            if sizes.slots % multiple:
                raise ValueError(
                    f"slots={sizes.slots} must be a multiple of the mesh's data axis, {multiple}"
                )
        self.reset()

    # --- verbs ----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Empties all slots and segments into new arrays, whatever has become of the old ones."""
        self._state = self._shared = None
        with sharding.on(self._mesh, self._rules):
            self._state = self._new_state()
            if self.sizes.segments:
                self._shared = self._new_shared()

    @property
    def lost(self) -> bool:
        """Whether a failed call has taken the state with it, so that only `reset` helps."""
        if self._state is None or (self._shared is None and self.sizes.segments):
            return True
        leaves = jax.tree.leaves((self._state, self._shared))
        return any(leaf.is_deleted() for leaf in leaves)

    def prefill(self, prompts: Sequence[Frames], segments: Sequence[int]) -> Prefix:
        """Returns the prompts' prefix; at most a group of one prefill bucket.

        Args:
            prompts: The rows' own positions, checked (`csm_jax.generate.check_prompt`).
            segments: Each row's shared segment, -1 for none.

        Raises:
            jax.errors.JaxRuntimeError: The device fails.
        """
        size = self.prefill_size(max(len(frames) for frames, _ in prompts))
        fill = self.sizes.prefill_group(size) - len(prompts)
        frames, mask = stack_prompts([*prompts, *[prompts[0]] * fill], size)
        with sharding.on(self._mesh, self._rules):
            # On a mesh each device prefills its own rows; a group that does not divide, every device.
            args = [
                self._params,
                *(sharding.split_batch(sharding.replicate(x)) for x in (frames, mask)),
            ]
            if self._shared is not None:
                rows = np.array([*segments, *[-1] * fill], np.int32)
                args += [self._shared, sharding.split_batch(sharding.replicate(rows))]
            return self._run_prefill(args)

    def prefill_size(self, length: int) -> int:
        """Returns the prefill bucket of a prompt of this many positions."""
        return bucket(length, PREFILL_BUCKETS, limit=self.config.backbone.max_seq_len)

    def insert(self, prefix: Prefix, settings: RowSettings, slots: Sequence[int]) -> None:
        """Starts prefilled prompts in slots.

        Args:
            prefix: Of `prefill`.
            settings: As many rows as the prefix has; those beyond `slots` are not used.
            slots: A slot for each prompt.

        Raises:
            jax.errors.JaxRuntimeError: The device fails; see `lost`.
        """
        rows = prefix.hidden.shape[0]
        # Beyond the batch is nowhere.
        places = np.full(rows, self.sizes.slots, np.int32)
        places[: len(slots)] = slots
        with sharding.on(self._mesh, self._rules):
            args = (
                self._state,
                prefix,
                jax.tree.map(sharding.replicate, settings),
                sharding.replicate(places),
            )
            program = self._program(
                ("insert", rows, prefix.k[0].shape[2]), lambda: generate.insert.lower(*args)
            )
            self._state = program(*args)

    def advance(self, longest: int, ranks: int) -> Report:
        """Tells the device to make the next chunk, and returns at once.

        Args:
            longest: Most own positions that a row will have after it.
            ranks: Of `csm_jax.sampling.ranks_needed`.

        Raises:
            jax.errors.JaxRuntimeError: The device fails; see `lost`.
        """
        window = bucket(longest, self.windows, limit=self.sizes.capacity)
        with sharding.on(self._mesh, self._rules):
            program = self._advance_program(window, ranks)
            self._state, report = program(self._params, self._state, self._shared)
        return report

    def free(self, slots: Sequence[int]) -> None:
        """Stops slots whose requests were given up."""
        rows = np.zeros(self.sizes.slots, bool)
        rows[list(slots)] = True
        with sharding.on(self._mesh, self._rules):
            args = (self._state, sharding.replicate(rows))
            self._state = self._program(("free",), lambda: generate.free.lower(*args))(*args)

    def share(self, prompt: Frames, segment: int) -> bool:
        """Puts a voice's prompt into a segment that no running row uses; returns whether it is finite.

        Raises:
            ValueError: The prompt is bad or longer than a segment.
            jax.errors.JaxRuntimeError: The device fails; see `lost`.
        """
        if len(prompt[0]) > self.sizes.segment_capacity:
            raise ValueError(
                f"the voice takes {len(prompt[0]):,} positions, but shared segments hold "
                f"{self.sizes.segment_capacity:,}"
            )
        frames, mask = stack_prompts([prompt], self.prefill_size(len(prompt[0])))
        with sharding.on(self._mesh, self._rules):
            # Nothing comes before a voice: the program without segments.
            prefix = self._run_prefill(
                [self._params, sharding.replicate(frames), sharding.replicate(mask)]
            )
            if not _finite(prefix):
                return False
            args = (self._shared, prefix, sharding.replicate(np.int32(segment)))
            key = ("share", prefix.k[0].shape[2])
            self._shared = self._program(key, lambda: generate.share.lower(*args))(*args)
        return True

    # --- compiling ------------------------------------------------------------------------------

    def warm_up(self, *, threads: int = 4) -> None:
        """Compiles every program that requests can ask for; none is compiled afterwards.

        Ends with empty slots and segments.

        Raises:
            jax.errors.JaxRuntimeError: The device has too little memory for a program.
        """
        with sharding.on(self._mesh, self._rules):
            wanted = {
                ("advance", window, ranks): self._lower_advance(window, ranks)
                for window in self.windows
                for ranks in rank_sizes(codebook_size=self.config.codebook_size)
            }
            missing = {key: low for key, low in wanted.items() if key not in self._programs}
            with ThreadPoolExecutor(threads) as pool:
                compiled = pool.map(lambda low: low.compile(), missing.values())
                self._programs |= dict(zip(missing, compiled, strict=True))
            self.compilations += len(missing)
        # The others are small enough to run.
        columns = self.config.num_codebooks + 1
        for size in self.prefills:
            mask = np.zeros((size, columns), bool)
            mask[:, -1] = True
            prompt = (np.zeros((size, columns), np.int32), mask)
            prefix = self.prefill([prompt], [-1])
            self.insert(prefix, _no_settings(prefix.hidden.shape[0]), [])
            most = self.sizes.segment_capacity
            if most and size <= self.prefill_size(most):
                self.share((prompt[0][:most], prompt[1][:most]), 0)
        self.free([])
        self.reset()

    def compiled(self, *, window: int, ranks: int) -> Any:
        """Returns the compiled program of `advance`, to look at its code, its memory and its cost."""
        with sharding.on(self._mesh, self._rules):
            return self._advance_program(window, ranks)

    def _advance_program(self, window: int, ranks: int) -> Callable[..., Any]:
        key = ("advance", window, ranks)
        return self._program(key, lambda: self._lower_advance(window, ranks))

    def _lower_advance(self, window: int, ranks: int) -> Any:
        return _advance.lower(
            self._params,
            self._state,
            self._shared,
            config=self.config,
            num_frames=self.sizes.chunk_frames,
            window=window,
            ranks=ranks,
        )

    def _run_prefill(self, args: Sequence[Any]) -> Prefix:
        key = ("prefill", *args[1].shape[:2], len(args))
        program = self._program(key, lambda: generate.prefill.lower(*args, config=self.config))
        return program(*args)

    def _program(self, key: tuple[Any, ...], lower: Callable[[], Any]) -> Callable[..., Any]:
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = lower().compile()
            self.compilations += 1
        return program

    # --- states ---------------------------------------------------------------------------------

    def _new_state(self) -> DecodeState:
        sizes = self.sizes
        return generate.init_state(
            self.config, batch=sizes.slots, capacity=sizes.capacity, dtype=self._dtype
        )

    def _new_shared(self) -> SharedKV:
        sizes = self.sizes
        return kvcache.init_shared(
            self.config.backbone,
            segments=sizes.segments,
            capacity=sizes.segment_capacity,
            dtype=self._dtype,
        )


@functools.partial(
    jax.jit, static_argnames=("config", "num_frames", "window", "ranks"), donate_argnames=("state",)
)
def _advance(
    params: Params,
    state: DecodeState,
    shared: SharedKV | None,
    *,
    config: CSMConfig,
    num_frames: int,
    window: int,
    ranks: int,
) -> tuple[DecodeState, Report]:
    state, codes, valid = generate.generate_frames(
        params,
        state,
        shared,
        config=config,
        num_frames=num_frames,
        window=window,
        ranks=ranks,
    )
    # A row makes its frames without a gap. Whole on every device: every process reads all rows.
    report = Report(
        codes=codes, counts=valid.sum(axis=1, dtype=jnp.int32), status=jnp.copy(state.status)
    )
    return state, jax.tree.map(sharding.whole, report)


@jax.jit
def _all_finite(prefix: Prefix) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(prefix)]).all()


def _finite(prefix: Prefix) -> bool:
    return bool(_all_finite(prefix))


def _no_settings(rows: int) -> RowSettings:
    """Returns settings of rows that make nothing."""

    def sampling() -> SamplingParams:
        return sampling_params(
            temperature=[0.0] * rows, top_k=[0] * rows, top_p=[1.0] * rows, min_p=[0.0] * rows
        )

    return RowSettings(
        key=request_keys([0] * rows),
        max_frames=jnp.zeros((rows,), jnp.int32),
        segment=jnp.full((rows,), -1, jnp.int32),
        sampling=sampling(),
        decoder_sampling=sampling(),
    )
