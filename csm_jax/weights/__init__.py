"""Weights in and out of every published layout; see `tables` for the layouts themselves."""

from csm_jax.weights.convert import convert_checkpoint, load_checkpoint, save_checkpoint
from csm_jax.weights.errors import WeightsError
from csm_jax.weights.tables import LAYOUTS

__all__ = ["LAYOUTS", "WeightsError", "convert_checkpoint", "load_checkpoint", "save_checkpoint"]
