"""Requests: what may be in them, and what is said of what may not."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.pipeline import Generator
from csm_jax.prompt import Segment
from csm_jax.request import Request, as_requests, row_settings
from csm_jax.runaway import frame_cap
from tests.support.model import short_config

SEGMENT = Segment(speaker=0, text="Before.", audio=np.ones(1920, np.float32) / 2)


def make(**fields: Any) -> Request:
    """Returns a request, made past the type checker of the tests, which users do not have."""
    request = object.__new__(Request)
    for name, value in ({"text": "Hi.", "speaker": 0} | fields).items():
        object.__setattr__(request, name, value)
    request.__post_init__()
    return request


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": 3}, "text must be a string, got int 3"),
        ({"text": None}, "text must be a string, got None"),
        ({"speaker": "x"}, "speaker must be an integer, got str 'x'"),
        ({"speaker": True}, "speaker must be an integer, got bool True"),
        ({"speaker": None}, "speaker must be an integer, got None"),
        ({"context": SEGMENT}, r"context must hold Segments, got one by itself: write \[it\]"),
        ({"context": None}, "context must be a list of Segments, got None"),
        ({"context": "hello"}, "context must be a list of Segments, got str 'hello'"),
        ({"context": [SEGMENT, 3]}, r"context\[1\] must be a Segment, got int 3"),
        ({"max_audio_length_ms": "abc"}, "max_audio_length_ms must be a number, got str 'abc'"),
        ({"voice": "alice"}, "voice must be a Voice, got str 'alice'"),
        ({"temperature": "0.9"}, "temperature must be a number, got str '0.9'"),
        ({"temperature": np.ones(3)}, "temperature must be a number, got ndarray"),
        ({"topk": None}, "topk must be a number, got None"),
        ({"topk": True}, "topk must be a number, got bool True"),
        ({"top_p": []}, r"top_p must be a number, got list \[\]"),
        ({"min_p": 1j}, "min_p must be a number, got complex 1j"),
        ({"seed": None}, "seed must be a number, got None"),
        ({"decoder_temperature": "hot"}, "decoder_temperature must be a number, got str 'hot'"),
        ({"decoder_topk": "9" * 9999}, "decoder_topk must be a number, got str '99999"),
        ({"truncate_context": "no"}, "truncate_context must be a bool, got str 'no'"),
    ],
)
def test_wrong_types_are_named_where_they_are_given(change: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=f"^{said}") as info:
        make(**change)
    assert len(str(info.value)) < 200


def test_every_library_has_numbers() -> None:
    request = make(
        speaker=np.int64(1),
        context=iter([SEGMENT]),
        max_audio_length_ms=np.float32(800),
        temperature=jnp.float32(0.5),
        topk=np.int32(7),
        seed=np.uint64(2**63),
        truncate_context=np.bool_(True),
    )
    assert request.context == (SEGMENT,)
    assert request.max_frames == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 3  # pyright: ignore


@pytest.mark.parametrize("ms", [float("inf"), 1e30, 10**400, 2e9])
def test_lengths_without_end_are_refused(ms: float) -> None:
    with pytest.raises(ValueError, match="more than any model can make"):
        _ = Request(text="Hi.", speaker=0, max_audio_length_ms=ms).max_frames


def test_the_decoders_settings_are_named() -> None:
    for name, value, said in (
        ("decoder_temperature", float("nan"), "^decoder_temperature must"),
        ("decoder_topk", -1, "^decoder_top_k must"),
        ("temperature", float("nan"), "^temperature must"),
    ):
        request = make(**{name: value})
        with pytest.raises(ValueError, match=said):
            row_settings([request], segments=[-1])


def test_requests_are_a_list_of_requests() -> None:
    request = Request(text="Hi.", speaker=0)
    assert as_requests(iter([request])) == [request]
    for bad, said in (
        (request, r"requests must hold Requests, got one by itself: write \[it\]"),
        (3, "requests must be a list of Requests, got int 3"),
        ("Hi.", "requests must be a list of Requests, got str 'Hi.'"),
    ):
        # The function under the type checker of the tests, which would be there first.
        with pytest.raises(TypeError, match=said):
            as_requests.__wrapped__(bad)  # pyright: ignore
    with pytest.raises(TypeError, match=r"requests\[1\] must be a Request, got dict"):
        as_requests(iter([request, {"text": "Hi."}]))  # pyright: ignore


def test_generate_batch_takes_any_iterable() -> None:
    class Counting(Generator):
        def __init__(self) -> None:
            self.config = short_config()

        def _run(self, requests: Any, *rest: Any, **options: Any) -> Any:
            assert isinstance(requests, list)
            self.seen = requests
            return []

    generator, request = Counting(), Request(text="Hi.", speaker=0)
    assert generator.generate_batch(request for _ in range(2)) == []
    assert generator.seen == [request, request]
    with pytest.raises(TypeError, match=r"requests\[0\] must be a Request, got str 'Hi\.'"):
        generator.generate_batch(iter(["Hi."]))  # pyright: ignore


def test_without_a_length_the_text_gives_the_cap() -> None:
    assert Request(text="Hello.", speaker=0).max_frames == frame_cap("Hello.")
    assert Request(text="Hello.", speaker=0, max_audio_length_ms=800).max_frames == 10
