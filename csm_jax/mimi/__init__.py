"""Mimi in JAX: audio at 24 kHz to and from 32 codes per 80 ms frame, without PyTorch.

`config` has the sizes, `published` their published forms and `params` the parameters; reading and
writing files of weights is `csm_jax.weights.mimi`.
"""
