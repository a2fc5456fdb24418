"""The only place that uses torch: array hand-over, Mimi through moshi, the silentcipher watermark.

This file itself imports no torch, and the rest of the project imports the modules below it only
when they are needed.
"""

from __future__ import annotations


class MissingDependencyError(ImportError):
    """A package of the optional torch bridge is not installed; the message says how to get it."""


def missing_dependency(package: str, purpose: str) -> MissingDependencyError:
    """Returns the error to raise where `package` cannot be imported for `purpose`."""
    return MissingDependencyError(
        f"{purpose} needs the Python package {package!r}, which is not installed; "
        "install the torch bridge: pip install 'csm_jax[torch]' && "
        "pip install --no-deps moshi==0.2.13",
        name=package,
    )
