"""Model sizes, presets and audio constants, and the two published forms of `config.json`.

Imports nothing of ours and no jax, so it loads in milliseconds. Every field that changes numbers must
be given: presets are functions, not defaults.

Sources: SesameAILabs/csm `models.py` (flavours `llama-1B`, `llama-100M`), transformers
`configuration_csm.py`, MisoLabsAI/MisoTTS `models.py` (`llama-8B`, `llama-300M`), Marvis
`flavors.py` (`llama-250M`, `llama-60M`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SAMPLE_RATE = 24_000
"""Samples per second of all audio inside the project (Mimi)."""
FRAME_RATE = 12.5
"""Audio frames per second (Mimi)."""
SAMPLES_PER_FRAME = 1_920
"""Audio samples per frame: 24,000 / 12.5."""
FRAME_MS = 80
"""Milliseconds per frame: 1,000 / 12.5."""

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of one Llama-style transformer (backbone or decoder).

    Attributes:
        num_layers: Number of blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of one head; even.
        embed_dim: Width of the residual stream.
        intermediate_dim: Width of the gated MLP.
        max_seq_len: Most positions one row may hold (the decoder: one per codebook).
        norm_eps: Epsilon inside RMSNorm.
        rope_base: RoPE theta.
        scale_factor: Llama-3 RoPE scaling: low frequencies are divided by this.
        low_freq_factor: Wavelengths above `old_context_len / low_freq_factor` are fully scaled.
        high_freq_factor: Wavelengths below `old_context_len / high_freq_factor` are not scaled.
        old_context_len: Context length the unscaled RoPE was trained for.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float
    scale_factor: float
    low_freq_factor: float
    high_freq_factor: float
    old_context_len: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(
                    f"LlamaConfig.{field.name} must be a positive number, got {value!r}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class CSMConfig:
    """A CSM-shaped model: a backbone over frames and a decoder over the codebooks of one frame.

    Attributes:
        backbone: The large transformer.
        decoder: The small transformer; its `max_seq_len` is `num_codebooks`.
        text_vocab_size: Rows of the text embedding table.
        audio_vocab_size: Rows per codebook of the audio table and width of every audio head
            (2,051 in CSM-1B: 2,048 codes and 3 reserved).
        codebook_size: Codes Mimi can decode (2,048); higher ids are never sampled.
        num_codebooks: Codebooks per frame (32).
        tie_codebooks_embeddings: Whether backbone and decoder read the same audio table
            (transformers' name; true for every published checkpoint).
    """

    backbone: LlamaConfig
    decoder: LlamaConfig
    text_vocab_size: int
    audio_vocab_size: int
    codebook_size: int
    num_codebooks: int
    tie_codebooks_embeddings: bool

    def __post_init__(self) -> None:
        for name in ("text_vocab_size", "audio_vocab_size", "codebook_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"CSMConfig.{name} must be a positive integer, got {value!r}")
        if self.num_codebooks < 2:
            raise ValueError(f"num_codebooks must be at least 2, got {self.num_codebooks}")
        if self.codebook_size > self.audio_vocab_size:
            raise ValueError(
                f"codebook_size={self.codebook_size} exceeds audio_vocab_size={self.audio_vocab_size}"
            )
        if self.decoder.max_seq_len != self.num_codebooks:
            raise ValueError(
                f"decoder.max_seq_len={self.decoder.max_seq_len} must equal "
                f"num_codebooks={self.num_codebooks}"
            )


# --- presets -----------------------------------------------------------------------------------

_CODEBOOKS = 32
_RESERVED_CODES = 3  # ids 2048..2050 of CSM-1B's 2,051; transformers pads with the last


def _llama(
    *, layers: int, heads: int, kv_heads: int, dim: int, mlp: int, positions: int
) -> LlamaConfig:
    # RoPE and norm numbers are those of torchtune's llama3_2 builder, shared by every CSM flavour.
    return LlamaConfig(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        embed_dim=dim,
        intermediate_dim=mlp,
        max_seq_len=positions,
        norm_eps=1e-5,
        rope_base=500_000.0,
        scale_factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        old_context_len=8192.0,
    )


FLAVORS: Mapping[str, LlamaConfig] = {
    "llama-1B": _llama(layers=16, heads=32, kv_heads=8, dim=2048, mlp=8192, positions=2048),
    "llama-100M": _llama(layers=4, heads=8, kv_heads=2, dim=1024, mlp=8192, positions=_CODEBOOKS),
    "llama-8B": _llama(layers=32, heads=32, kv_heads=8, dim=4096, mlp=14336, positions=2048),
    "llama-300M": _llama(layers=8, heads=24, kv_heads=6, dim=1536, mlp=6912, positions=_CODEBOOKS),
    "llama-250M": _llama(layers=6, heads=12, kv_heads=3, dim=1536, mlp=8192, positions=2048),
    "llama-60M": _llama(layers=4, heads=8, kv_heads=2, dim=1024, mlp=4096, positions=_CODEBOOKS),
}
"""Named transformer sizes, as in the `backbone_flavor` and `decoder_flavor` of a Sesame `config.json`."""


def _csm(backbone: str, decoder: str, *, text_vocab_size: int) -> CSMConfig:
    return CSMConfig(
        backbone=FLAVORS[backbone],
        decoder=FLAVORS[decoder],
        text_vocab_size=text_vocab_size,
        audio_vocab_size=2051,
        codebook_size=2048,
        num_codebooks=_CODEBOOKS,
        tie_codebooks_embeddings=True,
    )


def csm_1b() -> CSMConfig:
    """Returns Sesame's CSM-1B: 1,552,791,552 parameters (SesameAILabs/csm `models.py`)."""
    return _csm("llama-1B", "llama-100M", text_vocab_size=128_256)


def miso_tts_8b() -> CSMConfig:
    """Returns the CSM-shaped MisoTTS-8B (MisoLabsAI/MisoTTS `models.py`)."""
    return _csm("llama-8B", "llama-300M", text_vocab_size=128_256)


def marvis_250m() -> CSMConfig:
    """Returns the CSM-shaped Marvis-250M with its SmolLM2 text vocabulary (Marvis `flavors.py`)."""
    return _csm("llama-250M", "llama-60M", text_vocab_size=49_152)


def tiny() -> CSMConfig:
    """Returns a CSM of about 3 million parameters for tests: every part, no size."""
    return CSMConfig(
        backbone=_llama(layers=2, heads=8, kv_heads=4, dim=128, mlp=256, positions=2048),
        decoder=_llama(layers=2, heads=4, kv_heads=2, dim=64, mlp=128, positions=_CODEBOOKS),
        text_vocab_size=512,
        audio_vocab_size=259,
        codebook_size=256,
        num_codebooks=_CODEBOOKS,
        tie_codebooks_embeddings=True,
    )


# --- published config.json, read and written ---------------------------------------------------


def from_published(data: Mapping[str, Any]) -> CSMConfig:
    """Returns the config described by a published `config.json`, Sesame's or transformers'.

    A merged file holding both sets of keys (as on the hub) is read by its Sesame keys.

    Args:
        data: The parsed JSON object.

    Raises:
        ValueError: Neither set of keys is there, a flavour is unknown, or a value contradicts
            the architecture (biases, another activation, another RoPE type).
    """
    if "backbone_flavor" in data:
        return _from_sesame(data)
    if "depth_decoder_config" in data:
        return _from_transformers(data)
    raise ValueError(
        "config.json is neither Sesame's (no 'backbone_flavor') nor transformers' "
        f"(no 'depth_decoder_config'); its keys are {sorted(data)}"
    )


def read_config(path: str | Path) -> CSMConfig:
    """Returns the config in the `config.json` at `path` (a file, or a directory holding one).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a JSON object or does not describe a CSM.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    try:
        return from_published(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _required(data: Mapping[str, Any], key: str) -> Any:
    if key not in data:
        raise ValueError(f"config.json lacks the key {key!r}")
    return data[key]


def _from_sesame(data: Mapping[str, Any]) -> CSMConfig:
    num_codebooks = _required(data, "audio_num_codebooks")
    audio_vocab_size = _required(data, "audio_vocab_size")
    return CSMConfig(
        backbone=_read_flavor(_required(data, "backbone_flavor")),
        decoder=dataclasses.replace(
            _read_flavor(_required(data, "decoder_flavor")), max_seq_len=num_codebooks
        ),
        text_vocab_size=_required(data, "text_vocab_size"),
        audio_vocab_size=audio_vocab_size,
        codebook_size=data.get("audio_codebook_size", audio_vocab_size - _RESERVED_CODES),
        num_codebooks=num_codebooks,
        tie_codebooks_embeddings=True,
    )


def _read_flavor(flavor: Any) -> LlamaConfig:
    if isinstance(flavor, Mapping):
        try:
            return LlamaConfig(**flavor)
        except TypeError as error:
            raise ValueError(f"sizes of a custom flavour: {error}") from error
    if flavor not in FLAVORS:
        raise ValueError(f"unknown flavour {flavor!r}; known are {sorted(FLAVORS)}")
    return FLAVORS[flavor]


def to_sesame(config: CSMConfig) -> dict[str, Any]:
    """Returns Sesame's `config.json`; sizes without a published flavour are written out in full.

    Raises:
        ValueError: Sesame's layout has no place for an untied decoder table.
    """
    if not config.tie_codebooks_embeddings:
        raise ValueError(
            "Sesame's layout holds one audio table, but tie_codebooks_embeddings is false"
        )

    def flavor(sizes: LlamaConfig) -> str | dict[str, Any]:
        names = [name for name, known in FLAVORS.items() if known == sizes]
        return names[0] if names else dataclasses.asdict(sizes)

    data = {
        "audio_num_codebooks": config.num_codebooks,
        "audio_vocab_size": config.audio_vocab_size,
        "backbone_flavor": flavor(config.backbone),
        "decoder_flavor": flavor(config.decoder),
        "text_vocab_size": config.text_vocab_size,
    }
    if config.codebook_size != config.audio_vocab_size - _RESERVED_CODES:
        data["audio_codebook_size"] = config.codebook_size
    return data


def _from_transformers(data: Mapping[str, Any]) -> CSMConfig:
    depth = _required(data, "depth_decoder_config")
    num_codebooks = _required(data, "num_codebooks")
    audio_vocab_size = _required(data, "vocab_size")
    for owner, name, values in (
        ("num_codebooks", "depth_decoder_config.num_codebooks", (num_codebooks, depth)),
        ("vocab_size", "depth_decoder_config.vocab_size", (audio_vocab_size, depth)),
    ):
        mine, theirs = values[0], _required(values[1], owner)
        if mine != theirs:
            raise ValueError(f"{owner}={mine} but {name}={theirs}")
    if _required(depth, "backbone_hidden_size") != _required(data, "hidden_size"):
        raise ValueError(
            f"depth_decoder_config.backbone_hidden_size={depth['backbone_hidden_size']} but "
            f"hidden_size={data['hidden_size']}"
        )
    codec = data.get("codec_config") or {}
    return CSMConfig(
        backbone=_read_transformers_llama(
            data, max_seq_len=_required(data, "max_position_embeddings")
        ),
        decoder=_read_transformers_llama(depth, max_seq_len=num_codebooks),
        text_vocab_size=_required(data, "text_vocab_size"),
        audio_vocab_size=audio_vocab_size,
        codebook_size=codec.get("codebook_size", audio_vocab_size - _RESERVED_CODES),
        num_codebooks=num_codebooks,
        tie_codebooks_embeddings=data.get("tie_codebooks_embeddings", True),
    )


def _read_transformers_llama(data: Mapping[str, Any], *, max_seq_len: int) -> LlamaConfig:
    for key, value in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if data.get(key, value) != value:
            raise ValueError(f"{key}={data[key]!r} is not supported: CSM has {key}={value!r}")
    # 5.x keeps theta inside rope_parameters; 4.52 has rope_theta beside rope_scaling.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "llama3":
        raise ValueError(f"rope_type={rope_type!r} is not supported: CSM uses 'llama3'")
    heads, dim = _required(data, "num_attention_heads"), _required(data, "hidden_size")
    # Only the two ratios matter, and transformers writes other numbers with the same ratios
    # (original 1024 and 16 instead of 8192): keep them in the form with low_freq_factor 1.
    low = _required(rope, "low_freq_factor")
    return LlamaConfig(
        num_layers=_required(data, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_required(data, "num_key_value_heads"),
        head_dim=data.get("head_dim") or dim // heads,
        embed_dim=dim,
        intermediate_dim=_required(data, "intermediate_size"),
        max_seq_len=max_seq_len,
        norm_eps=_required(data, "rms_norm_eps"),
        rope_base=float(
            rope["rope_theta"] if "rope_theta" in rope else _required(data, "rope_theta")
        ),
        scale_factor=float(_required(rope, "factor")),
        low_freq_factor=1.0,
        high_freq_factor=_required(rope, "high_freq_factor") / low,
        old_context_len=_required(rope, "original_max_position_embeddings") / low,
    )


def to_transformers(config: CSMConfig) -> dict[str, Any]:
    """Returns the model half of transformers' `config.json` (5.x and 4.52 both read it).

    The codec's half (`codec_config`) is the caller's to add. Special token ids are CSM-1B's
    (transformers `configuration_csm.py`), except where the text vocabulary is too small for them.
    """
    last_text_id = config.text_vocab_size - 1
    return {
        "architectures": ["CsmForConditionalGeneration"],
        "model_type": "csm",
        "num_codebooks": config.num_codebooks,
        "vocab_size": config.audio_vocab_size,
        "text_vocab_size": config.text_vocab_size,
        "max_position_embeddings": config.backbone.max_seq_len,
        "codebook_pad_token_id": config.audio_vocab_size - 1,
        "codebook_eos_token_id": 0,
        "bos_token_id": min(128_000, last_text_id),
        "eos_token_id": None,
        "pad_token_id": min(128_002, last_text_id),
        "audio_token_id": min(128_002, last_text_id),
        "audio_eos_token_id": min(128_003, last_text_id),
        "tie_codebooks_embeddings": config.tie_codebooks_embeddings,
        **_write_transformers_llama(config.backbone),
        "depth_decoder_config": {
            "model_type": "csm_depth_decoder_model",
            "num_codebooks": config.num_codebooks,
            "vocab_size": config.audio_vocab_size,
            "backbone_hidden_size": config.backbone.embed_dim,
            # transformers counts the backbone's hidden state and all codebooks.
            "max_position_embeddings": config.num_codebooks + 1,
            **_write_transformers_llama(config.decoder),
        },
    }


def _write_transformers_llama(sizes: LlamaConfig) -> dict[str, Any]:
    # transformers checks original < max_position_embeddings in places, so it publishes small
    # originals; the ratios original/low and original/high are what the frequencies depend on.
    original = 16
    rope = {
        "rope_type": "llama3",
        "factor": sizes.scale_factor,
        "low_freq_factor": original * sizes.low_freq_factor / sizes.old_context_len,
        "high_freq_factor": original * sizes.high_freq_factor / sizes.old_context_len,
        "original_max_position_embeddings": original,
    }
    return {
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_size": sizes.embed_dim,
        "intermediate_size": sizes.intermediate_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope_base,
        "rope_scaling": rope,
        "rope_parameters": {**rope, "rope_theta": sizes.rope_base},
    }


def default_dtype(platform: str) -> Dtype:
    """Returns the dtype of weights and activations on a JAX platform when none is asked for.

    bfloat16 on accelerators, as Sesame runs the model; float32 on CPU, where XLA multiplies bfloat16
    matrices by vectors many times slower than float32 ones, and where parity is checked.
    """
    return "float32" if platform == "cpu" else "bfloat16"
