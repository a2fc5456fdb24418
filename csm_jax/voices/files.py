"""A voice as a safetensors file.

It holds `turns.<i>.codes` (int32 [frames, codebooks]), in format 2 also `vectors` (float32 [positions,
embed_dim]), and in the header's metadata the format's version, a JSON text with everything else, and a
hash over all. It is read whole before it is looked at, so that a voice replaced meanwhile is either the
old or the new one.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax import __version__
from csm_jax.config import FRAME_RATE, SAMPLE_RATE
from csm_jax.voices.voice import Voice, VoiceTurn, portable_bytes
from csm_jax.weights.safetensors_io import CHECKSUM_KEY, Output, load_json, write_safetensors
from csm_jax.weights.tables import TensorSpec

SUFFIX = ".safetensors"
_MAX_FILE_BYTES = 1 << 24  # a voice is about 0.1 MB; other safetensors files are not read
_FORMAT_KEY, _VOICE_KEY, _HASH_KEY = "csm_jax.voice.format", "csm_jax.voice", "csm_jax.voice.hash"
_TURNS, _VECTORS = "1", "2"  # a voice of turns alone is written so that older versions read it
_VECTORS_NAME = "vectors"


class VoiceFileError(ValueError):
    """A file is damaged, is no voice, or was written by a newer version."""


def _hash(text: str, arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=32, person=b"csm_jax.file")
    digest.update(b"%d\n" % len(text) + text.encode())
    for array in arrays:
        digest.update(b"%d %d\n" % array.shape + portable_bytes(array))
    return digest.hexdigest()


def _codec(num_codebooks: int, codebook_size: int) -> dict[str, float]:
    return {
        "num_codebooks": num_codebooks,
        "codebook_size": codebook_size,
        "sample_rate": SAMPLE_RATE,
        "frame_rate": FRAME_RATE,
    }


def write_voice(path: Path, voice: Voice) -> None:
    """Writes a new file and syncs it to disk.

    Raises:
        OSError: The file exists or cannot be written.
    """
    arrays = {} if voice.vectors is None else {_VECTORS_NAME: voice.vectors}
    arrays |= {f"turns.{i}.codes": turn.codes for i, turn in enumerate(voice.turns)}
    text = json.dumps(
        {
            "name": voice.name,
            "turns": [{"speaker": turn.speaker, "text": turn.text} for turn in voice.turns],
            "provenance": voice.provenance,
            "codec": _codec(voice.num_codebooks, voice.codebook_size),
        }
    )
    outputs = [
        Output(name, TensorSpec(str(array.dtype), array.shape), lambda array=array: [array])
        for name, array in arrays.items()
    ]
    metadata = {
        _FORMAT_KEY: _TURNS if voice.vectors is None else _VECTORS,
        _VOICE_KEY: text,
        _HASH_KEY: _hash(text, [*arrays.values()]),
    }
    write_safetensors(path, outputs, metadata=metadata, progress=lambda count: None)


def read_voice(path: Path) -> Voice:
    """Returns the voice in a file.

    Raises:
        VoiceFileError: It is not as it was written, is no voice, or was written by a newer version.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise VoiceFileError(f"{path} is no voice: it is larger than {_MAX_FILE_BYTES:,} bytes")
    try:
        metadata, tensors = _parse(data)
    except ValueError as error:
        raise VoiceFileError(
            f"{path} is damaged or no voice ({error}): put its copy back, or add the voice again"
        ) from error
    written_by = metadata.get(_FORMAT_KEY)
    if written_by is None:
        raise VoiceFileError(f"{path} is no voice of csm_jax, but some other safetensors file")
    if written_by not in (_TURNS, _VECTORS):
        raise VoiceFileError(
            f"{path} has format {reprlib.repr(written_by)} and this csm_jax ({__version__}) reads "
            f"{_TURNS} and {_VECTORS}: install a newer one"
        )
    try:
        return _voice(metadata, tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise VoiceFileError(
            f"{path} is damaged ({reason}): put its copy back, or add the voice again"
        ) from error


def _parse(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    # The library's own reader returns either the tensors or the metadata of bytes, not both.
    from safetensors import SafetensorError, deserialize

    try:
        tensors = {}
        for name, tensor in deserialize(data):
            floats = name == _VECTORS_NAME
            if tensor["dtype"] != ("F32" if floats else "I32"):
                raise ValueError(f"the tensor {name} is not {'float32' if floats else 'int32'}")
            numbers = np.frombuffer(tensor["data"], "<f4" if floats else "<i4")
            tensors[name] = numbers.reshape(tensor["shape"])
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    size = int.from_bytes(data[:8], "little")
    header = load_json(data[8 : 8 + size].decode(), where="its header")
    return header.get("__metadata__", {}), tensors


def _voice(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Voice:
    text = metadata[_VOICE_KEY]
    vectors = tensors.get(_VECTORS_NAME)
    names = [] if vectors is None else [_VECTORS_NAME]
    count = len(tensors) - len(names)
    arrays = [tensors[name] for name in (*names, *(f"turns.{i}.codes" for i in range(count)))]
    if any(array.ndim != 2 for array in arrays) or metadata[_HASH_KEY] != _hash(text, arrays):
        raise ValueError("its content does not have the hash it was written with")
    if (metadata[_FORMAT_KEY] == _VECTORS) != (vectors is not None):
        raise ValueError(f"format {metadata[_FORMAT_KEY]} is not that of its tensors")
    # Nothing rests on the writer's own checksums, but with them no bit of a file goes unchecked.
    sums = {name: f"{zlib.crc32(tensor.data):08x}" for name, tensor in tensors.items()}
    if load_json(metadata[CHECKSUM_KEY], where="its metadata") != sums:
        raise ValueError("its tensors do not have the checksums they were written with")
    content = load_json(text, where="its metadata")
    voice = Voice(
        name=content["name"],
        turns=tuple(
            VoiceTurn(speaker=turn["speaker"], text=turn["text"], codes=codes)
            for turn, codes in zip(content["turns"], arrays[len(names) :], strict=True)
        ),
        codebook_size=content["codec"]["codebook_size"],
        provenance=content["provenance"],
        vectors=vectors,
        # Of turns it is what they have, and compared below.
        num_codebooks=0 if count else content["codec"]["num_codebooks"],
    )
    if content["codec"] != _codec(voice.num_codebooks, voice.codebook_size):
        raise ValueError(f"its codec is not Mimi: {content['codec']}")
    return voice
