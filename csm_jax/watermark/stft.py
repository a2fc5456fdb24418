"""Samples to spectra and back, as torch's STFT with a Hann window does it for silentcipher.

Frame t is centred on sample t · hop; a frame is two hops long. Here `framed` audio is what the frames
are cut from: n frames need (n + 1) · hop samples, half a frame before the first centre and half a
frame after the last. Cutting and joining is done piecewise in `network`, in numpy here only where
whole utterances are meant.

    framed [(T+1)·hop] -> overlapping frames [T, n_fft] -> window, rfft -> spectrum [T, bins]
    spectrum -> irfft, window -> frames [T, n_fft] -> overlap-add -> samples [(T-1)·hop]

Sources: PyTorch `torch.stft` and `istft` (centre, reflection, division by the squared windows'
sum), sony/silentcipher `stft.py` (zeros up to whole frames).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex

from csm_jax.array_typing import Array, Float


@functools.lru_cache(maxsize=4)
def window(n_fft: int) -> np.ndarray:
    """Returns the periodic Hann window, float32 [n_fft]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)


def fill(samples: np.ndarray, n_fft: int) -> np.ndarray:
    """Returns `samples` [W] followed by the 1..n_fft zeros that silentcipher ends audio with."""
    return np.pad(samples, (0, n_fft - samples.size % n_fft))


def mirror(samples: np.ndarray, hop: int, *, start: bool, end: bool) -> np.ndarray:
    """Returns `samples` [W] with the hop beyond the chosen ends mirrored from inside."""
    return np.pad(samples, (hop * start, hop * end), mode="reflect")


def spectrum(framed: Float[Array, "R samples"], *, hop: int) -> Complex[Array, "R T bins"]:
    """Returns the spectra of the frames that `framed` audio, (T + 1) · hop samples, consists of."""
    hops = framed.reshape(framed.shape[0], -1, hop)
    frames = jnp.concatenate([hops[:, :-1], hops[:, 1:]], axis=-1)
    return jnp.fft.rfft(frames * window(2 * hop))


def frames_of(spectra: Complex[Array, "R T bins"]) -> Float[Array, "R T n_fft"]:
    """Returns the windowed frames that `overlap_add` joins."""
    n_fft = 2 * (spectra.shape[-1] - 1)
    return jnp.fft.irfft(spectra, n=n_fft) * window(n_fft)


def overlap_add(frames: np.ndarray) -> np.ndarray:
    """Returns the samples between the first and the last frame's centre: [(T - 1) · hop]."""
    hop = frames.shape[1] // 2
    squared = np.square(window(2 * hop))
    joined = frames[:-1, hop:] + frames[1:, :hop]
    return (joined / (squared[hop:] + squared[:hop])).reshape(-1)
