"""How far two recordings are apart in short-time spectra, and the log-mel features of frames.

For each resolution (a Hann window of so many samples, moved by a hop), with magnitudes in units of
amplitude: the spectral convergence |X - Y| / |Y| of the whole batch, the mean difference of the logarithms
of the magnitudes, and that of the logarithms of their mel bands. Phases are free.

Magnitudes have a floor of -80 dB of full scale: below it nothing is heard, and logarithms are steep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from csm_jax.array_typing import Array, Float

_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """A short-time spectrum.

    Attributes:
        window: Samples, a multiple of `hop`.
        hop: Samples from one window to the next.
        num_mels: Mel bands from 0 to half the sample rate.
    """

    window: int
    hop: int
    num_mels: int

    def __post_init__(self) -> None:
        if self.hop < 1 or self.window % self.hop:
            raise ValueError(f"window={self.window} must be a multiple of hop={self.hop}")


@dataclass(frozen=True, kw_only=True)
class SpectralLossConfig:
    """What counts.

    Attributes:
        sample_rate: Of the audio.
        resolutions: Averaged over.
        convergence_weight: Of the spectral convergence.
        log_weight: Of the mean difference of log magnitudes (nats).
        mel_weight: Of the mean difference of log mel bands (nats).
    """

    sample_rate: int
    resolutions: tuple[Resolution, ...]
    convergence_weight: float
    log_weight: float
    mel_weight: float


def spectral_loss(
    made: Float[Array, "B W"], wanted: Float[Array, "B W"], *, config: SpectralLossConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the weighted loss, and its parts unweighted: `convergence`, `log`, `mel`.

    Args:
        made: Audio whose gradient is wanted.
        wanted: Audio to be like.
        config: What counts.

    Raises:
        ValueError: The audio is shorter than a window.
    """
    parts = {"convergence": jnp.zeros(()), "log": jnp.zeros(()), "mel": jnp.zeros(())}
    for resolution in config.resolutions:
        x = magnitudes(made, window=resolution.window, hop=resolution.hop)
        y = magnitudes(wanted, window=resolution.window, hop=resolution.hop)
        bands = mel_bands(
            config.sample_rate, window=resolution.window, num_mels=resolution.num_mels
        )
        # The root's derivative is infinite at 0.
        parts["convergence"] += jnp.sqrt(
            (jnp.sum(jnp.square(x - y)) + _FLOOR**2) / jnp.sum(jnp.square(y))
        )
        parts["log"] += jnp.mean(jnp.abs(jnp.log(x) - jnp.log(y)))
        parts["mel"] += jnp.mean(jnp.abs(jnp.log(x @ bands) - jnp.log(y @ bands)))
    parts = {name: part / len(config.resolutions) for name, part in parts.items()}
    loss = (
        config.convergence_weight * parts["convergence"]
        + config.log_weight * parts["log"]
        + config.mel_weight * parts["mel"]
    )
    return loss, parts


def frame_log_mel(
    audio: Float[Array, "B W"],
    *,
    sample_rate: int,
    samples_per_frame: int,
    parts: int,
    num_mels: int,
) -> Float[Array, "B n PM"]:
    """Returns log10 mel bands of each frame, averaged over each of its `parts` equal parts.

    Each part is averaged over three windows of half its length.

    Args:
        audio: A multiple of `samples_per_frame`.
        sample_rate: Of the audio.
        samples_per_frame: A multiple of 4 · parts.
        parts: Parts of a frame.
        num_mels: Mel bands.
    """
    size = samples_per_frame // parts
    pieces = audio.reshape(-1, size)
    x = magnitudes(pieces, window=size // 2, hop=size // 4)
    bands = mel_bands(sample_rate, window=size // 2, num_mels=num_mels)
    means = jnp.mean(jnp.log10(x @ bands), axis=1)
    return means.reshape(audio.shape[0], -1, parts * num_mels)


def magnitudes(
    audio: Float[Array, "B W"], *, window: int, hop: int
) -> Float[Array, "B frames bins"]:
    """Returns the magnitudes of the windows that fit, so that a sine of amplitude 1 gives 1/2.

    Raises:
        ValueError: None fits.
    """
    if audio.shape[1] < window:
        raise ValueError(
            f"audio of {audio.shape[1]:,} samples is shorter than a window of {window:,}: take "
            "longer pieces or smaller windows"
        )
    overlap, hops = window // hop, audio.shape[1] // hop
    pieces = audio[:, : hops * hop].reshape(audio.shape[0], hops, hop)
    count = hops - overlap + 1
    frames = jnp.concatenate([pieces[:, i : i + count] for i in range(overlap)], axis=-1)
    shape = np.hanning(window + 1)[:-1]
    spectrum = jnp.fft.rfft(frames * jnp.asarray(shape / shape.sum(), frames.dtype))
    return jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + _FLOOR**2)


def mel_bands(sample_rate: int, *, window: int, num_mels: int) -> np.ndarray:
    """Returns weights float32 [window // 2 + 1, num_mels] of triangular mel bands, each adding up to 1.

    Mels are 2595 log10(1 + hertz / 700) (O'Shaughnessy 1987).

    Raises:
        ValueError: A band is so narrow that no frequency of this window lies in it.
    """

    def hertz(mels: np.ndarray) -> np.ndarray:
        return 700 * (10 ** (mels / 2595) - 1)

    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = hertz(np.linspace(0, top, num_mels + 2))
    bins = np.fft.rfftfreq(window, 1 / sample_rate)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bands = np.clip(
        np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)), 0, 1
    )
    empty = int((bands.sum(axis=0) == 0).sum())
    if empty:
        raise ValueError(
            f"{empty} of num_mels={num_mels} bands have no frequency of a window of {window} samples "
            f"at {sample_rate:,} Hz: take fewer bands"
        )
    return (bands / bands.sum(axis=0)).astype(np.float32)
