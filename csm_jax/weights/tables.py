"""The names of every layout: one table of rules each, read forward to load and backward to export.

A rule is (our path, foreign name, transform); `{layer}` stands for the number of a block. `bind`
writes the rules out for one config, `check` holds them against the tensors that are there, and
`detect` tells the layouts apart by their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from csm_jax.config import CSMConfig, LlamaConfig
from csm_jax.weights.errors import WeightsError
from csm_jax.weights.transforms import (
    IDENTITY,
    PERMUTE_ROPE,
    TRANSPOSE_LAST_TWO,
    Shape,
    Transform,
)

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
"""Element types a model tensor may have."""

QUANTISED_SUFFIXES = (".scales", ".biases")
"""Names MLX gives the side tensors of a quantised projection."""


class TensorSpec(NamedTuple):
    """What a header says of one tensor: its shape, and numpy's or ml_dtypes' name of its dtype."""

    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        ours: Path in the parameter tree, dotted.
        theirs: Name in the layout.
        transform: From theirs to ours.
        tied: The rule holds only for configs whose `tie_codebooks_embeddings` is this (None: all).
    """

    ours: str
    theirs: str
    transform: Transform = IDENTITY
    tied: bool | None = None


@dataclass(frozen=True)
class Layout:
    """One way of naming and arranging the tensors of a CSM.

    Attributes:
        name: As given to `layout=` and `--from`.
        rules: The table; empty where the names are our own paths.
        config_form: Which published form of `config.json` goes with it.
        set_aside: Prefix of tensors that belong to the codec, not to the model.
        file_name: Name of the checkpoint written.
        reads: Names looked for in a directory, best first.
        metadata_format: `format` entry of the safetensors metadata, which some readers insist on.
    """

    name: str
    rules: tuple[Rule, ...]
    config_form: Literal["sesame", "transformers", "either"]
    file_name: str
    reads: tuple[str, ...]
    set_aside: str | None = None
    metadata_format: str = "pt"


class Binding(NamedTuple):
    """A rule written out for one tensor of one config."""

    path: str
    name: str
    transform: Transform
    num_heads: int
    shape: Shape
    foreign_shape: Shape


def _blocks(
    names: Mapping[str, str], *, interleaved: bool, backbone: str, decoder: str
) -> tuple[Rule, ...]:
    """Returns the rules of both transformers' blocks, whose inner names agree in every layout."""
    rope = PERMUTE_ROPE if interleaved else IDENTITY
    return tuple(
        Rule(
            f"{ours}.layers.{{layer}}.{inner}",
            f"{theirs}.layers.{{layer}}.{name}",
            rope if inner in ("attn.q_proj", "attn.k_proj") else IDENTITY,
        )
        for ours, theirs in (("backbone", backbone), ("decoder", decoder))
        for inner, name in names.items()
    )


_TORCHTUNE_BLOCK = {
    "attn_norm": "sa_norm.scale",
    "attn.q_proj": "attn.q_proj.weight",
    "attn.k_proj": "attn.k_proj.weight",
    "attn.v_proj": "attn.v_proj.weight",
    "attn.o_proj": "attn.output_proj.weight",
    "mlp_norm": "mlp_norm.scale",
    "mlp.w_gate": "mlp.w1.weight",
    "mlp.w_up": "mlp.w3.weight",
    "mlp.w_down": "mlp.w2.weight",
}

_HF_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm.weight",
    "attn.q_proj": "self_attn.q_proj.weight",
    "attn.k_proj": "self_attn.k_proj.weight",
    "attn.v_proj": "self_attn.v_proj.weight",
    "attn.o_proj": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp.w_gate": "mlp.gate_proj.weight",
    "mlp.w_up": "mlp.up_proj.weight",
    "mlp.w_down": "mlp.down_proj.weight",
}

# Outside the blocks csm-hf and csm-mlx keep Sesame's names.
_SESAME_TOP = (
    Rule("backbone.text_embeddings", "text_embeddings.weight"),
    Rule("backbone.audio_embeddings", "audio_embeddings.weight"),
    Rule("backbone.codebook0_head", "codebook0_head.weight"),
    Rule("decoder.projection", "projection.weight"),
    Rule("decoder.audio_head", "audio_head", TRANSPOSE_LAST_TWO),
)

_SESAME_RULES = (
    *_SESAME_TOP,
    Rule("backbone.final_norm", "backbone.norm.scale"),
    Rule("decoder.final_norm", "decoder.norm.scale"),
    *_blocks(_TORCHTUNE_BLOCK, interleaved=True, backbone="backbone", decoder="decoder"),
)


def _llama_named(*, interleaved: bool) -> tuple[Rule, ...]:
    return (
        *_SESAME_TOP,
        Rule("backbone.final_norm", "backbone.norm.weight"),
        Rule("decoder.final_norm", "decoder.norm.weight"),
        *_blocks(_HF_LLAMA_BLOCK, interleaved=interleaved, backbone="backbone", decoder="decoder"),
    )


_TRANSFORMERS_RULES = (
    Rule("backbone.text_embeddings", "embed_text_tokens.weight"),
    Rule("backbone.audio_embeddings", "backbone_model.embed_tokens.embed_audio_tokens.weight"),
    # The table is published twice; 5.x saves only the decoder's copy, 4.52 may save the other one.
    Rule("backbone.audio_embeddings", "depth_decoder.model.embed_tokens.weight", tied=True),
    Rule("decoder.audio_embeddings", "depth_decoder.model.embed_tokens.weight", tied=False),
    Rule("backbone.codebook0_head", "lm_head.weight"),
    Rule("decoder.projection", "depth_decoder.model.inputs_embeds_projector.weight"),
    Rule("decoder.audio_head", "depth_decoder.codebooks_head.weight", TRANSPOSE_LAST_TWO),
    Rule("backbone.final_norm", "backbone_model.norm.weight"),
    Rule("decoder.final_norm", "depth_decoder.model.norm.weight"),
    *_blocks(
        _HF_LLAMA_BLOCK,
        interleaved=False,
        backbone="backbone_model",
        decoder="depth_decoder.model",
    ),
)

SAFETENSORS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TRANSFORMERS_INDEX_NAME = "transformers.safetensors.index.json"
TORCH_NAME = "ckpt.pt"
MLX_NAMES = ("ckpt.safetensors", "mlx-ckpt.safetensors", "latest.safetensors")
ORBAX_NAME = "params"
CODEC_NAME = "codec_model.safetensors"
"""File that carries a transformers checkpoint's codec tensors beside a layout without them."""

CHECKPOINT_NAMES = (
    SAFETENSORS_NAME,
    INDEX_NAME,
    TRANSFORMERS_INDEX_NAME,
    *MLX_NAMES,
    TORCH_NAME,
    ORBAX_NAME,
)
"""Every name a checkpoint goes by in a model directory, in the order they are looked for."""

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="sesame",
            rules=_SESAME_RULES,
            config_form="sesame",
            file_name=SAFETENSORS_NAME,
            reads=(SAFETENSORS_NAME, INDEX_NAME, TORCH_NAME),
        ),
        Layout(
            name="transformers",
            rules=_TRANSFORMERS_RULES,
            config_form="transformers",
            file_name=SAFETENSORS_NAME,
            reads=(TRANSFORMERS_INDEX_NAME, INDEX_NAME, SAFETENSORS_NAME),
            set_aside="codec_model.",
        ),
        Layout(
            name="csm-hf",
            rules=_llama_named(interleaved=False),
            config_form="sesame",
            file_name=SAFETENSORS_NAME,
            reads=(SAFETENSORS_NAME, INDEX_NAME, *MLX_NAMES),
        ),
        Layout(
            name="csm-mlx",
            rules=_llama_named(interleaved=True),
            config_form="sesame",
            file_name=MLX_NAMES[0],
            reads=(*MLX_NAMES, SAFETENSORS_NAME, INDEX_NAME),
            metadata_format="mlx",
        ),
        Layout(
            name="orbax",
            rules=(),
            config_form="either",
            file_name=ORBAX_NAME,
            reads=(ORBAX_NAME,),
        ),
    )
}
"""Every layout by name."""


def get_layout(name: str) -> Layout:
    """Returns the layout of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by dotted path, in the order of the dicts.

    Raises:
        TypeError: A key is not a string.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"params: key {key!r} under {prefix or 'the top'!r} is not a string")
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts `flatten` was given."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def model_shapes(config: CSMConfig) -> dict[str, Shape]:
    """Returns the shape of every parameter by dotted path."""
    from csm_jax import model  # imports jax and flax: only once weights are really handled

    return {path: tuple(leaf.shape) for path, leaf in flatten(model.param_shapes(config)).items()}


def bind(layout: Layout, config: CSMConfig) -> tuple[Binding, ...]:
    """Returns the layout's table written out for `config`, one entry per foreign tensor.

    Raises:
        ValueError: The layout has no place for a tensor of this config (an untied decoder table
            exists only in transformers' layout and in orbax).
    """
    shapes = model_shapes(config)
    rules = layout.rules or tuple(Rule(path, path) for path in shapes)
    bindings = [
        _binding(rule, layer, sizes, shapes)
        for rule in rules
        if rule.tied in (None, config.tie_codebooks_embeddings)
        for sizes in (_body(rule, config),)
        for layer in (range(sizes.num_layers) if "{layer}" in rule.ours else (0,))
    ]
    homeless = sorted(set(shapes) - {binding.path for binding in bindings})
    if homeless:
        raise ValueError(
            f"layout {layout.name!r} has no place for {', '.join(homeless)} "
            f"(tie_codebooks_embeddings={config.tie_codebooks_embeddings}); "
            "use layout 'transformers' or 'orbax'"
        )
    return tuple(bindings)


def _body(rule: Rule, config: CSMConfig) -> LlamaConfig:
    return config.decoder if rule.ours.startswith("decoder.") else config.backbone


def _binding(rule: Rule, layer: int, sizes: LlamaConfig, shapes: Mapping[str, Shape]) -> Binding:
    path = rule.ours.replace("{layer}", str(layer))
    heads = 0
    if rule.transform is PERMUTE_ROPE:
        heads = sizes.num_heads if path.endswith("q_proj") else sizes.num_kv_heads
    return Binding(
        path=path,
        name=rule.theirs.replace("{layer}", str(layer)),
        transform=rule.transform,
        num_heads=heads,
        shape=shapes[path],
        foreign_shape=rule.transform.foreign_shape(shapes[path]),
    )


def is_set_aside(layout: Layout, name: str) -> bool:
    """Returns whether the tensor belongs to the codec and not to the model."""
    return layout.set_aside is not None and name.startswith(layout.set_aside)


def check(
    layout: Layout, bindings: Iterable[Binding], specs: Mapping[str, TensorSpec]
) -> list[str]:
    """Returns every way in which the tensors differ from the table; empty if they fit exactly.

    Args:
        layout: The layout the bindings came from.
        bindings: The table written out. Two entries of one path are copies of each other: at least
            one must be there.
        specs: The tensors that are there.
    """
    by_name = {binding.name: binding for binding in bindings}
    found_paths = {binding.path for name, binding in by_name.items() if name in specs}
    copies: dict[str, list[str]] = {}
    for binding in by_name.values():
        copies.setdefault(binding.path, []).append(binding.name)
    problems = [
        f"missing tensor {' or '.join(names)}"
        for path, names in copies.items()
        if path not in found_paths
    ]
    for name, spec in specs.items():
        if is_set_aside(layout, name):
            continue
        binding = by_name.get(name)
        if binding is None:
            problems.append(f"extra tensor {name} {spec.dtype}{list(spec.shape)}")
            continue
        if spec.shape != binding.foreign_shape:
            problems.append(
                f"tensor {name} has shape {list(spec.shape)}, "
                f"expected {list(binding.foreign_shape)}"
            )
        if spec.dtype not in FLOAT_DTYPES:
            problems.append(
                f"tensor {name} has dtype {spec.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
            )
    return problems


_AMBIGUOUS = ("csm-hf", "csm-mlx")


def detect(names: Iterable[str], *, where: str, recorded: str | None) -> str:
    """Returns the name of the layout these tensor names belong to.

    Args:
        names: Names of the tensors in a file (not an orbax directory).
        where: The file, for messages.
        recorded: What this project's own exports note in the file's metadata: it decides between
            csm-hf and csm-mlx, whose names are the same.

    Raises:
        WeightsError: The names are no CSM's, are quantised, or fit both csm-hf and csm-mlx.
    """
    fits = fitting_layouts(names, where=where)
    if recorded is not None and recorded in fits:
        return recorded
    first, *others = fits
    if others:
        raise WeightsError(
            where,
            "csm-hf and csm-mlx have the same tensor names but a different order inside q_proj and "
            "k_proj, so they cannot be told apart: say which it is with layout='csm-hf' or "
            "layout='csm-mlx' (convert: --from)",
        )
    return first


def fitting_layouts(names: Iterable[str], *, where: str) -> tuple[str, ...]:
    """Returns the layouts whose names these are: one, or csm-hf and csm-mlx.

    Raises:
        WeightsError: The names are no CSM's, or are those of quantised weights.
    """
    names = list(names)
    quantised = [name for name in names if name.endswith(QUANTISED_SUFFIXES)]
    if quantised:
        raise WeightsError(
            where,
            f"the weights are quantised ({len(quantised)} tensors such as {quantised[0]}); "
            "quantised checkpoints are not supported: use the float version",
        )
    present = set(names)
    if "lm_head.weight" in present and any(name.startswith("depth_decoder.") for name in names):
        return ("transformers",)
    if "codebook0_head.weight" in present:
        if any(name.endswith(".attn.output_proj.weight") for name in names):
            return ("sesame",)
        if any(name.endswith(".self_attn.o_proj.weight") for name in names):
            return _AMBIGUOUS
    raise WeightsError(
        where,
        f"the {len(names)} tensor names fit no known layout ({', '.join(LAYOUTS)}); the first are "
        f"{', '.join(sorted(names)[:5]) or 'none'}. If tensors are missing, pass layout= to have "
        "them listed",
    )
