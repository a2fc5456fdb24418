"""Mimi as a `csm_jax.codec.Codec` on JAX's devices: numpy in, numpy out.

Utterances go through `decode_frames` and `encode_frames` in pieces whose sizes come from one short list,
so that no length compiles a program of its own and memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax import sharding
from csm_jax.array_typing import Array, Params
from csm_jax.audio import check_audio
from csm_jax.codec import check_codes
from csm_jax.mimi import model
from csm_jax.mimi.config import MimiConfig

MAX_FRAMES = 32
"""Most frames (2.56 s) in one call: more are no faster on CPU, where their activations leave the cache."""
MAX_ROWS = 8
"""Most rows in one call."""


def bucket(count: int) -> int:
    """Returns the least power of two that is not below `count`: the sizes that programs are made for."""
    return 1 << max(count - 1, 0).bit_length()


class JaxMimi:
    """Mimi with the weights of one checkpoint.

    Its methods may be called from several threads.
    """

    def __init__(self, config: MimiConfig, params: Params, *, num_codebooks: int | None = None):
        """Puts the weights on the default device.

        Args:
            config: Sizes.
            params: A checkpoint's parameters (`csm_jax.weights.mimi.load_mimi`).
            num_codebooks: Codes per frame to use; by default all.

        Raises:
            ValueError: `num_codebooks` is not between 1 and the checkpoint's.
        """
        self.config = config
        self._num_codebooks = config.num_codebooks if num_codebooks is None else num_codebooks
        self._params = model.prepare(params, num_codebooks=self._num_codebooks, config=config)
        self._on_meshes: dict[jax.sharding.Mesh, Params] = {}

    @property
    def sample_rate(self) -> int:
        """Samples per second: 24,000."""
        return self.config.sample_rate

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return self._num_codebooks

    @property
    def codebook_size(self) -> int:
        """Codes run from 0 to this, exclusive: 2,048 in the published weights."""
        return self.config.codebook_size

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """Returns the codes (int32 [ceil(W / 1920), C]) of 24 kHz audio (float [W]).

        The last frame is filled up with silence.

        Raises:
            TypeError, ValueError: Bad audio, see `csm_jax.audio.check_audio`.
        """
        return self.encode_batch([audio])[0]

    def encode_batch(self, audios: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns what `encode` gives for each, computed together; lengths may differ.

        Raises:
            TypeError, ValueError: Bad audio, see `csm_jax.audio.check_audio`.
        """
        size = self.config.samples_per_frame
        rows = []
        for audio in audios:
            samples = check_audio(audio, "audio")
            rows.append(np.pad(samples, (0, -samples.size % size)).reshape(-1, size))
        return _in_groups(rows, self._encode_group)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the audio (float32 [n * 1920]) of codes (int [n, C]).

        Raises:
            TypeError, ValueError: Bad codes, see `csm_jax.codec.check_codes`.
        """
        return self.decode_batch([codes])[0]

    def decode_batch(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns what `decode` gives for each, computed together; lengths may differ.

        Raises:
            TypeError, ValueError: Bad codes, see `csm_jax.codec.check_codes`.
        """
        rows = [self._check_codes(row) for row in codes]
        return [audio.reshape(-1) for audio in _in_groups(rows, self._decode_group)]

    def open_stream(self) -> MimiStream:
        """Returns a decoder for one utterance in pieces; streams do not disturb each other."""
        return MimiStream(self)

    def open_rows(self, rows: int, frames: int) -> MimiRows:
        """Returns rows that decode side by side, always with one program."""
        return MimiRows(self, rows, frames)

    def _placed(self, mesh: jax.sharding.Mesh | None) -> Params:
        """Returns the weights for the mesh that is set: copied there once, not at every call."""
        if mesh is None:
            return self._params
        if mesh not in self._on_meshes:
            self._on_meshes[mesh] = jax.tree.map(sharding.replicate, self._params)
        return self._on_meshes[mesh]

    def _check_codes(self, codes: np.ndarray) -> np.ndarray:
        return check_codes(
            codes, num_codebooks=self.num_codebooks, codebook_size=self.codebook_size
        )

    def _decode_group(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        state = model.init_decode_state(self.config, batch=bucket(len(rows)))
        pieces = []
        for codes, counts in _pieces(rows):
            audio, state = model.decode_frames(
                self._params, state, codes, counts, config=self.config
            )
            pieces.append(audio.reshape(*codes.shape[:2], -1))
        return _joined(rows, pieces)

    def _encode_group(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        state = model.init_encode_state(self.config, batch=bucket(len(rows)))
        pieces = []
        for audio, counts in _pieces(rows):
            codes, state = model.encode_frames(
                self._params, state, audio.reshape(len(audio), -1), counts, config=self.config
            )
            pieces.append(codes)
        return _joined(rows, pieces)


class MimiRows:
    """Several utterances decoded side by side, a row each, piece by piece.

    Every call runs the same program, whatever rows it is for, so a row's samples depend on its own
    codes and on how they were cut into pieces, and on nothing else.
    """

    def __init__(self, codec: JaxMimi, rows: int, frames: int) -> None:
        """Makes idle rows, on the mesh that is set, if one is.

        Args:
            codec: Whose weights to use.
            rows: How many; on a mesh best a multiple of its data axis.
            frames: Most frames of a row in one call.
        """
        self.rows, self.frames = rows, frames
        self._codec = codec
        self._mesh, self._rules = sharding.current_mesh(), sharding.current_rules()
        # Made when it is first needed: 8 MB for each row of the published size.
        self._state: model.State | None = None

    def begin(
        self, codes: Mapping[int, np.ndarray], fresh: Collection[int]
    ) -> Callable[[], dict[int, np.ndarray]]:
        """Starts decoding rows' next frames and returns a function that waits for their audio.

        Args:
            codes: By row, int [n, C], n up to `frames`; other rows stand still.
            fresh: Rows that begin an utterance with these frames.

        Raises:
            TypeError, ValueError: Bad codes, see `csm_jax.codec.check_codes`; nothing is decoded.
        """
        codec = self._codec
        piece = np.zeros((self.rows, self.frames, codec.num_codebooks), np.int32)
        counts = np.zeros(self.rows, np.int32)
        for row, part in codes.items():
            piece[row, : len(part)] = codec._check_codes(part)
            counts[row] = len(part)
        chosen = np.zeros(self.rows, bool)
        chosen[list(fresh)] = True
        with sharding.on(self._mesh, self._rules):
            params = codec._placed(self._mesh)
            if self._state is None:
                self._state = model.init_decode_state(codec.config, batch=self.rows)
            if fresh:
                self._state = _reset(self._state, _split(chosen))
            audio, self._state = model.decode_frames(
                params, self._state, _split(piece), _split(counts), config=codec.config
            )
            audio = sharding.readable(audio)
        size = codec.config.samples_per_frame
        lengths = {row: len(part) * size for row, part in codes.items()}

        def wait() -> dict[int, np.ndarray]:
            samples = np.asarray(audio)
            return {row: samples[row, :length].copy() for row, length in lengths.items()}

        return wait


_reset = jax.jit(model.reset, donate_argnums=0)


def _split(x: np.ndarray) -> Array:
    return sharding.split_batch(sharding.replicate(x))


class MimiStream:
    """One utterance decoded piece by piece, equal to decoding it whole."""

    def __init__(self, codec: JaxMimi) -> None:
        self._codec = codec
        self._state: model.State | None = model.init_decode_state(codec.config, batch=1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the audio (float32 [n * 1920]) of the next frames (int [n, C]).

        Raises:
            TypeError, ValueError: Bad codes, see `csm_jax.codec.check_codes`; the stream is as it
                was before the call.
            RuntimeError: The stream is closed.
        """
        return self.begin(codes)()

    def begin(self, codes: np.ndarray) -> Callable[[], np.ndarray]:
        """Starts decoding the next frames (int [n, C]) and returns a function that waits for the audio.

        Raises:
            TypeError, ValueError: Bad codes, see `csm_jax.codec.check_codes`; the stream is as it
                was before the call.
            RuntimeError: The stream is closed.
        """
        if self._state is None:
            raise RuntimeError("this Mimi stream is closed; open another with open_stream()")
        codec = self._codec
        row = codec._check_codes(codes)
        pieces = []
        for piece, counts in _pieces([row]):
            audio, self._state = model.decode_frames(
                codec._params, self._state, piece, counts, config=codec.config
            )
            pieces.append(audio.reshape(*piece.shape[:2], -1))
        return lambda: _joined([row], pieces)[0].reshape(-1)

    def close(self) -> None:
        """Frees the stream's state; closing twice does nothing."""
        self._state = None

    def __enter__(self) -> MimiStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _in_groups(
    rows: Sequence[np.ndarray], run: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
) -> list[np.ndarray]:
    # Rows of like length share a group, so that little is spent on rows that have ended.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    results: dict[int, np.ndarray] = {}
    for start in range(0, len(order), MAX_ROWS):
        group = order[start : start + MAX_ROWS]
        results.update(zip(group, run([rows[index] for index in group]), strict=True))
    return [results[index] for index in range(len(rows))]


def _pieces(rows: Sequence[np.ndarray]) -> Iterator[tuple[Array, Array]]:
    """Yields the rows' next frames, padded to [B, n, ...] of bucket sizes, and how many each has."""
    longest, start = max(len(row) for row in rows), 0
    while start < longest:
        size = min(bucket(longest - start), MAX_FRAMES)
        piece = np.zeros((bucket(len(rows)), size, *rows[0].shape[1:]), rows[0].dtype)
        counts = np.zeros(len(piece), np.int32)
        for index, row in enumerate(rows):
            part = row[start : start + size]
            piece[index, : len(part)] = part
            counts[index] = len(part)
        yield sharding.split_batch(jnp.asarray(piece)), sharding.split_batch(jnp.asarray(counts))
        start += size


def _joined(rows: Sequence[np.ndarray], pieces: Sequence[Array]) -> list[np.ndarray]:
    """Returns each row's own frames of the outputs [B, n, ...] of all pieces."""
    if not pieces:  # only codes can be empty
        return [np.zeros(0, np.float32) for _ in rows]
    whole = np.concatenate([np.asarray(piece) for piece in pieces], axis=1)
    return [whole[index, : len(row)].copy() for index, row in enumerate(rows)]
