"""The published weights: the model against published codes, codec and watermark against their originals.

The codes (text only, greedy, float32) are those of transformers' own test of CSM-1B (`tests/models/csm/test_modeling_csm.py`,
commit 00b7f80), made with Sesame's implementation. The environment variable CSM_JAX_WEIGHTS names a
directory with the checkpoint, its `config.json` and `tokenizer.json`, and for the other tests Mimi, the
watermark and `prompts/`, as README shows.
"""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

from . import inputs

pytestmark = pytest.mark.weights

TEXT = "[0]The past is just a story we tell ourselves."

# Code 0 of all 33 frames, and all codes of the first frame.
CODEBOOK_0 = [
    *(1656, 366, 1343, 456, 456, 2027, 1215, 1615, 1259, 1211, 460, 908, 1599, 1615, 912, 80, 1161),
    *(374, 1184, 1141, 1141, 345, 336, 578, 184, 1484, 513, 1858, 1134, 1270, 1270, 1718, 1157),
]
FRAME_0 = [
    *(1656, 629, 723, 1785, 206, 1873, 1059, 1190, 1833, 240, 618, 350, 156, 109, 2010, 452, 435),
    *(1764, 77, 654, 1133, 908, 1095, 74, 804, 494, 1760, 1343, 1312, 1464, 1657, 324),
]


@pytest.fixture(scope="module")
def model_dir() -> str:
    """The directory with the published weights."""
    path = os.environ.get("CSM_JAX_WEIGHTS")
    if not path:
        pytest.skip("CSM_JAX_WEIGHTS does not name a directory with CSM-1B's weights")
    return path


def test_text_only_greedy_codes(model_dir: str) -> None:
    from csm_jax import hub, weights
    from csm_jax.prompt import TextTokenizer

    from .ours import Ours

    files = hub.locate(model_dir)
    config, params = weights.load_checkpoint(files.checkpoint, dtype="float32")
    ids = TextTokenizer.from_file(files.tokenizer).encode(TEXT)
    assert (ids[0], ids[-1]) == (128_000, 128_001), f"no BOS or EOS around the text: {ids}"

    ours = Ours.over(config, params, device=jax.devices("cpu")[0])
    (codes,) = ours.generate([inputs.text_frames(config, ids)], len(CODEBOOK_0) + 1)
    assert codes[0].tolist() == FRAME_0
    # One frame more was allowed: that there is none means that all its codes were 0.
    np.testing.assert_array_equal(codes[:, 0], CODEBOOK_0)


@pytest.fixture(scope="module")
def speech(model_dir: str) -> np.ndarray:
    """One of the published example recordings, at 24 kHz."""
    from csm_jax import hub
    from csm_jax.audio import read_audio, resample

    prompts = hub.locate(model_dir).prompts_dir
    recordings = sorted(prompts.glob("*.wav")) if prompts is not None else []
    if not recordings:
        pytest.skip(f"{model_dir} has no prompts/*.wav")
    audio, rate = read_audio(recordings[0])
    return resample(audio, rate, 24_000)[: 24_000 * 12]


def test_mimi_is_moshis(model_dir: str, speech: np.ndarray) -> None:
    from csm_jax import hub
    from csm_jax.bridge.mimi import TorchMimi
    from csm_jax.mimi.codec import JaxMimi
    from csm_jax.weights.mimi import load_mimi

    from .test_mimi import SAME_CODES, SI_SDR, si_sdr

    path = hub.locate(model_dir).mimi()
    ours, theirs = JaxMimi(*load_mimi(path)), TorchMimi.from_file(path)
    codes = theirs.encode(speech)
    assert (ours.encode(speech) == codes).mean() >= SAME_CODES
    audio, expected = (codec.decode(codes).astype(np.float64) for codec in (ours, theirs))
    assert si_sdr(audio, expected) >= SI_SDR


def test_marks_on_speech_are_read(model_dir: str, speech: np.ndarray) -> None:
    from csm_jax import hub
    from csm_jax.bridge.watermark import TorchWatermarker
    from csm_jax.watermark import JaxWatermarker
    from csm_jax.watermark_key import DEFAULT_KEY

    directory = hub.locate(model_dir).watermark_dir()
    ours, theirs = JaxWatermarker.from_dir(directory), TorchWatermarker.from_dir(directory)
    marked = ours.embed(speech, 24_000, DEFAULT_KEY)
    np.testing.assert_allclose(marked, theirs.embed(speech, 24_000, DEFAULT_KEY), rtol=0, atol=1e-4)
    stream = ours.open_stream(24_000, DEFAULT_KEY)
    pieces = [stream.push(speech[i : i + 1920]) for i in range(0, len(speech), 1920)]
    streamed = np.concatenate([*pieces, stream.flush()])
    for audio, expected in ((marked, True), (streamed, True), (speech, False)):
        assert ours.verify(audio, 24_000, DEFAULT_KEY) is expected
        assert theirs.verify(audio, 24_000, DEFAULT_KEY) is expected
