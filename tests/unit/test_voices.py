"""Voices: what they hash to, the positions they take, and a library that loses nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import pickle
import string
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from csm_jax import __version__
from csm_jax.audio import resample
from csm_jax.config import tiny
from csm_jax.prompt import Segment, TextTokenizer, build_prompt
from csm_jax.voices import (
    UnknownVoiceError,
    Voice,
    VoiceFileError,
    VoiceLibrary,
    VoiceTurn,
    check_name,
    check_recordings,
    default_directory,
    encode_voice,
    make_provenance,
    voice_prompt,
)
from csm_jax.voices import files as voice_files
from csm_jax.weights import safetensors_io
from tests.support.codec import PlainCodec
from tests.support.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tiny()
C = CONFIG.num_codebooks
PROVENANCE = {"source": "a test", "consent": "yes", "created": "2020-01-02T03:04:05+00:00"}


class LoudnessCodec:
    """Codes that depend on every frame of the audio."""

    num_codebooks = C
    codebook_size = CONFIG.codebook_size

    def encode(self, audio: np.ndarray) -> np.ndarray:
        frames = -(-len(audio) // 1920)
        padded = np.pad(audio, (0, frames * 1920 - len(audio))).reshape(frames, 1920)
        return (np.abs(padded[:, :C]) * 1000).astype(np.int32) % self.codebook_size


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(build_tokenizer())


def noise(seconds: float, *, rate: int = 24_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)


def segment(seconds: float = 3.2, *, rate: int = 24_000, **changes: Any) -> Segment:
    values = {"speaker": 0, "text": "hello", "audio": noise(seconds, rate=rate)}
    return Segment(sample_rate=rate, **{**values, **changes})


def turn(frames: int = 3, *, speaker: int = 0, text: str = "hello", seed: int = 0) -> VoiceTurn:
    codes = np.random.default_rng(seed).integers(0, CONFIG.codebook_size, (frames, C), np.int32)
    return VoiceTurn(speaker=speaker, text=text, codes=codes)


def voice(name: str = "anna", *turns: VoiceTurn, **provenance: str) -> Voice:
    return Voice(
        name=name,
        turns=turns or (turn(),),
        codebook_size=CONFIG.codebook_size,
        provenance={**PROVENANCE, **provenance},
    )


def assert_same(left: Voice, right: Voice) -> None:
    assert left.name == right.name
    assert left.provenance == right.provenance
    assert left.codebook_size == right.codebook_size
    assert [(t.speaker, t.text) for t in left.turns] == [(t.speaker, t.text) for t in right.turns]
    for mine, theirs in zip(left.turns, right.turns, strict=True):
        assert mine.codes.dtype == theirs.codes.dtype == np.int32
        assert not mine.codes.flags.writeable
        np.testing.assert_array_equal(mine.codes, theirs.codes)
    assert left.key == right.key


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
    }


@pytest.fixture
def library(tmp_path: Path) -> VoiceLibrary:
    return VoiceLibrary(tmp_path / "voices")


# --- a voice -----------------------------------------------------------------------------------


def test_the_key_is_the_same_on_every_machine():
    codes = np.arange(2 * 3).reshape(2, 3)
    one = VoiceTurn(speaker=1, text="hé", codes=codes)
    two = Voice(name="x", turns=(one,), codebook_size=8, provenance={})
    # blake2b-128 for "csm_jax.voice" of b"1 3 2 3\n", the text in UTF-8 and little-endian int32.
    assert two.key == "f70c6a2c77dbf3d669481686adda5497"


def test_the_key_is_of_what_the_model_reads_and_of_nothing_else():
    a, b = turn(seed=1), turn(seed=2, speaker=1)
    key = voice("anna", a, b).key
    assert voice("bob", a, b, source="elsewhere").key == key
    wide = dataclasses.replace(voice("anna", a, b), codebook_size=CONFIG.codebook_size + 1)
    assert wide.key == key
    codes = np.array(a.codes)
    codes[-1, -1] ^= 1
    others = [
        (b, a),
        (a,),
        (a, b, b),
        (dataclasses.replace(a, speaker=7), b),
        (dataclasses.replace(a, text="hello."), b),
        (dataclasses.replace(a, codes=codes), b),
        (dataclasses.replace(a, codes=a.codes[:-1]), b),
        (dataclasses.replace(a, codes=a.codes.reshape(2 * 3, -1)),),
        (dataclasses.replace(a, codes=np.concatenate([a.codes, b.codes])),),
    ]
    keys = {voice("anna", *turns).key for turns in others}
    assert len(keys) == len(others)
    assert key not in keys


def test_codes_are_copied_and_cannot_be_changed():
    codes = np.zeros((2, C), np.int64)
    made = VoiceTurn(speaker=0, text="hello", codes=codes)
    codes[0, 0] = 5
    assert made.codes[0, 0] == 0
    assert made.codes.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        made.codes[0, 0] = 5


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"speaker": -1}, "speaker must be 0 or more"),
        ({"text": " "}, "text is empty"),
        ({"text": "a\x1b[2Jb"}, r"control character U\+001B"),
        ({"codes": np.zeros(C, np.int32)}, r"shape \[frames, codebooks\], got \[32\]"),
        ({"codes": np.zeros((0, C), np.int32)}, r"got \[0, 32\]"),
        ({"codes": np.full((2, C), -1)}, "codes lie outside"),
        ({"codes": np.full((2, C), 1 << 32)}, "codes lie outside"),
    ],
)
def test_bad_turns(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        VoiceTurn(**{"speaker": 0, "text": "hello", "codes": np.zeros((2, C), np.int32), **changes})


def test_bad_voices():
    a = turn()
    with pytest.raises(ValueError, match="voice 'anna' has no turns"):
        Voice(name="anna", turns=(), codebook_size=8, provenance={})
    with pytest.raises(ValueError, match=r"turn 0: .* codes lie outside 0\.\.7"):
        Voice(name="anna", turns=(a,), codebook_size=8, provenance={})
    narrow = dataclasses.replace(a, codes=a.codes[:, :-1])
    with pytest.raises(ValueError, match=r"turn 1: codes must have shape \[frames, 32\]"):
        Voice(name="anna", turns=(a, narrow), codebook_size=256, provenance={})
    with pytest.raises(ValueError, match=r"provenance\['source'\] is empty"):
        Voice(name="anna", turns=(a,), codebook_size=256, provenance={"source": ""})


def test_its_length():
    made = voice("anna", turn(25), turn(50, speaker=1))
    assert made.frames == 75
    assert made.seconds == 6.0
    assert made.turns[1].seconds == 4.0
    assert made.num_codebooks == C


def test_a_voice_can_be_sent_to_another_process():
    made = voice("anna", turn(), turn(seed=1, speaker=1))
    assert made.key == pickle.loads(pickle.dumps(made)).key


def test_provenance():
    made = make_provenance("recorded at home", consent=True)
    assert made["source"] == "recorded at home"
    assert made["consent"] == "yes"
    assert made["csm_jax"] == __version__
    assert made["created"].endswith("+00:00")
    with pytest.raises(ValueError, match="needs the consent of the person who is heard"):
        make_provenance("found", consent=False)
    with pytest.raises(ValueError, match="the source of a voice is empty"):
        make_provenance(" ", consent=True)


# --- from recordings ---------------------------------------------------------------------------


def test_encoding():
    segments = [
        segment(2.0, text="hello there", speaker=3),
        segment(2.03, rate=44_100, text="and now the other", speaker=5),
    ]
    made = encode_voice(LoudnessCodec(), segments, name="duo", provenance=PROVENANCE)
    assert made.name == "duo"
    assert made.provenance == PROVENANCE
    assert made.codebook_size == CONFIG.codebook_size
    assert [(t.speaker, t.text) for t in made.turns] == [
        (3, "hello there"),
        (5, "and now the other"),
    ]
    for mine, given in zip(made.turns, segments, strict=True):
        audio = resample(given.audio, given.sample_rate, 24_000)
        np.testing.assert_array_equal(mine.codes, LoudnessCodec().encode(audio))
    assert made.frames == 25 + 26


@pytest.mark.parametrize(
    ("segments", "complaint"),
    [
        ([], "a voice needs at least one recording"),
        ([segment(text="")], "the transcript of recording 1 is empty"),
        ([segment(), segment(speaker=-1)], "the speaker of recording 2 must be 0 or more"),
        ([segment(audio=np.zeros((2, 9), np.float32))], "recording 1 must be mono"),
        ([segment(audio=np.full(99, np.nan, np.float32))], "recording 1 holds 99 NaN"),
        ([segment(audio=np.zeros(72_000, np.float32))], "recording 1 is nearly silent"),
        # A constant is no sound, at whatever level.
        ([segment(audio=np.full(72_000, 0.5, np.float32))], "nearly silent: its level is 0 "),
        ([segment(audio=0.001 * noise(3))], "nearly silent: its level is 0.00029"),
        ([segment(60.01)], r"may hold 60 s of audio, got 60\.01 s"),
        ([segment(30), segment(31)], r"may hold 60 s of audio, got 61\.00 s"),
        ([segment(2, text="x" * 151)], r"recording 1 lasts 2\.0 s and its transcript has 151"),
        ([dataclasses.replace(segment(), sample_rate=1)], "the sample rate of recording 1 must be"),
    ],
)
def test_bad_recordings(segments, complaint):
    class NoCodec(PlainCodec):
        def encode(self, audio: np.ndarray) -> np.ndarray:
            raise AssertionError("all recordings are checked before any is encoded")

    codec = NoCodec(num_codebooks=C, codebook_size=256)
    with pytest.raises(ValueError, match=complaint):
        encode_voice(codec, segments, name="anna", provenance=PROVENANCE)
    with pytest.raises(ValueError, match=complaint):
        check_recordings(segments)


def test_what_is_just_within_the_limits():
    codec = PlainCodec(num_codebooks=C, codebook_size=CONFIG.codebook_size)
    quiet = segment(60.0, audio=0.004 * noise(60.0), text="x" * 3_050)
    made = encode_voice(codec, [quiet], name="anna", provenance=PROVENANCE)
    assert made.frames == 750


@pytest.mark.parametrize(("frames", "warned"), [(37, True), (38, False)])
def test_a_short_voice_is_warned_of(caplog, frames, warned):
    codec = PlainCodec(num_codebooks=C, codebook_size=256)
    both = [segment(1.6), segment((frames - 20) * 0.08)]  # all turns together count
    with caplog.at_level(logging.WARNING, "csm_jax"):
        encode_voice(codec, both, name="anna", provenance=PROVENANCE)
    assert ("voice 'anna' has only 2.96 s" in caplog.text) is warned


def test_a_codec_that_is_not_mimi():
    class Slow(PlainCodec):
        def encode(self, audio: np.ndarray) -> np.ndarray:
            return super().encode(audio)[::2]

    with pytest.raises(ValueError, match=r"20 frames for 76,800 samples, not 40, .* not Mimi"):
        encode_voice(
            Slow(num_codebooks=C, codebook_size=256), [segment()], name="a", provenance=PROVENANCE
        )


# --- in the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_prompt_is_that_of_the_same_turns_as_context(tokenizer, turns):
    segments = [
        segment(3.21, text="hello there", speaker=3),
        segment(1.03, rate=44_100, text="and now, what of the other?", speaker=0),
        segment(0.5, rate=16_000, text="[7] no", speaker=3),
    ][:turns]
    text, speaker = "how are you", 1
    whole = build_prompt(
        tokenizer,
        LoudnessCodec(),
        context=segments,
        text=text,
        speaker=speaker,
        config=CONFIG,
        max_frames=10,
        truncate_context=False,
    )
    alone = len(tokenizer.encode(f"[{speaker}]{text}"))
    made = encode_voice(LoudnessCodec(), segments, name="anna", provenance=PROVENANCE)
    frames, mask = voice_prompt(tokenizer, made, CONFIG)
    assert frames.dtype == np.int32
    assert mask.dtype == bool
    np.testing.assert_array_equal(frames, whole.frames[:-alone])
    np.testing.assert_array_equal(mask, whole.mask[:-alone])


def test_a_voice_of_another_codec(tokenizer):
    wide = dataclasses.replace(voice(), codebook_size=CONFIG.codebook_size + 1)
    with pytest.raises(ValueError, match=r"voice 'anna': .* 32 codebooks of 257 codes, but"):
        voice_prompt(tokenizer, wide, CONFIG)
    narrow = voice("anna", dataclasses.replace(turn(), codes=turn().codes[:, :8]))
    with pytest.raises(ValueError, match=r"voice 'anna': .* 8 codebooks of 256 codes, but"):
        voice_prompt(tokenizer, narrow, CONFIG)
    # As in a prompt, a smaller codec is no harm.
    few = VoiceTurn(speaker=0, text="a", codes=np.zeros((2, C), np.int32))
    small = Voice(name="a", turns=(few,), codebook_size=8, provenance={})
    voice_prompt(tokenizer, small, CONFIG)


def test_a_voice_must_leave_room(tokenizer):
    texts = len(tokenizer.encode("[0]hello"))
    most = CONFIG.backbone.max_seq_len * 3 // 4
    fits = voice("anna", turn(most - texts - 1))
    assert len(voice_prompt(tokenizer, fits, CONFIG)[0]) == most
    with pytest.raises(ValueError, match=r"takes 1,537 positions .* may take 1,536 of the 2,048"):
        voice_prompt(tokenizer, voice("anna", turn(most - texts)), CONFIG)


def test_a_control_token_in_its_text(tokenizer):
    with pytest.raises(ValueError, match=r"voice 'anna': text: .*<\|end_of_text\|>"):
        voice_prompt(tokenizer, voice("anna", turn(text="so <|end_of_text|>")), CONFIG)


# --- the library -------------------------------------------------------------------------------


def test_round_trip(library):
    made = voice(
        "Anna-1.b_c",
        turn(750, text='naïve "café"\n— 你好 🙂 \\'),
        turn(1, speaker=12, seed=1),
        source="ours",
        **{f"note {i}": "x\ty" for i in range(3)},
    )
    path = library.add(made)
    assert path == library.directory / "Anna-1.b_c.safetensors"
    assert path == library.path(made.name)
    assert os.listdir(library.directory) == [path.name]
    assert_same(library.get(made.name), made)
    # By the format's own library, too.
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("turns.0.codes"), made.turns[0].codes)
        content = json.loads(file.metadata()["csm_jax.voice"])
    assert content["codec"] == {
        "num_codebooks": 32,
        "codebook_size": 256,
        "sample_rate": 24_000,
        "frame_rate": 12.5,
    }


def test_the_file_of_a_voice_is_always_the_same(library):
    first = library.add(voice()).read_bytes()
    assert library.add(voice(), replace=True).read_bytes() == first


def test_many_turns_keep_their_order(library):
    turns = [turn(1, speaker=i, seed=i) for i in range(12)]
    library.add(voice("many", *turns))
    assert_same(library.get("many"), voice("many", *turns))


def test_names_and_iteration(library):
    assert library.names() == []
    assert list(library) == []
    for name in ("zoe", "Bob", "anna"):
        library.add(voice(name))
    # What else may lie there.
    (library.directory / ".anna.0a1b2c3d.part").write_bytes(b"left by a killed process")
    (library.directory / "readme.txt").write_text("mine")
    (library.directory / "-x.safetensors").write_text("not a name")
    (library.directory / "con.safetensors").write_text("not a name")
    (library.directory / "sub.safetensors").mkdir()
    (library.directory / "gone.safetensors").symlink_to("nowhere")
    assert library.names() == ["Bob", "anna", "zoe"]
    assert [each.name for each in library] == ["Bob", "anna", "zoe"]


def test_remove(library):
    library.add(voice("anna"))
    library.add(voice("bob"))
    library.remove("anna")
    assert library.names() == ["bob"]
    (library.directory / "bob.safetensors").write_bytes(b"damaged")
    library.remove("bob")
    assert os.listdir(library.directory) == []
    with pytest.raises(UnknownVoiceError, match="has no voice 'bob'; there is none at all"):
        library.remove("bob")


def test_add_and_replace(library):
    library.add(voice())
    new = voice("anna", turn(seed=9))
    for refuses in (lambda: library.add(new), lambda: library.check_add("anna")):
        with pytest.raises(FileExistsError, match=r"already has a voice 'anna': .*--replace"):
            refuses()
    assert_same(library.get("anna"), voice())
    library.check_add("anna", replace=True)
    library.add(new, replace=True)
    assert_same(library.get("anna"), new)
    library.add(voice("bob"), replace=True)
    assert library.names() == ["anna", "bob"]


def test_names_that_differ_only_in_case(library):
    library.add(voice("Anna"))
    for replace in (False, True):
        with pytest.raises(
            ValueError, match="has the voice 'Anna', which differs from 'anna' only"
        ):
            library.add(voice("anna"), replace=replace)
        with pytest.raises(ValueError, match="only in case"):
            library.check_add("ANNA", replace=replace)
    with pytest.raises(UnknownVoiceError, match="no voice 'anna'; did you mean 'Anna'"):
        library.get("anna")
    assert library.names() == ["Anna"]


def test_a_missing_voice(library):
    with pytest.raises(UnknownVoiceError, match="no voice 'anna'; there is none at all; add one"):
        library.get("anna")
    for name in ("annabel", "bob", "carl", *(f"voice-{i}" for i in range(8))):
        library.add(voice(name))
    with pytest.raises(UnknownVoiceError, match=r"no voice 'Anabel'; did you mean 'annabel'\?"):
        library.get("Anabel")
    with pytest.raises(UnknownVoiceError, match=r"there are annabel, bob, .* and 3 more$"):
        library.get("q")


def test_a_voice_must_say_where_it_comes_from(library):
    for key in PROVENANCE:
        lacking = {k: v for k, v in PROVENANCE.items() if k != key}
        with pytest.raises(ValueError, match=f"its provenance lacks {key} "):
            library.add(dataclasses.replace(voice(), provenance=lacking))
    assert not library.directory.exists()


def test_the_default_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("CSM_JAX_VOICES", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    home = tmp_path / ".local" / "share" / "csm_jax" / "voices"
    assert default_directory() == home
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_directory() == home
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_directory() == tmp_path / "data" / "csm_jax" / "voices"
    monkeypatch.setenv("CSM_JAX_VOICES", "~/mine")
    assert default_directory() == tmp_path / "mine"
    assert VoiceLibrary().directory == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()


# --- names -------------------------------------------------------------------------------------


def bad_names() -> list[str]:
    rng = np.random.default_rng(0)
    fixed = [
        "", ".", "..", "../anna", "/etc/passwd", "a/b", "a\\b", "..\\x", "a/../../x", "~", "~root",
        ".hidden", "-o", "_x", "a b", "a\n", "\na", "a\x00", "a\x00.safetensors", "a:b", "C:x", "a*",
        "é", "ä", "ａ", "а", "٣", "a\u202eb", "a\u200b", "🙂", "x" * 65, "x" * 5_000, "CON", "con",
        "nul.txt", "Aux", "PRN.a.b", "COM1", "lpt9.x", "%2e%2e", "a%2fb", "$HOME", "`id`", "a;b", "a|b",
    ]  # fmt: skip
    good = string.ascii_letters + string.digits + "._-"
    evil = "/\\\x00\n\r\t :*?\"'<>|$~%&é٣а‮🙂"
    while len(fixed) < 500:
        letters = [str(letter) for letter in rng.choice(list(good), rng.integers(1, 20))]
        # Not through numpy, whose strings end before a NUL.
        letters.insert(int(rng.integers(0, len(letters) + 1)), evil[rng.integers(len(evil))])
        letters += ["/.."] * int(rng.integers(0, 2))
        fixed.append("../" * int(rng.integers(0, 4)) + "".join(letters))
    return fixed


def test_bad_names_lead_nowhere(tmp_path):
    library = VoiceLibrary(tmp_path / "a" / "b" / "voices")
    library.add(voice())
    # A voice that a name could escape to.
    outside = VoiceLibrary(tmp_path)
    outside.add(voice("passwd"))
    before = snapshot(tmp_path)
    names = bad_names()
    assert len(names) == 500
    for name in names:
        for action in (
            library.get,
            library.path,
            library.remove,
            library.check_add,
            check_name,
            lambda name: voice(name),
        ):
            with pytest.raises(ValueError, match="a voice"):
                action(name)
    # Even a voice that came by its name in some other way.
    for name in names:
        made = voice()
        object.__setattr__(made, "name", name)
        with pytest.raises(ValueError, match="a voice"):
            library.add(made, replace=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["a", "0", "x" * 64, "a.b", "a..b", "a-", "Z_9", "console", "com", "com10"]
)
def test_good_names(library, name):
    library.add(voice(name))
    assert library.get(name).name == name


# --- damage ------------------------------------------------------------------------------------


@pytest.fixture
def small(library) -> tuple[VoiceLibrary, Path, bytes]:
    path = library.add(voice("anna", turn(2), turn(1, seed=1)))
    return library, path, path.read_bytes()


def refused(library: VoiceLibrary) -> str:
    with pytest.raises(VoiceFileError) as caught:
        library.get("anna")
    message = str(caught.value)
    assert message.startswith(str(library.directory / "anna.safetensors"))
    assert "\n" not in message
    return message


def test_a_truncated_file(small):
    library, path, data = small
    lengths = range(0, len(data), 16)
    for length in [*lengths, len(data) - 1]:
        path.write_bytes(data[:length])
        assert "is damaged" in refused(library)
    path.write_bytes(data + b"\0")
    assert "is damaged" in refused(library)
    path.write_bytes(data)
    library.get("anna")


def test_a_flipped_bit_anywhere(small):
    library, path, data = small
    rng = np.random.default_rng(0)
    # One bit of every byte, of the codes and of the header.
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        refused(library)
    path.write_bytes(data)
    library.get("anna")


def rewritten(path: Path, change: Callable[[dict[str, str], dict[str, np.ndarray]], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def test_content_that_is_not_what_was_written(small):
    library, path, data = small

    def swap(metadata, tensors):
        tensors["turns.0.codes"], tensors["turns.1.codes"] = (
            tensors["turns.1.codes"],
            tensors["turns.0.codes"],
        )

    def edit(metadata, tensors):
        metadata["csm_jax.voice"] = metadata["csm_jax.voice"].replace("hello", "hallo")

    def unhash(metadata, tensors):
        del metadata["csm_jax.voice.hash"]

    def unname(metadata, tensors):
        tensors["turns.2.codes"] = tensors.pop("turns.1.codes")

    def recode(metadata, tensors):
        codes = tensors["turns.0.codes"] = np.array(tensors["turns.0.codes"])
        old = zlib.crc32(codes.data)
        codes[0, 0] ^= 1
        key = safetensors_io.CHECKSUM_KEY
        metadata[key] = metadata[key].replace(f"{old:08x}", f"{zlib.crc32(codes.data):08x}")

    def widen(metadata, tensors):
        tensors["turns.0.codes"] = tensors["turns.0.codes"].astype(np.int64)

    for change in (swap, edit, unhash, unname, recode, widen):
        path.write_bytes(data)
        rewritten(path, change)
        assert "add the voice again" in refused(library)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"sample_rate": 24000', '"sample_rate": 16000', "its codec is not Mimi"),
        ('"num_codebooks": 32', '"num_codebooks": 31', "its codec is not Mimi"),
        ('"codebook_size": 256', '"codebook_size": 2', "codes lie outside"),
        ('"name": "anna"', '"name": "../x"', "a voice's name must be"),
        ('"name": "anna"', '"names": "anna"', "'name' is missing"),
        ('"speaker": 0', '"speaker": -1', "speaker must be 0 or more"),
        ("hello", "\\ud800", "is not valid UTF-8"),
        ('"turns": [{', '"turns": [{}, {', "is missing"),
        ('{"name"', '[{"name"', "damaged JSON"),
    ],
)
def test_a_foreign_writers_mistakes(small, old, new, complaint):
    # Whoever writes such a file has computed the hash as well.
    library, path, _ = small

    def change(metadata, tensors):
        text = metadata["csm_jax.voice"]
        assert old in text
        text = text.replace(old, new, 1)
        metadata["csm_jax.voice"] = text
        arrays = [tensors[name] for name in sorted(tensors)]
        metadata["csm_jax.voice.hash"] = voice_files._hash(text, arrays)

    rewritten(path, change)
    assert complaint in refused(library)


def test_a_newer_version(small):
    library, path, _ = small
    rewritten(path, lambda metadata, tensors: metadata.update({"csm_jax.voice.format": "3"}))
    assert (
        f"has format '3' and this csm_jax ({__version__}) reads 1 and 2: install a newer"
        in refused(library)
    )


def test_files_that_are_no_voice(library, monkeypatch):
    library.add(voice("bob"))
    path = library.directory / "anna.safetensors"
    save_file({"weight": np.zeros(3, np.int32)}, path)
    assert "is no voice of csm_jax" in refused(library)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    assert "is damaged or no voice (the tensor weight is not int32)" in refused(library)
    path.write_text("hello")
    assert "is damaged or no voice" in refused(library)
    path.write_bytes((8).to_bytes(8, "little") + b"[1,2,3] ")
    assert "is damaged or no voice" in refused(library)
    path.write_bytes(library.path("bob").read_bytes())
    assert "holds the voice 'bob': rename it to bob.safetensors" in refused(library)
    monkeypatch.setattr(voice_files, "_MAX_FILE_BYTES", 100)
    assert "larger than 100 bytes" in refused(library)


# --- several at once ---------------------------------------------------------------------------

_SCRIPT = """\
import sys
import numpy as np
from csm_jax.voices import Voice, VoiceLibrary, VoiceTurn
library, mine = VoiceLibrary(sys.argv[1]), int(sys.argv[2])
def voice(name, code):
    codes = np.full((400, 8), code, np.int32)
    return Voice(name=name, turns=(VoiceTurn(speaker=code, text="hello", codes=codes),),
                 codebook_size=8, provenance=dict(source="a", consent="yes", created="now"))
print("ready", flush=True)
"""


def process(script: str, *arguments: object) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def test_two_processes_add_the_same_name(tmp_path):
    script = """
for name in map(str.strip, sys.stdin):
    try:
        library.add(voice(name, mine))
        print("added", flush=True)
    except FileExistsError as error:
        print("taken" if "already has a voice" in str(error) else error, flush=True)
"""
    both = [process(script, tmp_path, i) for i in (1, 2)]
    library, winners = VoiceLibrary(tmp_path), []
    try:
        for i in range(100):
            for each in both:
                each.stdin.write(f"voice-{i}\n")
            for each in both:
                each.stdin.flush()
            said = [each.stdout.readline().strip() for each in both]
            assert sorted(said) == ["added", "taken"]
            winners.append(said.index("added") + 1)
    finally:
        for each in both:
            each.communicate(timeout=30)
    assert sorted(os.listdir(tmp_path)) == sorted(f"voice-{i}.safetensors" for i in range(100))
    for i, winner in enumerate(winners):
        assert library.get(f"voice-{i}").turns[0].speaker == winner


def test_a_voice_is_replaced_while_it_is_read(tmp_path):
    library = VoiceLibrary(tmp_path)
    script = """
import itertools, select
for i in itertools.count():
    library.add(voice("anna", i % 8), replace=True)
    if i == 0:
        print("begun", flush=True)
    if select.select([sys.stdin], [], [], 0)[0]:
        break
"""
    writer = process(script, tmp_path, 0)
    try:
        assert writer.stdout.readline() == "begun\n"
        seen = set()
        for _ in range(500):
            made = library.get("anna")
            assert (made.turns[0].codes == made.turns[0].speaker).all()
            seen.add(made.turns[0].speaker)
        assert len(seen) > 1
    finally:
        writer.communicate("stop\n", timeout=30)
    assert os.listdir(tmp_path) == ["anna.safetensors"]


def test_a_voice_is_removed_while_it_is_read(library, monkeypatch):
    for name in ("anna", "bob"):
        library.add(voice(name))
    read = voice_files.read_voice

    def late(path):
        path.unlink()
        return read(path)

    monkeypatch.setattr("csm_jax.voices.library.read_voice", late)
    with pytest.raises(UnknownVoiceError, match="no voice 'anna'; there are bob"):
        library.get("anna")
    assert list(library) == []


# --- disks that fail ---------------------------------------------------------------------------


def faults(monkeypatch, fail_at: int, error: BaseException) -> list[str]:
    """Lets the n-th call that reaches the disk fail; returns the list of those made."""
    calls: list[str] = []

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == fail_at:
                if name == "_write_fully":  # a disk fills up in the middle
                    original(args[0], memoryview(args[1])[: len(args[1]) // 2])
                raise error
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    around(safetensors_io, "_write_fully")
    around(os, "fsync")
    around(os, "replace")
    return calls


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "I/O"),
        KeyboardInterrupt(),
    ],
    ids=["full", "input/output", "ctrl-c"],
)
def test_whatever_fails_the_old_voice_stays(library, replace, error):
    library.add(voice())
    before = snapshot(library.directory)
    new = voice("anna" if replace else "bob", turn(seed=5))
    failed = 0
    for fail_at in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            if not replace:  # where links cannot be made, the rename has its turn
                patch.setattr(
                    os, "link", lambda *args: (_ for _ in ()).throw(OSError(95, "no links"))
                )
            calls = faults(patch, fail_at, error)
            try:
                library.add(new, replace=replace)
                break
            except (OSError, KeyboardInterrupt) as raised:
                caught = raised
        assert type(caught) is type(error)
        if isinstance(caught, OSError):
            assert caught.errno == error.errno
            assert str(library.directory) in str(caught)
            assert error.strerror in str(caught)
        failed += 1
        assert len(calls) == fail_at
        assert snapshot(library.directory) == before
    # the header, the codes, the header again, the sync, the rename
    assert failed == 5
    assert_same(library.get(new.name), new)


def test_a_disk_without_links(library, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    library.add(voice())
    with pytest.raises(FileExistsError, match="already has a voice 'anna'"):
        library.add(voice())
    # Somebody was quicker, between the look and the rename.
    monkeypatch.setattr(library, "_check_free", lambda name, replace: None)
    with pytest.raises(FileExistsError, match="already has a voice 'anna'"):
        library.add(voice("anna", turn(seed=5)))
    assert_same(library.get("anna"), voice())
    assert os.listdir(library.directory) == ["anna.safetensors"]


def test_a_full_disk_for_real(tmp_path):
    resource = pytest.importorskip("resource")
    library = VoiceLibrary(tmp_path)
    library.add(voice())
    script = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (mine, mine))
sys.stdin.readline()
try:
    library.add(voice("anna", 1), replace=True)
    print("added")
except OSError as error:
    print(error)
"""
    assert resource
    for limit in (0, 1, 100, 900, 5_000, 12_000):
        said, _ = process(script, tmp_path, limit).communicate("\n", timeout=30)
        assert "cannot write to the voices in" in said
        assert os.listdir(tmp_path) == ["anna.safetensors"]
        assert_same(library.get("anna"), voice())


def test_directories_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    library = VoiceLibrary(tmp_path / "file")
    for action in (library.names, lambda: library.check_add("anna"), lambda: library.add(voice())):
        with pytest.raises(NotADirectoryError, match=r"file"):
            action()
    assert (tmp_path / "file").read_text() == "mine"

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    library = VoiceLibrary(tmp_path / "voices")
    monkeypatch.setattr(Path, "touch", denied)  # a user whom no permission stops may run the tests
    with pytest.raises(
        PermissionError, match=r"cannot write to the voices in .*voices: Permission"
    ):
        library.check_add("anna")
    assert os.listdir(library.directory) == []


def test_the_check_before_adding_leaves_nothing(library):
    library.check_add("anna")
    assert os.listdir(library.directory) == []
    library.add(voice())
    before = snapshot(library.directory)
    library.check_add("bob")
    assert snapshot(library.directory) == before
