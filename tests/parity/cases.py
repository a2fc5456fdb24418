"""The parity cases: one table of what is compared, and how closely, in each dtype.

A case runs one piece of the model, from a single norm to many generated frames, on any
implementation behind the `Implementation` interface: Sesame's architecture on torchtune, transformers'
and ours. The hermetic, full-size and CUDA tests all run this table.

float32: the largest absolute difference from a reference, as stated per case with its reason.

bfloat16: two correct implementations differ by roundings, and by how much depends on sizes and weights.
So all are held against the float32 result of the same weights: our error, as root mean square and at
its worst, may be at most so many times that of the reference that errs least. A softmax, a rotation or
a norm in bfloat16 shows in the first, a wrong corner in the second.

Codes: in float32 they must be identical. In bfloat16 near-ties fall either way, so each code is held
against the float32 logits of the very history it was generated in: logits off by at most e can make
greedy choice settle for a code at most 2e below the best, and e is measured on the references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from csm_jax.config import CSMConfig, LlamaConfig

from . import inputs
from .inputs import Prompt


class Implementation(Protocol):
    """One implementation of CSM, taken apart. Arrays are numpy: float32, int32 ids, bool masks.

    `part` is "backbone" or "decoder"; norm, scores, attention, mlp and block are its first block's.
    """

    name: str

    def embed_frames(self, frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns the backbone's inputs [B, T, D]."""
        ...

    def norm(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the attention norm of x [B, T, D]."""
        ...

    def scores(self, part: str, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns rotated q·k [B, N, T, T]; the same whichever way pairs are laid out."""
        ...

    def attention(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns causal attention of x [B, T, D], without norm and residual."""
        ...

    def mlp(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the MLP of x [B, T, D], without norm and residual."""
        ...

    def block(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns the first block of x [B, T, D]."""
        ...

    def stack(self, part: str, x: np.ndarray) -> np.ndarray:
        """Returns all blocks and the final norm of x [B, T, D]."""
        ...

    def heads(self, backbone: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits ([B, T, V], [B, C-1, V]) of hidden states ([B, T, D], [B, C-1, E])."""
        ...

    def logits(self, frames: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns teacher-forced logits ([B, T, V], [B, T-1, C-1, V])."""
        ...

    def generate(self, prompts: Sequence[Prompt], num_frames: int) -> list[np.ndarray]:
        """Returns greedy codes [n, C] after each prompt."""
        ...


Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ValueCase:
    """A comparison of numbers.

    Attributes:
        name: As in a test's id.
        run: What is computed, as named arrays.
        float32: Largest absolute difference allowed in float32 at the tiny size.
        reason: Why that much and no more.
        full_size: The same at CSM-1B's size; None where the sums' length does not matter.
        bfloat16_rms: Allowed root mean square error in multiples of the better reference's.
        bfloat16_worst: Allowed largest error in multiples of the better reference's.
        bfloat16_reason: Why not 1.
    """

    name: str
    run: Callable[[Implementation, CSMConfig], Outputs]
    float32: float
    reason: str
    full_size: float | None = None
    bfloat16_rms: float = 1.1
    bfloat16_worst: float = 2.0
    bfloat16_reason: str = "the same roundings, in sums of another order"


@dataclass(frozen=True, kw_only=True)
class CodeCase:
    """A comparison of greedy codes: identical in float32, of equal merit in bfloat16.

    Attributes:
        name: As in a test's id.
        prompts: What is continued, one prompt per row of the batch.
        num_frames: Frames per row.
        bfloat16_error: Allowed error of logits in multiples of the references'.
    """

    name: str
    prompts: Callable[[CSMConfig], Sequence[Prompt]]
    num_frames: int
    bfloat16_error: float = 1.5


def _sizes(config: CSMConfig, part: str) -> LlamaConfig:
    return config.backbone if part == "backbone" else config.decoder


def _x(config: CSMConfig, part: str) -> np.ndarray:
    """Returns activations [2, 32, D]: as many positions as the decoder has."""
    return inputs.activations(2, 32, _sizes(config, part).embed_dim, seed=11)


def _positions(config: CSMConfig, part: str) -> np.ndarray:
    """Returns positions [2, 32] over the whole length: Llama-3 scaling shows far from the start."""
    sizes = _sizes(config, part)
    spread = np.linspace(0, sizes.max_seq_len - 1, 32).astype(np.int32)
    return np.stack([spread, np.arange(32, dtype=np.int32)])


def _dialogue(config: CSMConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns padded frames and mask [3, T, C+1] of text, of audio in context, and of both."""
    return inputs.pad(
        [
            inputs.random_prompt(config, text=7, audio=9, seed=21),
            inputs.random_text(config, 12, seed=22),
            inputs.random_prompt(config, text=2, audio=3, seed=23),
        ]
    )


def _embedding(m: Implementation, config: CSMConfig) -> Outputs:
    frames, mask = _dialogue(config)
    real = mask.any(axis=-1)
    return {"frames": m.embed_frames(frames, mask)[real]}


def _heads(m: Implementation, config: CSMConfig) -> Outputs:
    hidden = inputs.activations(2, 3, config.backbone.embed_dim, seed=12)
    outputs = inputs.activations(2, config.num_codebooks - 1, config.decoder.embed_dim, seed=13)
    c0, rest = m.heads(hidden, outputs)
    return {"codebook0_head": c0, "audio_head": rest}


def _logits(m: Implementation, config: CSMConfig) -> Outputs:
    frames, mask = _dialogue(config)
    real = mask.any(axis=-1)
    c0, rest = m.logits(frames, mask)
    return {"c0": c0[real], "decoder": rest[real[:, 1:]]}


def _layer(method: str) -> Callable[[Implementation, CSMConfig], Outputs]:
    def run(m: Implementation, config: CSMConfig) -> Outputs:
        return {p: getattr(m, method)(p, _x(config, p)) for p in ("backbone", "decoder")}

    return run


def _rope(m: Implementation, config: CSMConfig) -> Outputs:
    return {p: m.scores(p, _x(config, p), _positions(config, p)) for p in ("backbone", "decoder")}


LOGITS_FLOAT32 = 1e-4
"""The project's promise for logits of all heads in float32, at every size."""

CASES: tuple[ValueCase | CodeCase, ...] = (
    ValueCase(
        name="embedding",
        run=_embedding,
        float32=1e-5,
        reason="a sum of 33 terms to about 6, in another order: a few units of 5e-7",
    ),
    ValueCase(
        name="norm",
        run=_layer("norm"),
        float32=2e-6,
        reason="one mean, one rsqrt and two products: a few roundings of values up to 6",
        bfloat16_rms=1.5,
        bfloat16_worst=2.5,
        bfloat16_reason=(
            "rounded before the scale, as in transformers and in the torchtune that Sesame pins (0.4.0); "
            "torchtune 0.6.1 rounds once, after it"
        ),
    ),
    ValueCase(
        name="rope",
        run=_rope,
        # cos and sin of angles up to 2,047: half a unit of the angle is 6e-5, in units of scores of
        # about 10, but both sides round the same product of the same float32 frequency.
        float32=2e-3,
        reason="angles up to 2,047 are known to 1e-4, scores reach 40",
    ),
    ValueCase(
        name="attention",
        run=_layer("attention"),
        float32=1e-5,
        reason="sums over the width in another order; softmax damps the scores' error",
    ),
    ValueCase(
        name="mlp",
        run=_layer("mlp"),
        float32=1e-5,
        reason="sums over width and MLP width in another order, values up to 4",
    ),
    ValueCase(
        name="block",
        run=_layer("block"),
        float32=1e-5,
        reason=(
            "attention and MLP on a stream of the same size; sums of 2,048 and 8,192 terms at full size"
        ),
        full_size=2e-5,
        bfloat16_rms=1.15,
        bfloat16_reason="the norm's second rounding",
    ),
    ValueCase(
        name="stack",
        run=_layer("stack"),
        float32=2e-5,
        reason=(
            "the block's difference through a few more blocks, brought to unit size by the norm; 16 "
            "blocks of width 2,048 add up to four times as much (torch against torch: 1.2e-5)"
        ),
        full_size=LOGITS_FLOAT32,
        bfloat16_rms=1.15,
        bfloat16_reason="the norm's second rounding",
    ),
    ValueCase(
        name="heads",
        run=_heads,
        float32=1e-5,
        reason=(
            "one sum over the width in another order, values up to 10; at full size both references "
            "are 1.0e-5 from the float64 product, ours 0.6e-5"
        ),
        full_size=2e-5,
    ),
    ValueCase(
        name="logits",
        run=_logits,
        float32=LOGITS_FLOAT32,
        reason="the project's promise; both references stay ten times closer to each other",
    ),
    CodeCase(
        name="one-frame",
        prompts=lambda config: [inputs.random_prompt(config, text=7, audio=9, seed=31)],
        num_frames=1,
    ),
    CodeCase(
        name="many-frames",
        prompts=lambda config: [inputs.random_prompt(config, text=5, audio=4, seed=32)],
        num_frames=32,
    ),
    CodeCase(
        name="mixed-batch",
        prompts=lambda config: [
            inputs.random_prompt(config, text=6, audio=8, seed=33),
            inputs.random_text(config, 3, seed=34),
            inputs.random_prompt(config, text=1, audio=1, seed=35),
            inputs.random_text(config, 17, seed=36),
        ],
        num_frames=6,
    ),
)

VALUE_CASES = tuple(c for c in CASES if isinstance(c, ValueCase))
CODE_CASES = tuple(c for c in CASES if isinstance(c, CodeCase))


# --- checks -------------------------------------------------------------------------------------


def difference(a: Outputs, b: Outputs) -> dict[str, float]:
    """Returns the largest absolute difference of each named array."""
    return {name: float(np.abs(a[name] - b[name]).max()) for name in b}


def check_float32(
    case: ValueCase, ours: Outputs, reference: Outputs, *, full_size: bool = False
) -> None:
    """Raises AssertionError where `ours` is further from `reference` than the case allows."""
    allowed = (full_size and case.full_size) or case.float32
    for name, value in difference(ours, reference).items():
        # Written so that NaN fails.
        assert value <= allowed, (
            f"{case.name}/{name}: difference {value:.3g} exceeds {allowed:.3g} ({case.reason})"
        )


def check_bfloat16(
    case: ValueCase, ours: Outputs, references: Sequence[Outputs], truth: Outputs
) -> None:
    """Raises AssertionError where `ours` errs more than the better reference by more than allowed."""
    for name, exact in truth.items():
        for what, size, allowed in (
            ("root mean square", lambda e: float(np.sqrt(np.mean(e**2))), case.bfloat16_rms),
            ("largest", lambda e: float(np.abs(e).max()), case.bfloat16_worst),
        ):
            mine = size(ours[name] - exact)
            theirs = min(size(reference[name] - exact) for reference in references)
            assert mine <= allowed * theirs, (
                f"{case.name}/{name}: {what} error {mine:.3g} is {mine / theirs:.3f} times the "
                f"reference's {theirs:.3g}; {allowed} is allowed ({case.bfloat16_reason})"
            )


def judged(
    m: Implementation, config: CSMConfig, prompt: Prompt, codes: np.ndarray
) -> inputs.Choices:
    """Returns how codes [n, C] after `prompt` fare under the logits of `m` for that very history."""
    whole = inputs.join(prompt, inputs.audio_frames(config, codes))
    c0, rest = m.logits(whole.frames[None], whole.mask[None])
    return inputs.judge(config, prompt, codes, c0[0], rest[0])


def check_codes_identical(
    config: CSMConfig,
    prompts: Sequence[Prompt],
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    reference: Implementation,
) -> None:
    """Raises AssertionError where codes differ, and says whether a near-tie is to blame."""
    for row, (prompt, mine, expected) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if np.array_equal(mine, expected):
            continue
        verdict = "nothing was generated"
        if len(mine):
            verdict = judged(reference, config, prompt, mine).describe()
        same = min(len(mine), len(expected))
        differing = np.argwhere(mine[:same] != expected[:same])
        first = differing[0].tolist() if len(differing) else "none"
        raise AssertionError(
            f"row {row}: {mine.shape} against {reference.name}'s {expected.shape}, first difference "
            f"at [frame, codebook] {first}. Under {reference.name}'s logits for our codes: {verdict}"
        )


def check_codes_of_equal_merit(
    case: CodeCase,
    config: CSMConfig,
    ours: Sequence[np.ndarray],
    references: Sequence[Implementation],
    truth: Implementation,
) -> None:
    """Raises AssertionError where a code is worse than the references' own errors explain."""
    for prompt, codes in zip(case.prompts(config), ours, strict=True):
        assert len(codes) == case.num_frames, f"{len(codes)} frames instead of {case.num_frames}"
        whole = inputs.join(prompt, inputs.audio_frames(config, codes))
        frames, mask = whole.frames[None], whole.mask[None]
        exact = truth.logits(frames, mask)
        error = max(
            float(np.abs(a - b).max())
            for reference in references
            for a, b in zip(reference.logits(frames, mask), exact, strict=True)
        )
        choices = inputs.judge(config, prompt, codes, exact[0][0], exact[1][0])
        allowed = 2 * case.bfloat16_error * error
        assert choices.deficit.max() <= allowed, f"{choices.describe()}; allowed {allowed:.3g}"
