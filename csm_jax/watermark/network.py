"""The networks of silentcipher's 44.1 kHz model in JAX, over chunks of a few frames.

Three stacks of gated convolutions over the spectrogram, [rows, frames, bins, channels]: the encoder
(carrier -> 32 features), the marker (features, carrier, message -> what to take off each bin) and
the reader (spectrogram -> a channel per symbol). One layer is `batch_norm(conv(x) * sigmoid(gate(x)))`,
and its batch norm uses the statistics of the very utterance: the silentcipher package never switches
its networks to evaluation, so that is how published marks are made and read.

    samples -> spectrum -> |.| · gain = carrier -> encoder ┐
                                 carrier, message spectrum ┴> join -> marker -> lower -> samples

An utterance is cut into chunks of `chunk_frames` frames and every program here handles one chunk, so
no length of audio compiles anything anew. A layer goes over all chunks, each with a frame of its
neighbours on both sides, and gathers the statistics on the way; the next layer normalises what it
reads. Frames past the utterance's end are masked: zero to the convolutions, as the reference pads, and
absent from statistics and levels.

The programs, 18 in all, none longer than two seconds to compile: 11 mark (`_analyse`, `_gated` from
1, 32, 34 and 96 channels and from 96 to 1, `_norm` of three widths, `_join`, `_lower`) and 7 read
(`_magnitudes`, `_gated` of three shapes, `_norm` of two, `_score`). An accelerator reads several
audios, such as the phases of a search, side by side: 7 programs more.

The letters: R rows (audio side by side), T frames of a chunk, I and O channels in and out.

Sources: sony/silentcipher `model.py`, `server.py`, `stft.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex

from csm_jax.array_typing import Array, Float, Int, Params
from csm_jax.watermark import stft, winograd
from csm_jax.watermark.files import Layer, Sizes, Weights
from csm_jax.watermark.interface import MESSAGE_SDR_DB, Marked, MarkJob


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How much one program handles; it changes speed only.

    Attributes:
        chunk_frames: Frames of a chunk, a multiple of `winograd.TILE`.
        read_rows: How many audios are read side by side when there is more than one.
    """

    chunk_frames: int
    read_rows: int


# On a CPU, a chunk's 25 products of 96 channels (20 MB) just fit the cache: 3 frames took 3.4 ms each,
# 21 frames 6.1 ms each. An accelerator has no such limit and needs the work: 21 frames are a stream's
# window, 4 rows the phases that a search tries at once.
_CPU = Tiling(chunk_frames=winograd.TILE, read_rows=1)
_ACCELERATOR = Tiling(chunk_frames=21, read_rows=4)

_BATCH_NORM_EPS = 1e-5  # torch's default
_HIGHEST = jax.lax.Precision.HIGHEST  # true float32 where an accelerator would round

Norm = dict[str, Any]
"""What normalises a layer's output: "scale" and "shift", [R, O]."""
Stats = dict[str, Any]
"""Statistics of the chunks so far: "mean" and "squares" (summed deviations from it), [R, O]."""


class JaxNetworks:
    """The networks on JAX's default device; see `csm_jax.watermark.interface.Networks`."""

    def __init__(self, sizes: Sizes, weights: Weights, *, tiling: Tiling | None = None) -> None:
        """Places the weights.

        Args:
            sizes: From `csm_jax.watermark.files.load`.
            weights: Likewise.
            tiling: None chooses by the device.
        """
        self.sizes = sizes
        if tiling is None:
            tiling = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
        self._chunk, self._rows = tiling.chunk_frames, tiling.read_rows
        self._encoder, self._marker, self._reader = (
            [_layer_params(layer) for layer in stack]
            for stack in (weights.encoder, weights.marker, weights.reader)
        )
        self._message = {
            "weight": jnp.asarray(weights.message_weight),
            "bias": jnp.asarray(weights.message_bias),
        }
        self._readout = {
            "weight": jnp.asarray(weights.reader_weight),
            "bias": jnp.asarray(weights.reader_bias),
        }

    def mark(self, jobs: Sequence[MarkJob]) -> list[Marked]:
        """Returns each job's marked samples; no job changes another's."""
        # All are started before the first is waited for, so the device never idles between them.
        started = [self._start(job) for job in jobs]
        return [
            Marked(
                samples=stft.overlap_add(
                    np.concatenate([np.asarray(piece)[0] for piece in pieces])[: job.symbols.size]
                ),
                new_power=float(np.asarray(power)[0]),
            )
            for job, (pieces, power) in zip(jobs, started, strict=True)
        ]

    def _start(self, job: MarkJob) -> tuple[list[Array], Array | np.ndarray]:
        # Returns the chunks' windowed frames and the new frames' power, both still being computed.
        count = job.symbols.size
        frames = np.array([count], np.int32)
        power = np.zeros(1, np.float32)
        spectra, carriers = [], []
        for start, samples in self._cut([job.framed]):
            new = np.array([job.first_new, count], np.int32)
            spectrum, carrier, power = _analyse(
                samples, np.float32(job.gain), power, new, start, hop=self.sizes.hop
            )
            spectra.append(spectrum)
            carriers.append(carrier)
        features, norm = self._run(self._encoder, list(carriers), frames)
        chunks = len(carriers)
        symbols = np.pad(job.symbols, (0, chunks * self._chunk - count)).reshape(chunks, 1, -1)
        joined = [
            _join(features.pop(0), norm, carrier, self._message, symbols[i])
            for i, carrier in enumerate(carriers)
        ]
        marks, norm = self._run(self._marker, joined, frames)
        past = np.array([job.past_power, job.power_frames], np.float32)
        pieces = [
            _lower(mark, norm, spectrum, past, power, band=self.sizes.band)
            for mark, spectrum in zip(marks, spectra, strict=True)
        ]
        return pieces, power

    def read(self, framed: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns each audio's scores, [frames, symbols]; the audio is at `REFERENCE_POWER`."""
        scores: list[np.ndarray] = []
        rows = 1 if len(framed) == 1 else self._rows
        for first in range(0, len(framed), rows):
            group = framed[first : first + rows]
            counts = [audio.size // self.sizes.hop - 1 for audio in group]
            padded = [*group, *[np.zeros(0, np.float32)] * (rows - len(group))]
            frames = np.array(counts + [0] * (rows - len(group)), np.int32)
            magnitudes = [
                _magnitudes(samples, hop=self.sizes.hop, band=self.sizes.band)
                for _, samples in self._cut(padded)
            ]
            channels, norm = self._run(self._reader, magnitudes, frames)
            pieces = [_score(chunk, norm, self._readout) for chunk in channels]
            joined = np.concatenate([np.asarray(piece) for piece in pieces], axis=1)
            scores += [row[:count] for row, count in zip(joined, counts, strict=False)]
        return scores

    def _cut(self, framed: Sequence[np.ndarray]) -> list[tuple[np.int32, np.ndarray]]:
        # Each chunk's first frame and its samples [R, (T + 1) · hop], zeros past the end.
        hop, step = self.sizes.hop, self._chunk
        frames = max(audio.size for audio in framed) // hop - 1
        chunks = -(-frames // step)
        padded = np.zeros((len(framed), (chunks * step + 1) * hop), np.float32)
        for row, audio in zip(padded, framed, strict=True):
            row[: audio.size] = audio
        return [
            (np.int32(start), padded[:, start * hop : (start + step + 1) * hop])
            for start in range(0, chunks * step, step)
        ]

    def _run(
        self, layers: Sequence[Params], chunks: list[Array], frames: np.ndarray
    ) -> tuple[list[Array], Norm]:
        # The last layer's chunks, and what is still to normalise them. Empties `chunks` on the way,
        # so that not much more than one layer's output is in memory.
        width = chunks[0].shape[-1]
        norm: Norm = {
            "scale": np.ones((len(frames), width), np.float32),
            "shift": np.zeros((len(frames), width), np.float32),
        }
        for layer in layers:
            outputs: list[Array] = []
            zeros = np.zeros((len(frames), layer["scale"].size), np.float32)
            stats: Stats = {"mean": zeros, "squares": zeros}
            before = chunks[0]  # at the ends of the utterance, neighbours are masked
            while chunks:
                here = chunks.pop(0)
                after = chunks[0] if chunks else here
                start = np.int32(len(outputs) * self._chunk)
                y, stats = _gated(layer, norm, (before, here, after), stats, start, frames)
                outputs.append(y)
                before = here
            norm = _norm(layer["scale"], layer["shift"], stats, frames, bins=outputs[0].shape[2])
            chunks = outputs
        return chunks, norm


def _layer_params(layer: Layer) -> Params:
    _, inputs, kernel, _ = layer.weight.shape
    if kernel == 3 and inputs > 1:
        weight = {"tiles": jnp.asarray(winograd.transform_weight(layer.weight))}
    else:  # one channel is nothing to multiply matrices with
        weight = {"taps": jnp.asarray(layer.weight.transpose(3, 2, 1, 0))}
    return weight | {
        "bias": jnp.asarray(layer.bias),
        "scale": jnp.asarray(layer.scale),
        "shift": jnp.asarray(layer.shift),
    }


@jax.jit
def _gated(
    layer: Params,
    norm: Norm,
    chunks: tuple[
        Float[Array, "R T bins I"], Float[Array, "R T bins I"], Float[Array, "R T bins I"]
    ],
    stats: Stats,
    start: Int[Array, ""],
    frames: Int[Array, "R"],
) -> tuple[Float[Array, "R T bins O"], Stats]:
    # One layer on one chunk, between its neighbours: what the batch norm is still to be applied to,
    # and the statistics with this chunk's.
    before, here, after = chunks
    steps, bins = here.shape[1:3]
    index = start - 1 + jnp.arange(steps + 2)
    inside = (index >= 0) & (index < frames[:, None])
    x = jnp.concatenate([before[:, -1:], here, after[:, :1]], axis=1)
    x = x * norm["scale"][:, None, None] + norm["shift"][:, None, None]
    x = jnp.where(inside[:, :, None, None], x, 0)
    if "tiles" in layer:
        x = jnp.pad(x, ((0, 0), (0, 0), (1, winograd.padded_bins(bins) - bins - 1), (0, 0)))
        y = winograd.convolve(x, layer["tiles"])[:, :, :bins]
    else:
        pad = layer["taps"].shape[1] // 2
        y = jax.lax.conv_general_dilated(
            x[:, 1 - pad : steps + 1 + pad],
            layer["taps"],
            (1, 1),
            ((0, 0), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_HIGHEST,
        )
    value, gate = jnp.split(y + layer["bias"], 2, axis=-1)
    y = value * jax.nn.sigmoid(gate)
    return y, _add_stats(stats, y, inside[:, 1:-1], start, frames)


def _add_stats(stats: Stats, y: Array, inside: Array, start: Array, frames: Array) -> Stats:
    # Joins mean and squared deviations of what came before and of this chunk without subtracting
    # large numbers. Source: Chan, Golub and LeVeque (1979).
    bins = y.shape[2]
    mask = inside[:, :, None, None]
    here = (inside.sum(axis=1) * bins).astype(jnp.float32)[:, None]
    past = (jnp.minimum(start, frames) * bins).astype(jnp.float32)[:, None]
    mean = jnp.where(mask, y, 0).sum(axis=(1, 2)) / jnp.maximum(here, 1)
    squares = jnp.where(mask, jnp.square(y - mean[:, None, None]), 0).sum(axis=(1, 2))
    share = here / jnp.maximum(past + here, 1)
    apart = mean - stats["mean"]
    return {
        "mean": stats["mean"] + apart * share,
        "squares": stats["squares"] + squares + jnp.square(apart) * past * share,
    }


@functools.partial(jax.jit, static_argnames="bins")
def _norm(
    scale: Float[Array, "O"],
    shift: Float[Array, "O"],
    stats: Stats,
    frames: Int[Array, "R"],
    *,
    bins: int,
) -> Norm:
    count = jnp.maximum(frames.astype(jnp.float32) * bins, 1)[:, None]
    factor = scale / jnp.sqrt(stats["squares"] / count + _BATCH_NORM_EPS)
    return {"scale": factor, "shift": shift - stats["mean"] * factor}


@functools.partial(jax.jit, static_argnames="hop")
def _analyse(
    framed: Float[Array, "R samples"],
    gain: Float[Array, ""],
    power: Float[Array, "R"],
    new: Int[Array, "2"],
    start: Int[Array, ""],
    *,
    hop: int,
) -> tuple[Complex[Array, "R T bins"], Float[Array, "R T bins 1"], Float[Array, "R"]]:
    # The chunk's spectrum, its magnitudes at the reference level, and `power` plus the mean squared
    # magnitude of each frame in the range `new`.
    with jax.named_scope("watermark_spectrum"):
        spectrum = stft.spectrum(framed, hop=hop)
        carrier = jnp.abs(spectrum)
        index = start + jnp.arange(spectrum.shape[1])
        counted = (index >= new[0]) & (index < new[1])
        power = power + jnp.where(counted, jnp.square(carrier).mean(axis=-1), 0).sum(axis=-1)
        return spectrum, (carrier * gain)[..., None], power


@jax.jit
def _join(
    features: Float[Array, "R T bins 32"],
    norm: Norm,
    carrier: Float[Array, "R T bins 1"],
    message: Params,
    symbols: Int[Array, "R T"],
) -> Float[Array, "R T bins 34"]:
    # The marker's input: the encoder's features, the carrier, the message's spectrum.
    features = features * norm["scale"][:, None, None] + norm["shift"][:, None, None]
    spectrum = message["weight"].T[symbols] + message["bias"]
    above = carrier.shape[2] - spectrum.shape[2]
    spectrum = jnp.pad(spectrum, ((0, 0), (0, 0), (0, above)))[..., None]
    return jnp.concatenate([features, carrier, spectrum], axis=-1)


@functools.partial(jax.jit, static_argnames="band")
def _lower(
    mark: Float[Array, "R T bins 1"],
    norm: Norm,
    spectrum: Complex[Array, "R T bins"],
    past: Float[Array, "2"],
    power: Float[Array, "R"],
    *,
    band: int,
) -> Float[Array, "R T n_fft"]:
    # The chunk's frames with each bin lowered by the mark, of which every frame has the same power:
    # so far below the utterance's, which is `past`'s sum and `power` over `past`'s count of frames.
    with jax.named_scope("watermark_lower"):
        mark = jnp.abs(mark[..., 0] * norm["scale"][:, None] + norm["shift"][:, None])
        mark = jnp.where(jnp.arange(mark.shape[-1]) < band, mark, 0)
        own = jnp.sqrt(jnp.square(mark).mean(axis=-1, keepdims=True))
        level = jnp.sqrt((past[0] + power) / past[1]) / 10 ** (MESSAGE_SDR_DB / 20)
        mark = jnp.where(own == 0, 0, mark / own * level[:, None, None])
        magnitude = jnp.abs(spectrum)
        lowered = jnp.maximum(magnitude - mark, 0)
        return stft.frames_of(spectrum * jnp.where(magnitude > 0, lowered / magnitude, 0))


@functools.partial(jax.jit, static_argnames=("hop", "band"))
def _magnitudes(
    framed: Float[Array, "R samples"], *, hop: int, band: int
) -> Float[Array, "R T band 1"]:
    return jnp.abs(stft.spectrum(framed, hop=hop))[:, :, :band, None]


@jax.jit
def _score(
    channels: Float[Array, "R T band O"], norm: Norm, readout: Params
) -> Float[Array, "R T O"]:
    channels = channels * norm["scale"][:, None, None] + norm["shift"][:, None, None]
    scores = jnp.einsum("rtbo,b->rto", channels, readout["weight"], precision=_HIGHEST)
    return scores + readout["bias"]
