"""Training a Mimi: that it computes what runs, that everything learns, and what the codebooks do."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.mimi import model, training, whole
from csm_jax.mimi.codebooks import (
    PARTS,
    kmeans,
    perplexity,
    quantise,
    start_codebooks,
    update_codebooks,
)
from csm_jax.mimi.codec import JaxMimi
from csm_jax.mimi.config import MimiConfig
from csm_jax.mimi.params import init_params
from csm_jax.mimi.spectral_loss import (
    frame_log_mel,
    magnitudes,
    mel_bands,
    spectral_loss,
)
from csm_jax.weights.mimi import load_mimi, save_mimi
from tests.support.mimi_training import FRAMES, ROWS, config, small, spectral

RATE = 24_000


def odd() -> MimiConfig:
    """Returns kernels, strides and dilations unlike Mimi's."""
    return dataclasses.replace(
        small(),
        frame_rate=1_000.0,
        num_filters=6,
        ratios=(4, 3),
        num_residual_layers=2,
        dilation_growth=3,
        compress=3,
        kernel_size=5,
        residual_kernel_size=2,
        last_kernel_size=4,
        num_layers=2,
    )


def tone(rows: int, frames: int) -> np.ndarray:
    """Returns int16 [rows, frames · 480]: gliding harmonics and a little noise."""
    rng = np.random.default_rng(0)
    time = np.arange(frames * small().samples_per_frame) / RATE
    pitch = rng.uniform(90, 200, (rows, 1)) * (1 + 0.3 * np.sin(2 * np.pi * 3 * time))
    phase = 2 * np.pi * np.cumsum(pitch, axis=1) / RATE
    audio = sum(np.sin(k * phase) / k for k in range(1, 12))
    audio = audio + 0.02 * rng.standard_normal(phase.shape)
    return (audio / np.abs(audio).max() * 0.6 * 32_767).astype(np.int16)


def batch() -> jax.Array:
    """Returns 80 frames in four rows, the batch of every test."""
    return jnp.asarray(tone(ROWS, FRAMES))


encode = jax.jit(whole.encode_features, static_argnames="config")
decode = jax.jit(whole.decode_features, static_argnames="config")


# --- the whole form and the streaming one ---------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [pytest.param(small(), marks=pytest.mark.slow), odd()], ids=["small", "odd"]
)
def test_whole_utterances_have_the_features_and_the_audio_of_the_streaming_functions(sizes):
    params = init_params(sizes, jax.random.key(0))
    ready = model.prepare(params, num_codebooks=sizes.num_codebooks, config=sizes)
    frames = 9  # more positions than the attention sees
    audio = jax.random.normal(jax.random.key(1), (2, frames * sizes.samples_per_frame)) * 0.3
    counts = jnp.full(2, frames, jnp.int32)
    state = model.init_encode_state(sizes, batch=2)
    wanted, _ = model.encode_features(ready, state, audio, counts, config=sizes)
    found = encode(params, audio, config=sizes)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))

    codes = jax.random.randint(
        jax.random.key(2), (2, frames, sizes.num_codebooks), 0, sizes.codebook_size
    )
    state = model.init_decode_state(sizes, batch=2)
    wanted, _ = model.decode_frames(ready, state, codes, counts, config=sizes)
    features = model.quantizer.decode(ready["quantizer"], codes)
    found = decode(params, features, config=sizes)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 1, 4), (6, 3, 1), (2, 1, 30)]
)
@pytest.mark.parametrize("out", [2, 5])
def test_convolutions_are_the_plain_ones(kernel, stride, dilation, out):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 24, 3))
    layer = {
        "weight": jax.random.normal(keys[1], (out, kernel, 3)),
        "bias": jax.random.normal(keys[2], (out,)),
    }
    past = jnp.zeros((2, (kernel - 1) * dilation + 1 - stride, 3))
    wanted, _ = model.conv.convolve(
        x, past, jnp.full(2, 24), **layer, stride=stride, dilation=dilation
    )
    found = whole._convolve(x, layer, stride=stride, dilation=dilation)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


# --- spectra --------------------------------------------------------------------------------------


def test_the_spectral_loss_of_equal_audio_is_nothing_and_grows_with_the_difference():
    audio = training.as_float(batch())
    noise = jax.random.normal(jax.random.key(0), audio.shape)
    losses = [
        float(spectral_loss(audio + level * noise, audio, config=spectral())[0])
        for level in (0.0, 0.001, 0.01, 0.1)
    ]
    assert losses[0] < 1e-4
    assert losses == sorted(losses)
    assert losses[1] > 0.05


def test_every_part_of_the_spectral_loss_counts_by_its_weight():
    audio = training.as_float(batch())
    total, parts = spectral_loss(0.5 * audio, audio, config=spectral())
    wanted = parts["convergence"] + 0.5 * parts["log"] + 1.5 * parts["mel"]
    assert float(total) == pytest.approx(float(wanted), rel=1e-6)
    # Half the amplitude: half the spectrum is missing, and magnitudes well over the floor are ln 2 off.
    assert float(parts["convergence"]) == pytest.approx(0.5, abs=1e-3)
    assert 0.5 < float(parts["mel"]) < np.log(2) + 1e-3


def test_silence_has_a_loss_and_a_gradient():
    audio = jnp.zeros((1, 1920))
    value, gradient = jax.value_and_grad(
        lambda made: spectral_loss(made, audio, config=spectral())[0]
    )(audio)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_magnitudes_are_those_of_numpy():
    audio = np.random.default_rng(0).normal(0, 0.1, (1, 2000)).astype(np.float32)
    found = magnitudes(jnp.asarray(audio), window=240, hop=60)
    window = np.hanning(241)[:-1]
    frames = np.stack([audio[0, i : i + 240] for i in range(0, 2000 - 240 + 1, 60)])
    wanted = np.abs(np.fft.rfft(frames * window / window.sum()))
    assert found.shape == (1, *wanted.shape)
    np.testing.assert_allclose(found[0], np.hypot(wanted, 1e-4), rtol=0, atol=1e-6)


def test_audio_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"500 samples is shorter than a window of 512"):
        spectral_loss(jnp.zeros((1, 500)), jnp.zeros((1, 500)), config=spectral())


def test_mel_bands_cover_the_spectrum_and_too_many_are_refused():
    bands = mel_bands(RATE, window=512, num_mels=40)
    assert bands.shape == (257, 40)
    np.testing.assert_allclose(bands.sum(axis=0), 1, rtol=1e-6)
    assert (bands[1:-1].sum(axis=1) > 0).all()
    assert (np.diff(bands.argmax(axis=0)) > 0).all()
    with pytest.raises(ValueError, match="num_mels=100 bands have no frequency"):
        mel_bands(RATE, window=240, num_mels=100)


def test_the_log_mel_of_a_frame_tells_its_halves_apart():
    audio = np.zeros((1, 3840), np.float32)
    audio[0, 960:1920] = np.sin(2 * np.pi * 1000 * np.arange(960) / RATE)
    found = frame_log_mel(
        jnp.asarray(audio), sample_rate=RATE, samples_per_frame=1920, parts=2, num_mels=20
    )
    assert found.shape == (1, 2, 40)
    assert float(found[0, 0, 20:].max()) > -1.5
    quiet = jnp.concatenate([found[0, 0, :20], found[0, 1]])
    np.testing.assert_allclose(quiet, -4, atol=1e-3)


# --- the quantizer --------------------------------------------------------------------------------


@functools.cache
def started() -> training.TrainState:
    """Returns a state whose codebooks are started; do not pass it to a step, which takes it."""
    state = training.init_state(config(), jax.random.key(0))
    return training.with_codebooks(
        state, [batch()], jax.random.key(1), iterations=5, config=config()
    )


def test_until_its_codebooks_are_started_the_quantizer_lets_everything_through():
    state = training.init_state(config(), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 3, 16))
    parts = state.weights["quantizer"]
    found = quantise(parts, state.codebooks, x)
    wanted = sum(x @ parts[part]["input_proj"].T @ parts[part]["output_proj"].T for part in PARTS)
    np.testing.assert_allclose(found.features, wanted, rtol=0, atol=1e-5)
    assert float(found.commitment) == 0


def test_the_quantizer_in_training_is_the_one_that_runs():
    state = started()
    sizes = config().mimi
    ready = model.prepare(
        training.mimi_params(state), num_codebooks=sizes.num_codebooks, config=sizes
    )["quantizer"]
    x = encode(state.weights, training.as_float(batch()), config=sizes)
    found = quantise(state.weights["quantizer"], state.codebooks, x)
    codes = jnp.concatenate([found.codes[part] for part in PARTS], axis=-1)
    np.testing.assert_array_equal(codes, model.quantizer.encode(ready, x))
    np.testing.assert_allclose(
        found.features, model.quantizer.decode(ready, codes), rtol=0, atol=1e-5
    )
    # What each codebook had to quantise is what the ones before left over.
    table = ready["acoustic"]["table"]
    left = found.vectors["acoustic"]
    for book in range(2):
        chosen = table[book][found.codes["acoustic"][..., book]]
        np.testing.assert_allclose(left[:, :, book + 1], left[:, :, book] - chosen, atol=1e-5)
    errors = [
        jnp.square(left[:, :, book] - table[book][found.codes["acoustic"][..., book]]).mean()
        for book in range(3)
    ]
    semantic = ready["semantic"]["table"][0][found.codes["semantic"][..., 0]]
    errors.append(jnp.square(found.vectors["semantic"][:, :, 0] - semantic).mean())
    assert float(found.commitment) == pytest.approx(float(sum(errors)) / 4, rel=1e-4)


def test_gradients_pass_the_quantizer_and_reach_everything_but_the_codebooks():
    state = started()

    @jax.jit
    def gradient(weights, codebooks, audio):
        def loss(weights, codebooks):
            return training.loss(weights, codebooks, audio, config=config())[0]

        return jax.grad(loss, argnums=(0, 1))(weights, codebooks)

    weights, codebooks = gradient(state.weights, state.codebooks, training.as_float(batch()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)
    assert not any(leaf.any() for leaf in jax.tree.leaves(codebooks))


def test_a_reconstruction_moves_the_encoder_as_if_the_quantizer_were_not_there():
    state = started()
    x = jax.random.normal(jax.random.key(2), (1, 3, 16))
    pull = jax.random.normal(jax.random.key(3), x.shape)
    parts = state.weights["quantizer"]

    def out(x):
        return jnp.sum(quantise(parts, state.codebooks, x).features * pull)

    wanted = sum(pull @ parts[part]["output_proj"] @ parts[part]["input_proj"] for part in PARTS)
    np.testing.assert_allclose(jax.grad(out)(x), wanted, rtol=0, atol=1e-5)


def test_codebooks_are_running_sums_of_what_chose_them():
    rng = np.random.default_rng(0)
    books = {
        "embedding_sum": rng.normal(size=(2, 4, 3)).astype(np.float32),
        "cluster_usage": rng.uniform(1, 2, (2, 4)).astype(np.float32),
        "initialized": np.ones((2, 1), np.float32),
    }
    vectors = rng.normal(size=(10, 2, 3)).astype(np.float32)
    codes = rng.integers(0, 4, (10, 2)).astype(np.int32)
    found = update_codebooks(
        jax.tree.map(jnp.asarray, books),
        jnp.asarray(vectors),
        jnp.asarray(codes),
        jax.random.key(0),
        decay=0.9,
        least_usage=0.0,
    )
    usage, total = 0.9 * books["cluster_usage"], 0.9 * books["embedding_sum"]
    for vector, code in zip(vectors, codes, strict=True):
        for book in range(2):
            usage[book, code[book]] += 0.1
            total[book, code[book]] += 0.1 * vector[book]
    np.testing.assert_allclose(found["cluster_usage"], usage, rtol=1e-5)
    np.testing.assert_allclose(found["embedding_sum"], total, rtol=0, atol=1e-5)


def test_codes_that_nothing_chooses_are_put_where_vectors_are():
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(20, 1, 3)), jnp.float32)
    books = {
        "embedding_sum": jnp.full((1, 4, 3), 50.0) * jnp.asarray([1, 1, 0.01, 1])[:, None],
        "cluster_usage": jnp.asarray([[5.0, 5.0, 0.05, 5.0]]),
        "initialized": jnp.ones((1, 1)),
    }
    codes = jnp.asarray(np.resize([0, 1, 3], (20, 1)), jnp.int32)
    found = update_codebooks(books, vectors, codes, jax.random.key(0), decay=0.9, least_usage=0.1)
    table = found["embedding_sum"] / found["cluster_usage"][..., None]
    apart = jnp.abs(table[0, 2] - vectors[:, 0]).max(axis=-1)
    assert float(apart.min()) < 1e-5
    assert float(found["cluster_usage"][0, 2]) > 1  # and is left time to be chosen
    assert float(table[0, [0, 1, 3]].min()) > 5  # the others stay where they are


def test_kmeans_lowers_the_error_with_every_mean():
    x = np.random.default_rng(0).uniform(-1, 1, (400, 2)).astype(np.float32)

    def error(means: np.ndarray) -> float:
        return float(np.square(x[:, None] - np.asarray(means)).sum(-1).min(1).mean())

    errors = [error(x[np.random.default_rng(1).choice(400, 16, replace=False)])]
    for iterations in (1, 3, 20):
        means, counts = kmeans(jnp.asarray(x), jax.random.key(0), size=16, iterations=iterations)
        assert float(counts.sum()) == 400
        errors.append(error(means))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_codebooks_start_among_the_encoders_vectors():
    state, sizes = started(), config().mimi
    x = encode(state.weights, training.as_float(batch()), config=sizes)
    found = quantise(state.weights["quantizer"], state.codebooks, x)
    for part in PARTS:
        left = found.vectors[part]
        energy = jnp.square(left).mean(axis=(0, 1, 3))
        # Each codebook leaves less than it was given.
        assert (np.diff(energy) < 0).all()
        usage = state.codebooks[part]["cluster_usage"].sum(axis=1)
        assert ((usage >= 80) & (usage < 80 + 32)).all()  # an empty cluster counts as one
    assert float(found.commitment) < 0.2 * float(
        jnp.square(found.vectors["acoustic"][:, :, 0]).mean()
    )


def test_too_few_frames_to_start_from_are_refused():
    state = training.init_state(config(), jax.random.key(0))
    with pytest.raises(ValueError, match="20 features are too few for codebooks of 32 codes"):
        start_codebooks(
            state.weights["quantizer"],
            state.codebooks,
            jnp.zeros((20, 16)),
            jax.random.key(1),
            frames=20,
            iterations=2,
        )


def test_perplexity_is_the_number_of_codes_in_even_use():
    usage = jnp.asarray([[1.0, 1, 1, 1], [5, 5, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(perplexity(usage), [4, 2, 1], rtol=1e-5)


# --- the step -------------------------------------------------------------------------------------


@functools.cache
def step() -> training.Step:
    return training.make_step(config())


@functools.cache
def trained() -> tuple[training.TrainState, list[dict[str, np.ndarray]]]:
    """Returns a state after learning one batch by heart, and the metrics of each step."""
    state = training.init_state(config(), jax.random.key(0))
    audio = batch()
    found = []
    for number in range(80):
        if number == 20:
            state = training.with_codebooks(
                state, [audio], jax.random.key(1), iterations=5, config=config()
            )
        state, metrics = step()(state, audio, jnp.float32(1), jax.random.key(number))
        found.append(jax.device_get(metrics))
    return state, found


def test_a_batch_is_learned_by_heart():
    state, metrics = trained()
    assert int(state.step) == 80
    first, last = metrics[0], metrics[-1]
    assert last["mel"] < 0.5 * first["mel"]
    assert last["semantic"] < 0.5 * first["semantic"]
    assert last["loss"] < 0.6 * first["loss"]
    # The codebooks move once they are started, not before.
    assert metrics[19]["perplexity"].max() == 1
    assert metrics[-1]["perplexity"].min() > 8


def test_a_rate_of_nothing_moves_no_weight():
    state = training.init_state(config(), jax.random.key(0))
    before = jax.tree.map(np.array, state.weights)
    state, _ = step()(state, batch(), jnp.float32(0), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, before, state.weights)


def test_matrices_move_by_muon_and_the_rest_by_adamw():
    weights = training.init_state(config(), jax.random.key(0)).weights
    by_adamw = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, rule in jax.tree_util.tree_leaves_with_path(
            training._matrices(weights),
            is_leaf=lambda rule: rule is None or hasattr(rule, "output_axis"),
        )
        if rule is None
    }
    matrices = {name for name in by_adamw if not name.endswith(("bias", "scale"))}
    assert matrices == {
        "encoder.conv_in.weight",
        "decoder.conv_out.weight",
        "upsample.weight",
        "head",
    }


def test_the_saved_codec_has_the_codes_and_the_audio_of_training(tmp_path):
    state, _ = trained()
    path = tmp_path / "codec.safetensors"
    save_mimi(path, config().mimi, training.mimi_params(state), layout="moshi")
    sizes, params = load_mimi(path)
    assert sizes == config().mimi
    codec = JaxMimi(sizes, params)
    audio = training.as_float(batch())
    reconstruct = jax.jit(training.reconstruct, static_argnames="config")
    made, codes = reconstruct(state, audio, config=sizes)
    found = codec.encode(np.asarray(audio[0]))
    np.testing.assert_array_equal(found, codes[0])
    assert len(np.unique(found)) > 10
    np.testing.assert_allclose(codec.decode(found), made[0], rtol=0, atol=1e-4)
