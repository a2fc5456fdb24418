"""A model directory like any other, with random weights: what the tests of commands and examples use.

Every file has its published name and form: a Sesame-layout checkpoint goes through the converter, Mimi
and the watermark's networks are thin or random, the tokenizer is small. Random weights make noise.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from csm_jax.config import SAMPLE_RATE, CSMConfig, csm_1b, tiny
from tests.support.torch_file import write_torch_file

PROMPTS = (
    ("conversational_a", "Ah, oh, ee; that is all a vowel can say.", 115.0),
    ("conversational_b", "Oh, ah, ee, and I say it a little higher.", 205.0),
)
"""Name, transcript and pitch (hertz) of the recordings in `prompts/`."""

# First three formants of three vowels in hertz (Peterson & Barney 1952, averages of men).
_VOWELS = ((730, 1090, 2440), (570, 840, 2410), (270, 2290, 3010))


def config() -> CSMConfig:
    """Returns the tiny sizes with CSM-1B's audio vocabulary, so that any Mimi fits."""
    return dataclasses.replace(
        tiny(),
        audio_vocab_size=csm_1b().audio_vocab_size,
        codebook_size=csm_1b().codebook_size,
    )


def vowels(*, pitch: float, seconds: float = 2.4, seed: int = 0) -> np.ndarray:
    """Returns synthetic speech (float32 [W] at 24 kHz): three vowels with vibrato and a little breath."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    # The voice: harmonics of a wavering pitch, weighted by the vowel's resonances.
    phase = 2 * np.pi * pitch * (time + 0.002 * np.sin(2 * np.pi * 5 * time))
    part = np.minimum((time / seconds * len(_VOWELS)).astype(int), len(_VOWELS) - 1)
    formants = np.array(_VOWELS, float)[part]
    audio = np.zeros_like(time)
    for harmonic in range(1, int(4_000 / pitch)):
        hertz = harmonic * pitch
        gain = (1 / (1 + ((hertz - formants) / 90.0) ** 2)).sum(axis=1) / harmonic**0.5
        audio += gain * np.sin(harmonic * phase)
    # One swell per vowel, silent between them.
    swell = np.sin(np.pi * (time / seconds * len(_VOWELS) % 1.0)) ** 0.5
    audio = swell * (audio / np.abs(audio).max() + 0.01 * rng.standard_normal(len(time)))
    return (0.5 * audio / np.abs(audio).max()).astype(np.float32)


def _write_mimi(path: Path, sizes: CSMConfig, *, seed: int) -> None:
    import jax

    from csm_jax.mimi.codec import JaxMimi
    from csm_jax.mimi.config import tiny_mimi
    from csm_jax.mimi.params import init_params
    from csm_jax.weights.mimi import save_mimi

    config = dataclasses.replace(tiny_mimi(), codebook_size=sizes.codebook_size)
    params = init_params(config, jax.random.key(seed))
    # Random biases give a hum with an offset, whatever the codes are; without them the codes are heard.
    params["decoder"] = jax.tree_util.tree_map_with_path(
        lambda where, leaf: 0 * leaf if where[-1].key == "bias" else leaf, params["decoder"]
    )
    rng = np.random.default_rng(0)
    codes = rng.integers(0, sizes.codebook_size, (25, config.num_codebooks), np.int32)
    level = float(JaxMimi(config, params).decode(codes).std())
    params["decoder"]["conv_out"]["weight"] *= 0.1 / level
    save_mimi(path, config, params, layout="moshi")


_WATERMARK = """\
SR: 44100
N_FFT: 4096
HOP_LENGTH: 2048
message_band_size: 1024
message_dim: 5
message_len: 21
message_sdr: 47
n_messages: 1
model_type: n_message
enc_n_layers: 3
dec_c_n_layers: 4
ensure_negative_message: true
ensure_constrained_message: false
utterance_level_normalization: true
frame_level_normalization: false
no_normalization: false
"""
"""The published settings of silentcipher's 44.1 kHz model."""


def _write_watermark(directory: Path, *, seed: int) -> None:
    # (inputs, outputs, kernel) of the gated convolutions of each published network, and its linear.
    networks = {
        "enc_c": ([(1, 32, 3), (32, 32, 3), (32, 32, 3)], 1, (1024, 5)),
        "dec_c": ([(96, 96, 3), (96, 96, 3), (96, 96, 3), (96, 1, 1)], 1, None),
        "dec_m_0": ([(1, 128, 3), *[(128, 128, 3)] * 8, (128, 5, 3)], 2, (1, 1024)),
    }
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        bound = np.prod(shape[1:]) ** -0.5
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    directory.mkdir(parents=True)
    (directory / "hparams.yaml").write_text(_WATERMARK, encoding="utf-8")
    for name, (layers, step, linear) in networks.items():
        tensors = {}
        for i, (inputs, outputs, kernel) in enumerate(layers):
            # The message decoder has a drop-out before every layer.
            layer = f"module.main.{i * step + step - 1}"
            for part in ("conv", "gate"):
                tensors[f"{layer}.{part}.weight"] = random(outputs, inputs, kernel, kernel)
                tensors[f"{layer}.{part}.bias"] = random(outputs) * 0.1
            tensors[f"{layer}.bn.weight"] = rng.normal(0.5, 0.3, outputs)
            tensors[f"{layer}.bn.bias"] = rng.normal(0.5, 0.3, outputs)
        if linear is not None:
            tensors["module.linear.weight"] = random(*linear)
            tensors["module.linear.bias"] = random(linear[0]) * 0.1
        write_torch_file(directory / f"{name}.ckpt", tensors)


def build(path: Path, *, seed: int = 0, note: Callable[[str], None] | None = None) -> Path:
    """Returns `path` after building the model directory there, replacing what was there.

    Args:
        path: The directory.
        seed: Of all random weights.
        note: Called with a line about each step.
    """
    import jax
    import jax.numpy as jnp

    from csm_jax import cli, weights
    from csm_jax.audio import write_audio
    from csm_jax.model import init_params
    from tests.support import tokenizer

    say = note or (lambda line: None)
    shutil.rmtree(path, ignore_errors=True)
    source = path / "sesame-layout"
    source.mkdir(parents=True)

    sizes = config()
    params = init_params(sizes, jax.random.key(seed), dtype=jnp.float32)
    weights.save_checkpoint(source, sizes, params, layout="sesame")
    say(f"random weights in Sesame's layout: {source / 'model.safetensors'}")

    # The command itself, as a user would run it.
    command = ["convert", str(source), str(path), "--from", "sesame", "--to", "transformers"]
    if cli.main(command):
        raise RuntimeError(f"csm-jax {' '.join(command)} failed")
    shutil.rmtree(source)
    say(f"converted to transformers' layout: {path}")

    tokenizer.write_tokenizer(path / "tokenizer.json", vocab_size=sizes.text_vocab_size)
    _write_mimi(path / "tokenizer-e351c8d8-checkpoint125.safetensors", sizes, seed=seed)
    _write_watermark(path / "silentcipher" / "44_1_khz" / "73999_iteration", seed=seed)
    (path / "prompts").mkdir()
    for name, transcript, pitch in PROMPTS:
        write_audio(path / "prompts" / f"{name}.wav", vowels(pitch=pitch), SAMPLE_RATE)
        (path / "prompts" / f"{name}.txt").write_text(transcript + "\n", encoding="utf-8")
    say("tokenizer, Mimi, watermark networks and two synthetic voices beside it")
    return path
