"""The engine's device side: a batch of slots, compiled for every size it may need.

    start    prompts -> prefill -> insert into slots        one program of each per prefill bucket
    advance  n frames of all slots                          one program per read window and `ranks`
    free     slots of requests that were given up
    share    a voice's prompt -> a segment that rows name   inputs, keys, copy: one of each per bucket

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
    check_prompt,
    stack_prompts,
)
from csm_jax.kvcache import SharedKV
from csm_jax.sampling import rank_sizes

# One layer's attention scores of a prefill are rows · heads · T² numbers: bound rows · T².
_PREFILL_AREA = 2**22

Programs = dict[tuple[Any, ...], Callable[..., Any]]
"""Compiled programs by what they are for."""
Frames = tuple[np.ndarray, np.ndarray]
"""A prompt: codes and text id per position, int32 [T, C+1], and which columns count, bool."""


@dataclass(frozen=True, eq=False, kw_only=True)
class VoicePrompt:
    """What a voice puts before the prompts of all who use it: vectors, then frames.

    Attributes:
        frames: Codes and text id per position, int32 [T, C+1]; none where there are only vectors.
        mask: Which columns count, bool [T, C+1].
        vectors: Trained inputs of the backbone, float32 [P, D]; None for none.
    """

    frames: np.ndarray
    mask: np.ndarray
    vectors: np.ndarray | None = None

    def __len__(self) -> int:
        """Returns how many positions it takes."""
        return len(self.frames) + (0 if self.vectors is None else len(self.vectors))


def check_voice(voice: VoicePrompt, *, config: CSMConfig) -> None:
    """Checks that a voice's prompt is one the backbone can read.

    Raises:
        ValueError: Its frames are bad (`csm_jax.generate.check_prompt`), or its vectors are no inputs of
            this model.
    """
    vectors = voice.vectors
    if vectors is None or len(voice.frames):
        check_prompt(voice.frames, voice.mask, config=config, name="voice")
    if vectors is None:
        return
    if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != config.backbone.embed_dim:
        raise ValueError(
            f"voice: vectors {vectors.shape} must be [positions, embed_dim] with the model's "
            f"embed_dim={config.backbone.embed_dim:,}"
        )


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
            settings: Of each prompt; those beyond `slots` are not used.
            slots: A slot for each prompt.

        Raises:
            jax.errors.JaxRuntimeError: The device fails; see `lost`.
        """
        rows = prefix.hidden.shape[0]
        # Beyond the batch is nowhere.
        places = np.full(rows, self.sizes.slots, np.int32)
        places[: len(slots)] = slots
        settings = jax.tree.map(lambda values: _filled_up(np.asarray(values), rows), settings)
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

    def share(self, voice: VoicePrompt, segment: int) -> bool:
        """Puts a voice's prompt into a segment that no running row uses; returns whether it is finite.

        Raises:
            ValueError: The prompt is longer than a segment.
            jax.errors.JaxRuntimeError: The device fails; see `lost`.
        """
        if len(voice) > self.sizes.segment_capacity:
            raise ValueError(
                f"the voice takes {len(voice):,} positions, but shared segments hold "
                f"{self.sizes.segment_capacity:,}"
            )
        size = self.prefill_size(len(voice))
        arrays = _stack_voice(voice, size, dim=self.config.backbone.embed_dim)
        with sharding.on(self._mesh, self._rules):
            given = (self._params, *map(sharding.replicate, arrays))
            program = self._program(
                ("inputs", size), lambda: generate.voice_inputs.lower(*given, config=self.config)
            )
            length = sharding.replicate(np.array([len(voice)], np.int32))
            inputs = (self._params, program(*given), length)
            program = self._program(
                ("read", size), lambda: _read.lower(*inputs, config=self.config)
            )
            prefix, finite = program(*inputs)
            if not bool(finite):
                return False
            args = (self._shared, prefix, sharding.replicate(np.int32(segment)))
            program = self._program(("share", size), lambda: generate.share.lower(*args))
            self._shared = program(*args)
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
            self.insert(prefix, self._no_settings(), [])
            most = self.sizes.segment_capacity
            if most and size <= self.prefill_size(most):
                voice = VoicePrompt(frames=prompt[0][:most], mask=prompt[1][:most])
                self.share(voice, 0)
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

    def _no_settings(self) -> RowSettings:
        """Returns the settings of no rows."""
        state = self._state or self._new_state()
        return jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape[1:]), leaf.dtype), state.settings)


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


@functools.partial(jax.jit, static_argnames=("config",))
def _read(
    params: Params, inputs: Array, length: Array, *, config: CSMConfig
) -> tuple[Prefix, Array]:
    prefix = generate.prefill_inputs(params, inputs, length, config=config)
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(prefix)]
    return prefix, jnp.stack(finite).all()


def _stack_voice(
    voice: VoicePrompt, size: int, *, dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns frames, mask and vectors on `size` positions, each where it stands, and the vectors' number."""
    count = len(voice) - len(voice.frames)
    frames, mask = stack_prompts([(voice.frames, voice.mask)], size - count)
    gap = ((0, 0), (count, 0), (0, 0))
    vectors = np.zeros((1, size, dim), np.float32)
    if voice.vectors is not None:
        vectors[0, :count] = voice.vectors
    return np.pad(frames, gap), np.pad(mask, gap), vectors, np.array(count, np.int32)


def _filled_up(values: np.ndarray, rows: int) -> np.ndarray:
    """Returns values of as many rows, zeros after those there are."""
    return np.concatenate([values, np.zeros((rows - len(values), *values.shape[1:]), values.dtype)])
