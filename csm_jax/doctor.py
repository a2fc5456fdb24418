"""What `csm-jax doctor` finds out: devices, versions, and which of a model's files are at hand.

It downloads nothing and loads no weights.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csm_jax.hub import ModelFiles

_CORE = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "soundfile",
)
_BRIDGE = ("torch", "moshi")


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        name: What it is.
        ok: Whether it is as it should be.
        detail: What was found.
        remedy: What to do when it is not ok.
        optional: Whether everything works without it.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    optional: bool = False

    @property
    def missing(self) -> bool:
        """Whether something does not work for want of it."""
        return not self.ok and not self.optional


def examine(source: str) -> list[Finding]:
    """Returns what was found out about this machine and the model `source`."""
    findings = [*_versions(), _devices()]
    try:
        return findings + _model(source)
    except ImportError as error:  # of a package that the findings above miss
        return [*findings, Finding("model", False, f"cannot be looked at: {error}")]


def report(findings: list[Finding]) -> str:
    """Returns the findings as text, one line each and the remedies below what is missing."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        sign = "ok" if finding.ok else "--" if finding.missing else "  "
        lines.append(f"{sign}  {finding.name:<{width}}  {finding.detail}")
        lines += [f"    {'':<{width}}    {line}" for line in finding.remedy.splitlines()]
    missing = sum(finding.missing for finding in findings)
    lines.append(f"{missing} missing" if missing else "everything is there")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    from csm_jax import __version__

    findings = [
        Finding("python", True, f"{platform.python_version()} on {platform.machine()}"),
        Finding("csm_jax", True, __version__),
    ]
    for package in _CORE:
        version = _version(package)
        findings.append(
            Finding(package, True, version)
            if version
            else Finding(package, False, "not installed", f"pip install {package}")
        )
    for package in _BRIDGE:
        version = _version(package)
        detail = f"{version or 'not installed'} (only for --codec torch)"
        findings.append(Finding(package, version is not None, detail, optional=True))
    return findings


def _devices() -> Finding:
    try:
        import jax

        devices = jax.devices()
    except (ImportError, RuntimeError) as error:
        return Finding("devices", False, str(error), "see JAX's installation guide, JAX_PLATFORMS")
    kinds: dict[str, int] = {}
    for device in devices:
        kind = f"{device.platform} ({device.device_kind})"
        kinds[kind] = kinds.get(kind, 0) + 1
    detail = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Finding("devices", True, detail)


# --- the model's files -------------------------------------------------------------------------


def _model(source: str) -> list[Finding]:
    from csm_jax import hub

    try:
        path = hub.local_path(source)
        if path is None:
            return _hub_model(source)
        files = hub.locate(path)
    except (OSError, ValueError) as error:
        first, *rest = str(error).splitlines()
        return [Finding("model", False, first, "\n".join(line.strip() for line in rest))]
    return [
        Finding("checkpoint", True, str(files.checkpoint)),
        _config(files),
        *_parts(source, files),
    ]


def _config(files: ModelFiles) -> Finding:
    from csm_jax.config import read_config

    if files.config is None:
        return Finding("config", True, "none beside it; the checkpoint's own shapes tell")
    try:
        config = read_config(files.config)
    except (OSError, ValueError) as error:
        return Finding("config", False, str(error))
    sizes = f"{config.backbone.num_layers} + {config.decoder.num_layers} layers"
    return Finding("config", True, f"{sizes}, {config.num_codebooks} codebooks")


def _parts(source: str, files: ModelFiles) -> list[Finding]:
    """Looks for what goes with a checkpoint on this machine: beside it, then in the hub's cache."""
    from csm_jax import hub, pipeline

    beside = dataclasses.replace(files, local=True)  # then nothing is fetched
    findings, told = [], False
    parts: list[tuple[str, Callable[[], Path], tuple[str, ...], tuple[str, ...]]] = [
        ("tokenizer", beside.tokenizer, hub.TOKENIZER_REPOS, (hub.TOKENIZER,)),
        ("mimi", lambda: pipeline.find_mimi(beside), (hub.MIMI_REPO,), (hub.MIMI,)),
    ]
    if hub.is_watermarked(source):
        mark = ("watermark", beside.watermark_dir, (hub.WATERMARK_REPO,), _watermark_files())
        parts.append(mark)
    else:
        findings.append(Finding("watermark", True, "none: the demo's audio is not marked"))
    for name, find, repos, wanted in parts:
        try:
            findings.append(Finding(name, True, str(find())))
        except (OSError, ValueError) as error:
            if files.local:
                # The message lists every missing file with its command: once is enough.
                remedy = "" if told else str(error)
                findings.append(Finding(name, False, f"not in {files.places[0]}", remedy))
                told = True
            else:
                findings.append(_in_cache(name, repos, wanted))
    return findings


def _hub_model(repo: str) -> list[Finding]:
    from csm_jax import hub
    from csm_jax.weights.mimi import holds_mimi

    checkpoint = next(filter(None, (_cached(repo, file) for file in hub.CHECKPOINTS)), None)
    if checkpoint is not None and holds_mimi(checkpoint):
        mimi = Finding("mimi", True, f"within the checkpoint of {repo}")
    else:
        mimi = _in_cache("mimi", (hub.MIMI_REPO,), (hub.MIMI,))
    return [
        _in_cache("checkpoint", (repo,), hub.CHECKPOINTS[:1])
        if checkpoint is None
        else Finding("checkpoint", True, f"{repo}, in the hub's cache"),
        _in_cache("config", (repo,), (hub.CONFIG,)),
        _in_cache("tokenizer", hub.TOKENIZER_REPOS, (hub.TOKENIZER,)),
        mimi,
        _in_cache("watermark", (hub.WATERMARK_REPO,), _watermark_files()),
    ]


def _watermark_files() -> tuple[str, ...]:
    from csm_jax import hub

    return tuple(f"{hub.WATERMARK_FOLDER}/{name}" for name in hub.WATERMARK_FILES)


def _in_cache(name: str, repos: tuple[str, ...], files: tuple[str, ...]) -> Finding:
    """Returns whether the hub's cache has all `files` of one of the `repos`."""
    from csm_jax import hub

    for repo in repos:
        if all(_cached(repo, file) for file in files):
            return Finding(name, True, f"{repo}, in the hub's cache")
    gated = " (gated: accept its conditions on its page, then `hf auth login`)"
    return Finding(
        name,
        False,
        f"{repos[-1]} is not in the hub's cache; it is fetched when first used",
        f"hf download {repos[-1]} {' '.join(files)}" + (gated if repos[-1] == hub.CSM_REPO else ""),
    )


def _cached(repo: str, file: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repo, file)
    except HFValidationError:
        return None
    return path if isinstance(path, str) else None
