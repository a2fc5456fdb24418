"""The names of Mimi's tensors in its two published layouts: one table of rules each.

A rule is (our path, foreign name, transform), with `{stage}`, `{block}`, `{layer}` and `{codebook}`
for the numbers of our tree, and `{n}` for the place in SEANet's sequence of modules that both
layouts count by. `bind` writes a table out for one config, `check` holds it against the tensors
that are there; a binding read forward loads, backward exports.

Sources: kyutai-labs/moshi 0.2.13 (modules' names; the spellings accepted are those of its load
hooks), transformers `modeling_mimi.py` and `convert_mimi_checkpoint_to_pytorch.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from csm_jax.mimi.config import MimiConfig
from csm_jax.weights.errors import WeightsError
from csm_jax.weights.tables import FLOAT_DTYPES, TensorSpec, flatten
from csm_jax.weights.transforms import (
    IDENTITY,
    PERMUTE_ROPE,
    TRANSPOSE_LAST_TWO,
    Shape,
    Transform,
)

CODEC_PREFIX = "codec_model."
"""What a transformers CSM checkpoint puts before the names of its Mimi."""

CONV = TRANSPOSE_LAST_TWO
"""torch's Conv1d `[out, in, kernel]` to `[out, kernel, in]`."""

CONV_TRANSPOSED = Transform(
    "reverse_axes",
    lambda x, _: x.transpose(2, 1, 0),
    lambda x, _: x.transpose(2, 1, 0),
    lambda shape: shape[::-1],
)
"""torch's ConvTranspose1d `[in, out, kernel]` to `[kernel, out, in]`."""

POINTWISE = Transform(
    "drop_kernel_axis",
    lambda x, _: x[:, :, 0],
    lambda x, _: x[:, :, None],
    lambda shape: (*shape, 1),
)
"""A Conv1d of kernel 1, `[out, in, 1]`, to a projection `[out, in]`."""

DEPTHWISE_TRANSPOSED = Transform(
    "depthwise_transposed",
    lambda x, _: x[:, 0].T,
    lambda x, _: x.T[:, None],
    lambda shape: (shape[1], 1, shape[0]),
)
"""A ConvTranspose1d with a group per channel, `[channels, 1, kernel]`, to `[kernel, channels]`."""


@dataclass(frozen=True)
class MimiRule:
    """One line of a table.

    Attributes:
        ours: Paths in the parameter tree, dotted, with their transforms. Several are stacked in one
            foreign tensor along its first axis, in this order.
        theirs: Name in the layout, then other spellings that are read but not written.
    """

    ours: tuple[tuple[str, Transform], ...]
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class MimiLayout:
    """One way of naming and arranging the tensors of a Mimi.

    Attributes:
        name: As given to `layout=`.
        rules: The table.
        markers: Beginnings of names by which the layout is told: the split quantizer's, as names
            like `encoder.layers` are other models' too.
    """

    name: str
    rules: tuple[MimiRule, ...]
    markers: tuple[str, ...]


def _rule(ours: str, *theirs: str, transform: Transform = IDENTITY) -> MimiRule:
    return MimiRule(((ours, transform),), theirs)


def _conv(ours: str, theirs: str, transform: Transform = CONV) -> tuple[MimiRule, ...]:
    return (
        _rule(f"{ours}.weight", f"{theirs}.weight", transform=transform),
        _rule(f"{ours}.bias", f"{theirs}.bias"),
    )


def _seanet(*, sequence: str, conv: str, transposed: str) -> Iterator[MimiRule]:
    for half in ("encoder", "decoder"):
        place = f"{half}.{sequence}.{{n}}"
        residual = f"{half}.stages.{{stage}}.residual.{{block}}"
        yield from _conv(f"{half}.conv_in", f"{place}.{conv}")
        # Modules 0 and 2 of a block are its activations.
        yield from _conv(f"{residual}.conv1", f"{place}.block.1.{conv}")
        yield from _conv(f"{residual}.conv2", f"{place}.block.3.{conv}")
        yield from _conv(f"{half}.conv_out", f"{place}.{conv}")
    yield from _conv("encoder.stages.{stage}.down", f"encoder.{sequence}.{{n}}.{conv}")
    yield from _conv(
        "decoder.stages.{stage}.up", f"decoder.{sequence}.{{n}}.{transposed}", CONV_TRANSPOSED
    )


def _moshi_rules() -> Iterator[MimiRule]:
    yield from _seanet(sequence="model", conv="conv.conv", transposed="convtr.convtr")
    yield _rule("downsample.weight", "downsample.conv.conv.conv.weight", transform=CONV)
    yield _rule(
        "upsample.weight", "upsample.convtr.convtr.convtr.weight", transform=DEPTHWISE_TRANSPOSED
    )
    for half in ("encoder_transformer", "decoder_transformer"):
        ours, theirs = f"{half}.layers.{{layer}}", f"{half}.transformer.layers.{{layer}}"
        yield MimiRule(
            (
                (f"{ours}.attn.q_proj", PERMUTE_ROPE),
                (f"{ours}.attn.k_proj", PERMUTE_ROPE),
                (f"{ours}.attn.v_proj", IDENTITY),
            ),
            (
                f"{theirs}.self_attn.in_proj_weight",
                f"{theirs}.self_attn.in_proj.weight",
                f"{theirs}.self_attn.in_projs.0.weight",
            ),
        )
        yield _rule(
            f"{ours}.attn.o_proj",
            f"{theirs}.self_attn.out_proj.weight",
            f"{theirs}.self_attn.out_projs.0.weight",
        )
        for name, foreign in (
            ("attn_norm.scale", "norm1.weight"),
            ("attn_norm.bias", "norm1.bias"),
            ("attn_scale", "layer_scale_1.scale"),
            ("mlp_norm.scale", "norm2.weight"),
            ("mlp_norm.bias", "norm2.bias"),
            ("mlp.w_up", "linear1.weight"),
            ("mlp.w_down", "linear2.weight"),
            ("mlp_scale", "layer_scale_2.scale"),
        ):
            yield _rule(f"{ours}.{name}", f"{theirs}.{foreign}")
    for ours, theirs in (("semantic", "rvq_first"), ("acoustic", "rvq_rest")):
        ours, theirs = f"quantizer.{ours}", f"quantizer.{theirs}"
        for name in ("input_proj", "output_proj"):
            yield _rule(f"{ours}.{name}", f"{theirs}.{name}.weight", transform=POINTWISE)
        codebook = f"{theirs}.vq.layers.{{codebook}}._codebook"
        for name, spellings in (
            ("embedding_sum", ("embedding_sum", "embed_sum", "embed_avg")),
            ("cluster_usage", ("cluster_usage", "cluster_size")),
            ("initialized", ("_initialized", "inited")),
        ):
            yield _rule(
                f"{ours}.codebooks.{{codebook}}.{name}",
                *(f"{codebook}.{spelling}" for spelling in spellings),
            )


def _transformers_rules() -> Iterator[MimiRule]:
    yield from _seanet(sequence="layers", conv="conv", transposed="conv")
    yield _rule("downsample.weight", "downsample.conv.weight", transform=CONV)
    yield _rule("upsample.weight", "upsample.conv.weight", transform=DEPTHWISE_TRANSPOSED)
    for half in ("encoder_transformer", "decoder_transformer"):
        for name, foreign in (
            ("attn_norm.scale", "input_layernorm.weight"),
            ("attn_norm.bias", "input_layernorm.bias"),
            ("attn.q_proj", "self_attn.q_proj.weight"),
            ("attn.k_proj", "self_attn.k_proj.weight"),
            ("attn.v_proj", "self_attn.v_proj.weight"),
            ("attn.o_proj", "self_attn.o_proj.weight"),
            ("attn_scale", "self_attn_layer_scale.scale"),
            ("mlp_norm.scale", "post_attention_layernorm.weight"),
            ("mlp_norm.bias", "post_attention_layernorm.bias"),
            ("mlp.w_up", "mlp.fc1.weight"),
            ("mlp.w_down", "mlp.fc2.weight"),
            ("mlp_scale", "mlp_layer_scale.scale"),
        ):
            yield _rule(f"{half}.layers.{{layer}}.{name}", f"{half}.layers.{{layer}}.{foreign}")
    for part in ("semantic", "acoustic"):
        theirs = f"quantizer.{part}_residual_vector_quantizer"
        for name in ("input_proj", "output_proj"):
            yield _rule(f"quantizer.{part}.{name}", f"{theirs}.{name}.weight", transform=POINTWISE)
        for name, foreign in (
            ("embedding_sum", "embed_sum"),
            ("cluster_usage", "cluster_usage"),
            ("initialized", "initialized"),
        ):
            yield _rule(
                f"quantizer.{part}.codebooks.{{codebook}}.{name}",
                f"{theirs}.layers.{{codebook}}.codebook.{foreign}",
            )


# transformers from 5.2x keeps the halves in modules of their own. Its files have the old names, but
# a state dict saved without `save_pretrained` has these.
_HALVES = {
    "encoder.layers.": "encoder.encoder_seanet.layers.",
    "encoder_transformer.": "encoder.encoder_transformer.",
    "downsample.": "encoder.downsample.",
    "decoder.layers.": "decoder.decoder_seanet.layers.",
    "decoder_transformer.": "decoder.decoder_transformer.",
    "upsample.": "decoder.upsample.",
}


def _with_halves(rule: MimiRule) -> MimiRule:
    (name,) = rule.theirs
    return MimiRule(
        rule.ours,
        (name, *(new + name[len(old) :] for old, new in _HALVES.items() if name.startswith(old))),
    )


LAYOUTS: Mapping[str, MimiLayout] = {
    layout.name: layout
    for layout in (
        MimiLayout(
            name="moshi",
            rules=tuple(_moshi_rules()),
            markers=("quantizer.rvq_first.", "quantizer.rvq_rest."),
        ),
        MimiLayout(
            name="transformers",
            rules=tuple(map(_with_halves, _transformers_rules())),
            markers=(
                "quantizer.semantic_residual_vector_quantizer.",
                "quantizer.acoustic_residual_vector_quantizer.",
            ),
        ),
    )
}
"""Every layout by name."""


class Part(NamedTuple):
    """One of our parameters inside a foreign tensor."""

    path: str
    shape: Shape
    transform: Transform
    num_heads: int

    @property
    def foreign_shape(self) -> Shape:
        return self.transform.foreign_shape(self.shape)


@dataclass(frozen=True)
class MimiBinding:
    """A rule written out for one foreign tensor of one config.

    Attributes:
        names: The tensor's name, then other spellings of it.
        parts: Our parameters in it, stacked along its first axis.
    """

    names: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def foreign_shape(self) -> Shape:
        """Shape of the foreign tensor."""
        shapes = [part.foreign_shape for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def to_ours(self, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the parameters in the foreign tensor by path."""
        row = 0
        for part in self.parts:
            rows = part.foreign_shape[0]
            ours = part.transform.forward(tensor[row : row + rows], part.num_heads)
            yield part.path, np.ascontiguousarray(ours)
            row += rows

    def to_theirs(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the foreign tensor made of parameters by path; the inverse of `to_ours`."""
        pieces = [part.transform.inverse(leaves[part.path], part.num_heads) for part in self.parts]
        return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))


def get_layout(name: str) -> MimiLayout:
    """Returns the layout of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r} of a Mimi; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def mimi_shapes(config: MimiConfig) -> dict[str, Shape]:
    """Returns the shape of every parameter by dotted path."""
    from csm_jax.mimi import params  # imports jax: only once weights are really handled

    return {path: tuple(leaf.shape) for path, leaf in flatten(params.param_shapes(config)).items()}


def bind(layout: MimiLayout, config: MimiConfig) -> tuple[MimiBinding, ...]:
    """Returns the layout's table written out for `config`, one entry per foreign tensor."""
    shapes = mimi_shapes(config)
    return tuple(
        MimiBinding(
            names=tuple(name.format(**numbers) for name in rule.theirs),
            parts=tuple(
                Part(
                    path=path.format(**numbers),
                    shape=shapes[path.format(**numbers)],
                    transform=transform,
                    num_heads=config.num_heads if transform is PERMUTE_ROPE else 0,
                )
                for path, transform in rule.ours
            ),
        )
        for rule in layout.rules
        for numbers in _numbers(rule, config)
    )


def _numbers(rule: MimiRule, config: MimiConfig) -> Iterator[dict[str, int]]:
    """Yields what stands for the placeholders of a rule, once per foreign tensor."""
    path = rule.ours[0][0]
    codebooks = config.num_semantic_codebooks
    if path.startswith("quantizer.acoustic."):
        codebooks = config.num_acoustic_codebooks
    ranges = {
        "stage": range(len(config.ratios)),
        "block": range(config.num_residual_layers),
        "layer": range(config.num_layers),
        "codebook": range(codebooks),
    }
    used = [name for name in ranges if f"{{{name}}}" in path]
    for values in itertools.product(*(ranges[name] for name in used)):
        numbers = dict(zip(used, values, strict=True))
        yield {**numbers, "n": _place(path, config, **numbers)}


def _place(path: str, config: MimiConfig, *, stage: int = 0, block: int = 0, **_: int) -> int:
    """Returns where a convolution or block stands among SEANet's modules; activations count too.

    The encoder: conv_in, (blocks, activation, down) per stage, activation, conv_out; the decoder
    has (activation, up, blocks) per stage.
    """
    blocks = config.num_residual_layers
    start = 1 + stage * (blocks + 2)
    if ".residual." in path:
        return start + block + (2 if path.startswith("decoder.") else 0)
    if ".down." in path:
        return start + blocks + 1
    if ".up." in path:
        return start + 1
    return 1 + len(config.ratios) * (blocks + 2) + 1 if ".conv_out." in path else 0


def check(bindings: Iterable[MimiBinding], specs: Mapping[str, TensorSpec]) -> list[str]:
    """Returns every way in which the tensors differ from the table; empty if they fit exactly."""
    problems, known = [], set()
    for binding in bindings:
        known.update(binding.names)
        present = [name for name in binding.names if name in specs]
        if not present:
            problems.append(f"missing tensor {binding.names[0]}")
        if len(present) > 1:
            problems.append(f"tensors {' and '.join(present)} are one under several names")
        problems += [
            f"tensor {name} has shape {list(specs[name].shape)}, "
            f"expected {list(binding.foreign_shape)}"
            for name in present
            if specs[name].shape != binding.foreign_shape
        ]
    for name, spec in specs.items():
        if name not in known:
            problems.append(f"extra tensor {name} {spec.dtype}{list(spec.shape)}")
        elif spec.dtype not in FLOAT_DTYPES:
            problems.append(
                f"tensor {name} has dtype {spec.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
            )
    return problems


def check_params(config: MimiConfig, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Returns every way in which parameters by path differ from those of `config`."""
    return check(
        [
            MimiBinding((path,), (Part(path, shape, IDENTITY, 0),))
            for path, shape in mimi_shapes(config).items()
        ],
        specs,
    )


def detect(names: Iterable[str], *, where: str) -> MimiLayout:
    """Returns the layout most of these tensor names belong to.

    Raises:
        WeightsError: None of them is a Mimi's.
    """
    names = list(names)
    counts = {
        layout.name: sum(name.startswith(layout.markers) for name in names)
        for layout in LAYOUTS.values()
    }
    best = max(counts, key=lambda name: counts[name])
    if counts[best]:
        return LAYOUTS[best]
    raise WeightsError(
        where,
        f"the {len(names)} tensor names are not those of a Mimi in moshi's or transformers' "
        f"layout; the first are {', '.join(sorted(names)[:5]) or 'none'}",
    )
