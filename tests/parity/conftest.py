"""Fixtures of the parity tests: one model in every implementation and dtype, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch

from csm_jax.config import CSMConfig, tiny

from . import inputs
from .cases import CodeCase, Implementation, Outputs, ValueCase

REFERENCES = ("sesame", "transformers")

# torchtune 0.6.1 norms float32 activations with bfloat16 scales, as Sesame's code relies on; torch 2.13
# only says that its fused kernel cannot.
MIXED_NORM = pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight:UserWarning"
)


class Models:
    """Implementations of one size over the same weights, and what each made of a case."""

    def __init__(self, config: CSMConfig, *, seed: int) -> None:
        self.config, self.seed = config, seed
        self._made: dict[tuple[str, ...], Any] = {}

    def _once(self, *key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def free(self) -> None:
        """Drops everything made so far."""
        self._made.clear()

    def weights(self, dtype: str) -> dict[str, torch.Tensor]:
        """Returns weights of "float32", "bfloat16", or "rounded": the latter's values in float32."""

        def make() -> dict[str, torch.Tensor]:
            if dtype == "rounded":
                return {name: x.float() for name, x in self.weights("bfloat16").items()}
            return inputs.random_weights(self.config, seed=self.seed, dtype=getattr(torch, dtype))

        return self._once("weights", dtype, make=make)

    def get(self, name: str, dtype: str) -> Any:
        """Returns "sesame", "transformers", "cpu" (ours) or "gpu" (ours) with `weights(dtype)`."""

        def make() -> Implementation:
            weights = self.weights(dtype)
            if name == "sesame":
                pytest.importorskip("torchtune")
                from .reference.sesame import SesameReference

                return SesameReference(self.config, weights)
            if name == "transformers":
                from .reference.transformers import TransformersReference

                return TransformersReference(self.config, weights)
            from .ours import Ours

            return Ours(self.config, weights, device=jax.devices(name)[0])

        return self._once(name, dtype, make=make)

    def outputs(self, case: ValueCase, name: str, dtype: str) -> Outputs:
        """Returns what an implementation makes of a case."""
        return self._once(
            case.name, name, dtype, make=lambda: case.run(self.get(name, dtype), self.config)
        )

    def codes(self, case: CodeCase, name: str, dtype: str) -> list[np.ndarray]:
        """Returns what an implementation generates for a case."""
        return self._once(
            case.name,
            name,
            dtype,
            make=lambda: self.get(name, dtype).generate(case.prompts(self.config), case.num_frames),
        )


@pytest.fixture(scope="session")
def tiny_models() -> Models:
    """The tiny model in every implementation."""
    return Models(tiny(), seed=1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keeps torch on one thread: tiny products gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
