"""Hands arrays between jax and torch through dlpack, without a copy where both share a device."""

from __future__ import annotations

import jax

from csm_jax.bridge import missing_dependency

try:
    import torch
except ImportError as error:
    raise missing_dependency("torch", "sharing arrays with torch") from error


def to_torch(array: jax.Array) -> torch.Tensor:
    """Returns a torch tensor over the memory of `array`, on the same device.

    jax arrays are immutable: writing into the tensor would change the array behind jax's back, so
    clone it first.

    Raises:
        TypeError: `array` is not a jax array.
        ValueError: It is spread over several devices.
    """
    if not isinstance(array, jax.Array):
        raise TypeError(f"to_torch needs a jax array, got {type(array).__name__}")
    if len(array.sharding.device_set) != 1:
        raise ValueError(
            f"to_torch needs an array on one device, this one is on "
            f"{len(array.sharding.device_set)}; gather it with jax.device_get first"
        )
    return torch.from_dlpack(array)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """Returns a jax array over the memory of `tensor`, on the same device.

    A tensor that is not contiguous is copied; one jax cannot alias (64-bit, see Raises) is refused.
    Writing into the tensor afterwards changes the array: hand over tensors nobody writes to.

    Raises:
        TypeError: `tensor` is not a torch tensor, or is 64-bit while jax runs in 32-bit mode, where
            sharing the memory would mean silently narrowing it.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"to_jax needs a torch tensor, got {type(tensor).__name__}")
    if tensor.dtype in (torch.int64, torch.float64) and not jax.config.read("jax_enable_x64"):
        narrow = "torch.int32" if tensor.dtype == torch.int64 else "torch.float32"
        raise TypeError(f"to_jax cannot share {tensor.dtype} with jax; use tensor.to({narrow})")
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())
