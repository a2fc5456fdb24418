"""Makes a row of a corpus the request that the synthesizer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_jax.corpus.files import sha256_of
from csm_jax.corpus.manifest import SETTINGS, Row
from csm_jax.corpus.plan import row_seed

if TYPE_CHECKING:
    from csm_jax.request import Request


@dataclass(frozen=True, kw_only=True)
class RequestMaker:
    """Reads what a row names, and fills in what it leaves open.

    Attributes:
        base: What paths are relative to.
        seed: The corpus's.
        voices: By name.
        defaults: Of `SETTINGS`, for rows that do not say.
    """

    base: Path
    seed: int
    voices: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __call__(self, row: Row) -> tuple[Request, list[str]]:
        """Returns the request and the SHA-256 of the files of its context's recordings.

        Raises:
            ValueError, OSError: A recording cannot be read, or a value is not one for a request.
        """
        from csm_jax.audio import read_audio
        from csm_jax.prompt import Segment
        from csm_jax.request import Request

        context, heard = [], []
        for turn in row.get("context", ()):
            path = self.base / turn["audio"]
            audio, rate = read_audio(path)
            heard.append(sha256_of(path))
            context.append(
                Segment(speaker=turn["speaker"], text=turn["text"], audio=audio, sample_rate=rate)
            )
        options = {**self.defaults, **{name: row[name] for name in SETTINGS if name in row}}
        if "voice" in row:
            options["voice"] = self.voices[row["voice"]]
        request = Request(
            text=row["text"],
            speaker=row["speaker"],
            context=context,
            seed=row_seed(self.seed, row),
            **options,
        )
        return request, heard
