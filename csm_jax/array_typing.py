"""Axis letters, array types and the pytree dataclass helper.

One letter per axis, everywhere (shapes in annotations, suffixes of locals, einsum strings):

    B batch row or slot      T query steps          S cache positions      D embed
    N query heads            K key/value heads      G = N // K             H head dim
    F MLP                    V audio vocabulary     C codebooks            L layers
    W audio samples          I, O the in and out axis of any projection
    M shared segments        Z positions of one

Annotations are jaxtyping's. They cost nothing in production; the tests run every annotated function
under jaxtyping's import hook with beartype.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt

__all__ = [
    "Array",
    "Bool",
    "DTypeLike",
    "Float",
    "Int",
    "Key",
    "Params",
    "PyTree",
    "UInt",
    "pytree",
]

Params = dict[str, Any]
"""Nested dicts with string keys and arrays as leaves; `csm_jax.model.param_shapes` is its shape."""

T = TypeVar("T", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: T) -> T:
    """Returns `cls` as a frozen, keyword-only dataclass whose fields are all pytree children.

    Unflattening bypasses `__init__`: JAX puts tracers, shapes and placeholders into states, so
    nothing may be checked there.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten(node: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(node, name) for name in names), None

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], None]:
        return tuple((jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names), None

    def unflatten(_: None, children: Any) -> Any:
        node = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(node, name, child)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
