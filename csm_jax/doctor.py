"""What `csm-jax doctor` finds out: devices, versions, and which of a model's files are at hand.

It downloads nothing and loads no weights.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
_BRIDGE = (
    ("torch", "pip install 'csm_jax[torch]'"),
    # Without its dependencies: the ranges it publishes exclude current releases it runs with.
    ("moshi", "pip install 'csm_jax[torch]' && pip install --no-deps moshi==0.2.13"),
)


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        name: What it is.
        ok: Whether it is as it should be.
        detail: What was found.
        remedy: What to do when it is not ok.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def examine(source: str) -> list[Finding]:
    """Returns what was found out about this machine and the model `source`."""
    return [*_versions(), _devices(), *_model(source)]


def report(findings: list[Finding]) -> str:
    """Returns the findings as text, one line each and the remedies below what is missing."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        sign = "ok" if finding.ok else "--"
        lines.append(f"{sign}  {finding.name:<{width}}  {finding.detail}")
        lines += [f"    {'':<{width}}    {line}" for line in finding.remedy.splitlines()]
    missing = sum(not finding.ok for finding in findings)
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
    for package, remedy in _BRIDGE:
        version = _version(package)
        findings.append(
            Finding(package, True, f"{version} (torch bridge: codec and watermark)")
            if version
            else Finding(package, False, "not installed (codec and watermark)", remedy)
        )
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
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.exists():
        places: tuple[Path, ...] = (path.absolute().parent,)
        first = Finding("checkpoint", True, str(path))
        return [first, *_from_hub(source, places)[1:]]
    return _from_hub(source, ())


def _directory(path: Path) -> list[Finding]:
    from csm_jax import hub
    from csm_jax.config import read_config

    try:
        files = hub.locate(path)
    except (OSError, ValueError) as error:
        first, *rest = str(error).splitlines()
        return [Finding("model", False, first, "\n".join(line.strip() for line in rest))]
    findings = [Finding("checkpoint", True, str(files.checkpoint))]
    if files.config is not None:
        try:
            config = read_config(files.config)
        except ValueError as error:
            findings.append(Finding("config", False, str(error)))
        else:
            sizes = f"{config.backbone.num_layers} + {config.decoder.num_layers} layers"
            findings.append(Finding("config", True, f"{sizes}, {config.num_codebooks} codebooks"))
    parts: tuple[tuple[str, Callable[[], Path]], ...] = (
        ("tokenizer", files.tokenizer),
        ("mimi", files.mimi),
        ("watermark", files.watermark_dir),
    )
    told = False
    for name, find in parts:
        try:
            findings.append(Finding(name, True, str(find())))
        except OSError as error:
            # The message lists every missing file with its command: once is enough.
            remedy = "" if told else str(error)
            findings.append(Finding(name, False, f"not in {path}", remedy))
            told = True
    return findings


def _from_hub(source: str, places: tuple[Path, ...]) -> list[Finding]:
    from csm_jax import hub

    marks = tuple(f"{hub.WATERMARK_FOLDER}/{name}" for name in hub.WATERMARK_FILES)
    wanted: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        # name, repositories to try, and files: of a checkpoint the first there, else all
        ("checkpoint", (source,), hub.CHECKPOINTS),
        ("config", (source if not places else hub.CSM_REPO,), (hub.CONFIG,)),
        ("tokenizer", hub.TOKENIZER_REPOS, (hub.TOKENIZER,)),
        ("mimi", (hub.MIMI_REPO,), (hub.MIMI,)),
        ("watermark", (hub.WATERMARK_REPO,), marks),
    )
    findings = []
    for name, repos, files in wanted:
        beside = [
            place / file
            for place in places
            for file in files
            if (place / (f"silentcipher/{file}" if name == "watermark" else file)).is_file()
        ]
        needed = 1 if name == "checkpoint" else len(files)
        cached = next((repo for repo in repos if _cached(repo, files) >= needed), None)
        if len(beside) >= needed:
            findings.append(Finding(name, True, str(beside[0].parent)))
        elif cached is not None:
            findings.append(Finding(name, True, f"{cached}, in the hub's cache"))
        else:
            get = files[:1] if name == "checkpoint" else files
            gated = " (gated: accept its conditions on its page, then `hf auth login`)"
            remedy = f"hf download {repos[-1]} {' '.join(get)}"
            findings.append(
                Finding(
                    name,
                    False,
                    f"{repos[-1]} is not in the hub's cache; it is fetched when first used",
                    remedy + (gated if repos[-1] == hub.CSM_REPO else ""),
                )
            )
    return findings


def _cached(repo: str, files: tuple[str, ...]) -> int:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return sum(isinstance(try_to_load_from_cache(repo, file), str) for file in files)
    except HFValidationError:
        return 0
