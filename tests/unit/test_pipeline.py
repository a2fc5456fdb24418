"""Generator: batches, streams, ends and failures, with a codec that shows its codes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from csm_jax.array_typing import Params
from csm_jax.config import CSMConfig
from csm_jax.model import param_shardings
from csm_jax.pipeline import (
    GenerationError,
    Generator,
    Request,
    Segment,
    enable_compilation_cache,
    load_csm_1b,
)
from csm_jax.prompt import TextTokenizer
from csm_jax.slots import Slots
from csm_jax.weights.mimi import load_mimi, save_mimi
from tests.support.codec import PlainCodec
from tests.support.engine import sizes
from tests.support.model import params_of, short_config
from tests.support.tokenizer import write_tokenizer

CONFIG = short_config()
SAMPLES = 1920


class Marker:
    """Adds 1 to every sample, and holds one frame back in a stream."""

    def embed_batch(
        self, audios: Sequence[np.ndarray], sample_rate: int, key: Any
    ) -> list[np.ndarray]:
        assert sample_rate == 24_000
        assert tuple(key) == (1, 2, 3, 4, 5)
        return [audio + 1 for audio in audios]

    def open_stream(self, sample_rate: int, key: Any) -> Marker:
        self.held = np.zeros(0, np.float32)
        return self

    def push(self, audio: np.ndarray) -> np.ndarray:
        both = np.concatenate([self.held, audio + 1])
        self.held = both[-SAMPLES:]
        return both[:-SAMPLES]

    def flush(self) -> np.ndarray:
        rest, self.held = self.held, np.zeros(0, np.float32)
        return rest

    def verify(self, audio: np.ndarray, sample_rate: int, key: Any) -> bool:
        return bool((audio >= 1).all())

    def detect(self, audio: np.ndarray, sample_rate: int) -> tuple[int, ...] | None:
        return None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path, vocab_size=CONFIG.text_vocab_size)
    return TextTokenizer.from_file(path)


def make(
    tokenizer: TextTokenizer,
    params: Params,
    *,
    marked: bool = False,
    config: CSMConfig = CONFIG,
) -> Generator:
    return Generator(
        config=config,
        params=params,
        tokenizer=tokenizer,
        codec=PlainCodec(num_codebooks=CONFIG.num_codebooks, codebook_size=CONFIG.codebook_size),
        watermarker=Marker() if marked else None,
        watermark_key=(1, 2, 3, 4, 5),
    )


@pytest.fixture(scope="module")
def generator(tokenizer: TextTokenizer) -> Generator:
    return make(tokenizer, params_of(CONFIG))


CONTEXT = [Segment(speaker=1, text="Before.", audio=np.ones(3 * SAMPLES, np.float32) / 2)]
REQUESTS = [
    Request(text="One.", speaker=0, seed=1, max_audio_length_ms=800),
    Request(text="Two, longer.", speaker=1, seed=2, max_audio_length_ms=400, context=CONTEXT),
    Request(text="Three", speaker=0, seed=3, max_audio_length_ms=960, temperature=0.5, topk=3),
    Request(text="Four", speaker=0, seed=4, max_audio_length_ms=160, decoder_temperature=0.0),
    Request(text="Five", speaker=2, seed=5, max_audio_length_ms=480, top_p=0.8),
]


def test_a_batch_equals_single_runs_in_groups_of_any_size(generator: Generator) -> None:
    alone = [generator.generate_codes([request])[0].codes for request in REQUESTS]
    for batch_size in (2, 5):
        together = generator.generate_codes(REQUESTS, batch_size=batch_size)
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_array_equal(many.codes, one)
            assert many.finish_reason == "length"
    assert [len(codes) for codes in alone] == [10, 5, 12, 2, 6]


def test_a_stream_is_the_whole_piece_by_piece(tokenizer: TextTokenizer) -> None:
    generator = make(tokenizer, params_of(CONFIG), marked=True)
    options = {"max_audio_length_ms": 800, "seed": 7}
    whole = generator.generate("Hello.", 0, CONTEXT, **options)  # pyright: ignore
    assert len(whole) == 10 * SAMPLES
    assert whole.min() >= 1  # marked
    for chunk_frames in (1, 4, 25):
        pieces = list(
            generator.stream("Hello.", 0, CONTEXT, chunk_frames=chunk_frames, **options)  # pyright: ignore
        )
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
        assert all(len(piece) for piece in pieces)


def test_a_cap_that_is_no_multiple_of_the_chunk_compiles_nothing_new(generator: Generator) -> None:
    list(generator.stream("Hello.", 0, max_audio_length_ms=480, chunk_frames=3))
    before = {key: len(programs) for key, programs in generator._programs.items()}
    list(generator.stream("Hello.", 0, max_audio_length_ms=800, chunk_frames=3))
    assert {key: len(programs) for key, programs in generator._programs.items()} == before


def test_only_programs_of_the_sizes_used_last_are_kept(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csm_jax.pipeline._PROGRAM_SETS", 2)
    generator = make(tokenizer, params_of(CONFIG))
    first, _, again, _ = (generator._programs_of(sizes(slots=n), None) for n in (1, 2, 1, 3))
    assert again is first
    assert [key[0].slots for key in generator._programs] == [1, 3]


def silent(params: Params) -> Params:
    head = params["backbone"]["codebook0_head"]
    return {
        "backbone": params["backbone"] | {"codebook0_head": jnp.zeros_like(head)},
        "decoder": params["decoder"]
        | {"audio_head": jnp.zeros_like(params["decoder"]["audio_head"])},
    }


def test_an_end_at_the_first_frame_is_empty_audio(tokenizer: TextTokenizer) -> None:
    generator = make(tokenizer, silent(params_of(CONFIG)), marked=True)
    audio = generator.generate("Hello.", 0, temperature=0.0, max_audio_length_ms=800)
    assert audio.shape == (0,)
    assert list(generator.stream("Hello.", 0, temperature=0.0, max_audio_length_ms=800)) == []
    [speech] = generator.generate_codes(
        [Request(text="Hello.", speaker=0, temperature=0.0, max_audio_length_ms=800)]
    )
    assert speech.finish_reason == "eos"
    assert speech.codes.shape == (0, CONFIG.num_codebooks)


def test_scores_that_are_not_finite_fail_their_request_and_keep_the_others(
    tokenizer: TextTokenizer,
) -> None:
    params = params_of(CONFIG)
    # One text token's embedding is damaged: only the request that says it fails.
    [bad] = set(tokenizer.encode("[0]z")) - set(tokenizer.encode("[0]a"))
    table = params["backbone"]["text_embeddings"].at[bad].set(jnp.nan)
    generator = make(
        tokenizer, params | {"backbone": params["backbone"] | {"text_embeddings": table}}
    )
    requests = [
        Request(text=text, speaker=0, max_audio_length_ms=240, seed=3) for text in ("a", "z", "a")
    ]
    with pytest.raises(GenerationError, match=r"requests \[1\]") as caught:
        generator.generate_batch(requests)
    assert caught.value.failed == [1]
    first, none, last = caught.value.audios
    assert none is None
    assert first is not None
    assert last is not None
    np.testing.assert_array_equal(first, last)
    assert len(first) == 3 * SAMPLES
    with pytest.raises(GenerationError):
        list(generator.stream("z", 0, max_audio_length_ms=240))


def test_a_prompt_that_just_fits_runs_to_its_cap_and_one_more_does_not(
    tokenizer: TextTokenizer,
) -> None:
    """Prompt and frames fill 63 of 64 positions, the most the reference's rule allows."""
    small = dataclasses.replace(
        CONFIG, backbone=dataclasses.replace(CONFIG.backbone, max_seq_len=64)
    )
    generator = make(tokenizer, params_of(CONFIG), config=small)
    length = len(tokenizer.encode("[0]a"))
    most = 64 - length - 1
    [speech] = generator.generate_codes(
        [Request(text="a", speaker=0, max_audio_length_ms=80 * most)]
    )
    assert len(speech.codes) == most
    assert speech.finish_reason == "length"
    with pytest.raises(ValueError, match="max_seq_len=64"):
        generator.generate("a", 0, max_audio_length_ms=80 * (most + 1))


def test_nothing_asked_is_nothing_made(generator: Generator) -> None:
    assert generator.generate_batch([]) == []


def test_progress_ends_at_the_cap(generator: Generator) -> None:
    seen: list[tuple[int, int]] = []
    generator.generate(
        "a", 0, max_audio_length_ms=400, on_progress=lambda done, most: seen.append((done, most))
    )
    assert seen[-1] == (5, 5)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_any_number_of_rows_runs_on_a_mesh(generator: Generator, rows: int) -> None:
    requests = REQUESTS[:rows]
    want = generator.generate_codes(requests)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharded = make(
            generator.tokenizer,
            jax.device_put(generator.params, param_shardings(CONFIG, mesh)),
        )
        got = sharded.generate_codes(requests)
    for one, many in zip(want, got, strict=True):
        np.testing.assert_array_equal(many.codes, one.codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-20}, "temperature"),
        ({"topk": -1}, "top_k"),
        ({"topk": 2**40}, "top_k"),
        ({"seed": -5}, "seed"),
        ({"max_audio_length_ms": 79.0}, "less than one frame"),
        ({"max_audio_length_ms": float("nan")}, "less than one frame"),
        ({"text": "  "}, "text"),
        ({"speaker": -1}, "speaker"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    generator: Generator, change: dict[str, Any], message: str
) -> None:
    request = dataclasses.replace(REQUESTS[0], **change)
    with pytest.raises(ValueError, match=message):
        generator.generate_batch([REQUESTS[1], request])


def test_an_unknown_option_is_named_beside_the_known_ones(generator: Generator) -> None:
    for call in (generator.generate, generator.stream):
        with pytest.raises(TypeError, match=r"\['top_k'\].*topk is one word.*decoder_topk"):
            call("a", 0, top_k=50)


def test_a_device_is_not_a_model() -> None:
    with pytest.raises(ValueError, match=r"not a device.*JAX_PLATFORMS"):
        load_csm_1b("cuda")
    with pytest.raises(ValueError, match=r"not a device \('cpu'\).*JAX_PLATFORMS"):
        load_csm_1b(device="cpu")


def test_programs_are_not_kept_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore
    (tmp_path / "file").write_text("")
    try:
        for place, kept in ((tmp_path / "file" / "cache", None), (tmp_path / "new" / "one", True)):
            jax.config.update("jax_compilation_cache_dir", None)
            monkeypatch.setenv("CSM_JAX_CACHE_DIR", str(place))
            enable_compilation_cache()
            assert jax.config.jax_compilation_cache_dir == (str(place) if kept else None)  # pyright: ignore
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_a_damaged_key_is_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="watermark key"):
        Generator(
            config=CONFIG,
            params=generator.params,
            tokenizer=generator.tokenizer,
            codec=generator.codec,
            watermarker=None,
            watermark_key=(1, 2, 3),
        )


def test_the_path_of_a_missing_model_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_csm_1b(tmp_path / "nowhere")


def test_audio_is_fetched_while_the_next_chunk_is_made(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Watched(PlainCodec):
        def begin(self, codes: np.ndarray) -> Callable[[], np.ndarray]:
            seen.append("begin")

            def fetch() -> np.ndarray:
                seen.append("fetch")
                return self.decode(codes)

            return fetch

    def watched(*args: Any, **options: Any) -> Any:
        seen.append("make")
        return advance(*args, **options)

    advance = Slots.advance
    monkeypatch.setattr("csm_jax.slots.Slots.advance", watched)
    generator = make(tokenizer, params_of(CONFIG))
    generator.codec = Watched(
        num_codebooks=CONFIG.num_codebooks, codebook_size=CONFIG.codebook_size
    )
    pieces = list(generator.stream("Hello.", 0, max_audio_length_ms=480, chunk_frames=2))
    assert [len(piece) for piece in pieces] == [2 * SAMPLES] * 3
    # Nothing is made in vain: three chunks for six frames.
    assert seen == ["make", "begin", "make", "fetch", "begin", "make", "fetch", "begin", "fetch"]


# --- from a directory -------------------------------------------------------------------------


def test_no_torch_is_needed_to_speak_mark_and_stream(random_model: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'moshi', 'silentcipher'): sys.modules[name] = None\n"
        "from csm_jax import load_csm_1b\n"
        f"generator = load_csm_1b({str(random_model)!r})\n"
        "audio = generator.generate('Hi.', 0, max_audio_length_ms=400)\n"
        "assert audio.shape == (5 * 1920,), audio.shape\n"
        "pieces = list(generator.stream('Hi.', 0, max_audio_length_ms=400))\n"
        "assert sum(map(len, pieces)) == 5 * 1920\n"
        "generator.watermarker.detect(audio, 24_000)\n"
        "for options in ({'codec': 'numpy'}, {'watermark': 'off'}, {'codec': 'torch'}):\n"
        f"    try: load_csm_1b({str(random_model)!r}, **options)\n"
        "    except (ValueError, ImportError) as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, env=os.environ, capture_output=True, text=True
    )
    assert "codec must be 'jax' or 'torch', got 'numpy'" in done.stdout
    assert "watermark must be 'jax', 'torch' or False, got 'off'" in done.stdout
    assert "pip install" in done.stdout  # what codec="torch" needs


def test_the_torch_bridge_gives_the_same_audio(random_model: Path) -> None:
    ours = load_csm_1b(random_model)
    theirs = load_csm_1b(random_model, codec="torch", watermark="torch")
    assert type(theirs.codec).__name__ == "TorchMimi"
    assert type(theirs.watermarker).__name__ == "TorchWatermarker"
    context = [Segment(speaker=1, text="Before.", audio=np.sin(np.arange(3 * SAMPLES) / 9) / 3)]
    for one, other in (
        (ours.generate, theirs.generate),
        (stream_joined(ours), stream_joined(theirs)),
    ):
        audio, expected = (
            call("Hello.", 0, context, max_audio_length_ms=1_600, seed=4) for call in (one, other)
        )
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(audio, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def stream_joined(generator: Generator) -> Callable[..., np.ndarray]:
    return lambda *args, **options: np.concatenate(list(generator.stream(*args, **options)))


def test_a_checkpoint_that_brings_its_codec_needs_no_other(
    random_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    mimi = model / "tokenizer-e351c8d8-checkpoint125.safetensors"
    config, params = load_mimi(mimi)
    mimi.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer-e351c8d8"):
        load_csm_1b(model, watermark=False)
    save_mimi(tmp_path / "codec", config, params, layout="transformers")
    codec = load_file(tmp_path / "codec" / "model.safetensors")
    tensors = load_file(model / "model.safetensors")
    tensors |= {f"codec_model.{name}": tensor for name, tensor in codec.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((model / "config.json").read_text())
    data["codec_config"] = json.loads((tmp_path / "codec" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(data))
    with_codec = load_csm_1b(model, watermark=False)
    beside = load_csm_1b(random_model, watermark=False)
    codes = np.random.default_rng(0).integers(0, 2048, (4, 32), dtype=np.int32)
    np.testing.assert_array_equal(with_codec.codec.decode(codes), beside.codec.decode(codes))
