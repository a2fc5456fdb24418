"""Sesame's Conversational Speech Model on JAX: text and earlier turns in, 24 kHz speech out.

    Speak       load_csm_1b    Generator    Request    Segment    GenerationError
    Model       CSM            CSMConfig    csm_1b     tiny
    Weights     load_checkpoint             save_checkpoint

Each name is imported when it is first used, so that `import csm_jax` takes milliseconds. Below these:
`csm_jax.model` (teacher-forced logits), `csm_jax.generate` (prefill, insert, generate_frames),
`csm_jax.prompt`, `csm_jax.sharding`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csm_jax.config import CSMConfig, csm_1b, tiny
    from csm_jax.model import CSM
    from csm_jax.pipeline import GenerationError, Generator, load_csm_1b
    from csm_jax.prompt import Segment
    from csm_jax.request import Request
    from csm_jax.weights import load_checkpoint, save_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "load_csm_1b": "pipeline",
    "Generator": "pipeline",
    "Request": "request",
    "GenerationError": "pipeline",
    "Segment": "prompt",
    "CSM": "model",
    "CSMConfig": "config",
    "csm_1b": "config",
    "tiny": "config",
    "load_checkpoint": "weights",
    "save_checkpoint": "weights",
}

__all__ = [
    "CSM",
    "CSMConfig",
    "GenerationError",
    "Generator",
    "Request",
    "Segment",
    "csm_1b",
    "load_checkpoint",
    "load_csm_1b",
    "save_checkpoint",
    "tiny",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
