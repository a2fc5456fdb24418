"""A voice of trained vectors is worth those inputs before the text, everywhere a voice may be given."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.array_typing import Array
from csm_jax.generate import Prefix, generate_frames, init_state, insert
from csm_jax.long_text import speak_chunks
from csm_jax.model import CSM
from csm_jax.pipeline import Generator
from csm_jax.prompt import encode_text
from csm_jax.request import Request, row_settings
from csm_jax.slots import Frames, Slots, VoicePrompt
from csm_jax.synthesizer import Result, Synthesizer, redraw_seed
from csm_jax.synthesizer_async import AsyncSynthesizer
from csm_jax.text import Chunk
from csm_jax.voices import MODEL_KEY, Voice, model_hash, voice_prompt
from tests.support.engine import vectors
from tests.support.model import CAPACITY, params_of
from tests.support.synthesizer import (
    CONFIG,
    generator,
    make,
    plain_codec,
    prefix,
    request,
    settings,
    solo,
    tokenizer,
    voice,
)

PARAMS = params_of(CONFIG)
VECTORS = vectors(CONFIG, 16, seed=3)
TURNS = voice(1, frames=3).turns
TEXT = "Hello there."
FRAMES = 10


def made_of(vectors: np.ndarray, *, turns: bool = False) -> Voice:
    """Returns a voice of vectors, with turns after them or without."""
    return dataclasses.replace(
        prefix(0), vectors=vectors, turns=TURNS if turns else (), name=f"made-{turns}"
    )


VOICES = [made_of(VECTORS), made_of(VECTORS, turns=True)]


def asked(seed: int, voice: Voice | None, **changes: object) -> Request:
    return request(seed, frames=FRAMES, text=TEXT, voice=voice, **changes)


def frames_of(request: Request) -> tuple[Frames, Frames]:
    """Returns the frames of its voice's turns, and those of its text."""
    assert request.voice is not None
    return (
        voice_prompt(tokenizer(), request.voice, CONFIG),
        encode_text(tokenizer(), request.text, request.speaker, config=CONFIG),
    )


def model(call: Callable[[CSM], Array]) -> Array:
    """Returns what a call makes of the model's modules."""
    return jax.jit(lambda params: call(CSM.bind(CONFIG, params)))(PARAMS)


def embedded(frames: Frames) -> Array:
    """Returns the inputs of frames, [1, T, D]."""
    return model(
        lambda m: m.backbone.embed(jnp.asarray(frames[0])[None], jnp.asarray(frames[1])[None])
    )


def reference(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Returns hidden state and codes after vectors, turns and text in one prompt of inputs."""
    assert request.voice is not None
    assert request.voice.vectors is not None
    turns, text = frames_of(request)
    both = tuple(np.concatenate(parts) for parts in zip(turns, text, strict=True))
    x = jnp.concatenate([jnp.asarray(request.voice.vectors)[None], embedded(both)], axis=1)
    y, (keys, values) = model(lambda m: m.backbone.full(x))
    length = jnp.array([x.shape[1]], jnp.int32)
    state = insert(
        init_state(CONFIG, batch=1, capacity=CAPACITY, dtype=jnp.float32),
        Prefix(k=keys, v=values, length=length, hidden=y[:, -1]),
        row_settings([request], segments=[-1]),
        jnp.arange(1),
    )
    _, codes, valid = generate_frames(
        PARAMS, state, config=CONFIG, num_frames=FRAMES, window=CAPACITY, ranks=64
    )
    assert np.asarray(valid).all()
    return np.asarray(y[0, -1]), np.asarray(codes[0])


@pytest.mark.parametrize("spoken", VOICES, ids=["vectors", "vectors and turns"])
def test_scores_are_those_of_the_vectors_before_the_text(spoken: Voice) -> None:
    """Scores of the first code to 1e-5; they are of the order of 1."""
    turns, text = frames_of(asked(0, spoken))
    slots = Slots(CONFIG, PARAMS, settings().sizes)
    prompt = VoicePrompt(frames=turns[0], mask=turns[1], vectors=spoken.vectors)
    assert slots.share(prompt, 1)
    hidden = slots.prefill([text], [1]).hidden[:1]
    want, _ = reference(asked(0, spoken))
    got, expected = (
        np.asarray(model(lambda m, h=h: m.backbone.logits(h)))[0]
        for h in (hidden, jnp.asarray(want)[None])
    )
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spoken", VOICES, ids=["vectors", "vectors and turns"])
def test_codes_are_those_of_the_vectors_before_the_text(spoken: Voice) -> None:
    requests = [asked(seed, spoken, temperature=t) for seed, t in ((1, 0.0), (2, 0.9), (3, 1.2))]
    want = [reference(each)[1] for each in requests]
    shared = make()
    ways = {
        "alone": [result.codes for result in solo(requests)],
        "together": [each.codes for each in generator().generate_codes(requests)],
        "shared": [result.codes for _, result in sorted(of_run(shared, requests).items())],
    }
    for way, codes in ways.items():
        for one, other in zip(codes, want, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=way)
    without = solo([dataclasses.replace(requests[1], voice=None)])[0].codes
    assert (without != want[1]).any()
    other = made_of(vectors(CONFIG, 16, seed=4), turns=bool(spoken.turns))
    assert (solo([dataclasses.replace(requests[1], voice=other)])[0].codes != want[1]).any()


def of_run(synthesizer: Synthesizer, requests: list[Request]) -> dict[Hashable, Result]:
    """Returns the results by the requests' places."""
    return {result.id: result for result in synthesizer.run(enumerate(requests))}


def test_embedded_frames_are_worth_the_voice_they_are_of() -> None:
    """Bit for bit: the same inputs go through the same program."""
    recorded = dataclasses.replace(prefix(0), vectors=None, turns=TURNS, num_codebooks=0)
    inputs = embedded(voice_prompt(tokenizer(), recorded, CONFIG))
    trained = made_of(np.asarray(inputs)[0])
    assert trained.key != recorded.key
    slots = Slots(CONFIG, PARAMS, settings().sizes)
    frames, mask = voice_prompt(tokenizer(), recorded, CONFIG)
    assert slots.share(VoicePrompt(frames=frames, mask=mask), 0)
    empty = VoicePrompt(frames=frames[:0], mask=mask[:0], vectors=trained.vectors)
    assert slots.share(empty, 1)
    shared = slots._shared
    assert shared is not None
    assert shared.length.tolist() == [len(frames), len(frames)]
    for leaf in (*shared.k, *shared.v):
        np.testing.assert_array_equal(np.asarray(leaf[0]), np.asarray(leaf[1]))
    requests = [asked(seed, each) for seed in range(6) for each in (recorded, trained)]
    results = of_run(make(), requests)
    for n in range(0, len(requests), 2):
        np.testing.assert_array_equal(results[n].codes, results[n + 1].codes)
        assert len(results[n].codes) == FRAMES


# --- every way to ask ---------------------------------------------------------------------------


def test_rows_with_and_without_equal_single_runs() -> None:
    """In a generator, whose segment holds one voice at a time."""
    voices = [None, VOICES[0], voice(1), prefix(1), None, VOICES[1], prefix(1), VOICES[0]]
    requests = [asked(seed, each) for seed, each in enumerate(voices)]
    together = generator().generate_codes(requests, batch_size=3)
    for one, many in zip(solo(requests), together, strict=True):
        np.testing.assert_array_equal(many.codes, one.codes)


def test_a_stream_and_an_event_loop() -> None:
    one = asked(5, VOICES[0])
    [audio] = generator().generate_batch([one])
    options = {"voice": VOICES[0], "seed": 5, "max_audio_length_ms": 80.0 * FRAMES}
    pieces = generator().stream(TEXT, 0, chunk_frames=3, **options)  # pyright: ignore
    np.testing.assert_array_equal(np.concatenate(list(pieces)), audio)
    np.testing.assert_array_equal(generator().generate(TEXT, 0, **options), audio)  # pyright: ignore

    async def main() -> np.ndarray | None:
        async with AsyncSynthesizer(make()) as shared:
            return (await shared.generate(one)).audio

    np.testing.assert_array_equal(asyncio.run(main()), audio)


def test_what_is_drawn_again_keeps_its_voice() -> None:
    one = request(5, frames=None, voice=VOICES[0])
    [result] = of_run(make(redraws=1), [one]).values()
    assert result.redraws == 1
    [want] = solo([dataclasses.replace(one, seed=redraw_seed(5, 1))])
    np.testing.assert_array_equal(result.codes, want.codes)


def test_more_voices_than_segments() -> None:
    voices = [prefix(n, count=3 + n) for n in range(5)] + [voice(1)]
    requests = [asked(seed, voices[seed % 6]) for seed in range(18)]
    results = of_run(make(), requests)
    for n, one in enumerate(solo(requests)):
        np.testing.assert_array_equal(results[n].codes, one.codes)


def generator_of(params: object) -> Generator:
    return Generator(
        config=CONFIG,
        params=params,  # pyright: ignore
        tokenizer=tokenizer(),
        codec=plain_codec(),
        watermarker=None,
        watermark_key=(1, 2, 3, 4, 5),
    )


def test_a_long_text_and_the_room_for_it() -> None:
    requests = [asked(1, None), asked(1, VOICES[0]), asked(1, VOICES[1])]
    plain, trained, both = generator().prompt_lengths(requests)
    turns = frames_of(requests[2])[0][0]
    assert (trained - plain, both - plain) == (16, 16 + len(turns))
    chunks = [Chunk(TEXT, 0), Chunk(TEXT, 100)]
    options = {"voice": VOICES[0], "seed": 5, "max_audio_length_ms": 80.0 * FRAMES}
    spoken = list(speak_chunks(generator(), chunks, 0, **options))  # pyright: ignore
    np.testing.assert_array_equal(spoken[0].codes, solo([asked(5, VOICES[0])])[0].codes)
    assert len(spoken) == 2


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"voice_capacity": 15}, "takes 16 positions, but shared segments hold 15"),
        ({"voice_segments": 0, "voice_capacity": 0}, "make voice_segments at least 1"),
    ],
)
def test_a_synthesizer_without_room_refuses(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**sizes).submit(asked(1, VOICES[0]))


def test_vectors_of_another_model_are_refused_or_noted(caplog: pytest.LogCaptureFixture) -> None:
    wide = made_of(np.zeros((16, VECTORS.shape[1] + 1), np.float32))
    with pytest.raises(ValueError, match=r"made-False.*: its vectors have 129 .* embed_dim is 128"):
        generator().generate_codes([asked(1, wide)])
    narrow = dataclasses.replace(prefix(9), num_codebooks=3)
    with pytest.raises(ValueError, match=r"prefix-9.*3 codebooks of 256 codes, but the model has"):
        generator().generate_codes([asked(1, narrow)])
    mine = model_hash(PARAMS)
    assert mine is not None
    for hash, noted in ((mine, False), ("0" * 32, True)):
        caplog.clear()
        provenance = {**VOICES[0].provenance, MODEL_KEY: hash}
        told = dataclasses.replace(VOICES[0], provenance=provenance)
        with caplog.at_level(logging.WARNING, "csm_jax"):
            fresh = generator_of(PARAMS)
            fresh.prompt_lengths([asked(1, told), asked(2, told)])
        assert caplog.text.count("'made-False' was trained for another model") == noted
        assert (mine in caplog.text) == noted
