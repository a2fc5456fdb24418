"""Text before it is spoken: writing it as it is said, and cutting long texts into pieces.

No array library and no model: plain functions from strings to strings.
"""

from csm_jax.text.normalisation import languages, normalise
from csm_jax.text.splitting import (
    DEFAULT_MAX_CHARACTERS,
    LEAST_MAX_CHARACTERS,
    Chunk,
    chunks,
    sentences,
)

__all__ = [
    "DEFAULT_MAX_CHARACTERS",
    "LEAST_MAX_CHARACTERS",
    "Chunk",
    "chunks",
    "languages",
    "normalise",
    "sentences",
]
