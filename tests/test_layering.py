"""The direction of dependencies: a module imports only from rows above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "csm_jax"

# A module, or a package with all its modules, stands in exactly one row.
ROWS: tuple[tuple[str, ...], ...] = (
    ("array_typing",),
    ("config",),
    (
        "sharding",
        "sampling",
        "audio",
        "codec",
        "watermark_key",
        "runaway",
        "text",
        "html_report",
        "closures",
    ),
    ("kvcache", "linear"),
    # Mimi's files are no part of it: their names and forms are `weights.mimi` and `mimi_tables`, with
    # those of CSM's, whose readers and checks they share.
    ("llama", "mimi"),
    ("backbone", "decoder"),
    ("model",),
    ("generate", "prompt", "weights", "hub"),
    # A watermark is its files as much as its networks, so it stands below the weights, and below it
    # the bridge, which lends it (and the codec) networks of torch.
    ("slots", "segments", "stages", "voices", "watermark"),
    ("request", "bridge", "synthesizer_settings"),
    ("engine",),
    ("jobs",),
    ("synthesizer",),
    ("pipeline", "corpus", "synthesizer_async"),
    ("data", "eval"),
    ("train",),
    ("dialogue", "doctor", "host_memory", "interrupt", "long_text", "voices_cli"),
    ("cli_arguments",),
    ("generate_cli",),
    ("cli",),
    ("__init__", "__main__"),  # the table of contents, and the command
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}

# What must not be needed to import, convert, train or generate codes.
TORCH_SIDE = {
    "torch",
    "torchaudio",
    "moshi",
    "silentcipher",
    "transformers",
    "torchtune",
    "torchao",
}
TORCH_ALLOWED = ("csm_jax/bridge/", "tests/", "benchmarks/")

# `csm_jax.config` is read by tools that never compute anything.
WITHOUT_JAX = (
    "__init__",
    "__main__",
    "cli",
    "cli_arguments",
    "doctor",
    "dialogue",
    "generate_cli",
    "host_memory",
    "interrupt",
    "voices_cli",
    "config",
    "watermark_key",
)

SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
SCRIPTS = sorted(
    path
    for pattern in ("*.py", "examples/**/*.py", "benchmarks/**/*.py")
    for path in ROOT.glob(pattern)
)


def top(module: str) -> str:
    """Returns the entry of the table that a dotted module of ours belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path, root: Path = ROOT) -> str:
    """Returns the dotted name of a file, a package by its own name."""
    parts = path.relative_to(root).with_suffix("").parts
    if len(parts) > 2 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """Yields (line, imported dotted name, at module level) for every import, wherever it stands."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    guarded = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for child in test.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        eager = id(node) not in inside and id(node) not in guarded
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, eager
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                if alias.name == "__version__":
                    continue  # a constant of the package itself
                # `from csm_jax import x` imports the module x; names of the table of contents are
                # for users and stand in no row.
                yield node.lineno, f"{base}.{alias.name}" if base == PACKAGE else base, eager


def violations(source: str, path: str) -> list[str]:
    """Returns what is wrong with the imports of one file of the package, one line each."""
    file = ROOT / path
    module = module_name(file)
    own = top(module) if module != f"{PACKAGE}.__init__" else "__init__"
    if own not in ROW_OF:
        return [f"{path}: {own!r} stands in no row of tests/test_layering.py"]
    found = []
    for line, name, eager in imports(source, module, file.name == "__init__.py"):
        root = name.split(".")[0]
        if root == PACKAGE:
            other = top(name)
            if other not in ROW_OF:
                found.append(f"{path}:{line}: imports {name}, which stands in no row")
            elif other != own and ROW_OF[other] >= ROW_OF[own]:
                found.append(
                    f"{path}:{line}: {own} (row {ROW_OF[own]}) imports {other} (row {ROW_OF[other]})"
                )
        if root in TORCH_SIDE and not path.startswith(TORCH_ALLOWED):
            found.append(f"{path}:{line}: imports {name} outside {PACKAGE}/bridge")
        if eager and own in WITHOUT_JAX and root in {"jax", "jaxlib", "flax", "numpy"}:
            found.append(f"{path}:{line}: {own} imports {name} at its top; it must load in no time")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_imports_come_from_rows_above(path: Path) -> None:
    assert not violations(path.read_text(), path.relative_to(ROOT).as_posix())


def test_every_row_names_modules_that_exist() -> None:
    present = {top(module_name(path)) for path in SOURCES} | {"__init__"}
    assert set(ROW_OF) - present == set()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_stay_out_of_torch(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    wrong = [
        f"{relative}:{line}: imports {name}"
        for line, name, _ in imports(path.read_text(), "script", False)
        if name.split(".")[0] in TORCH_SIDE and not relative.startswith(TORCH_ALLOWED)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        (
            "csm_jax/model.py",
            "from csm_jax.generate import prefill",
            "model (row 6) imports generate",
        ),
        ("csm_jax/model.py", "def f():\n    from csm_jax import pipeline", "imports pipeline"),
        ("csm_jax/backbone.py", "from .decoder import Decoder", "backbone (row 5) imports decoder"),
        ("csm_jax/backbone.py", "from . import decoder", "backbone (row 5) imports decoder"),
        (
            "csm_jax/weights/tables.py",
            "from ..pipeline import x",
            "weights (row 7) imports pipeline",
        ),
        ("csm_jax/weights/__init__.py", "from ..pipeline import x", "imports pipeline"),
        ("csm_jax/prompt.py", "import torch.nn", "imports torch.nn outside"),
        ("csm_jax/prompt.py", "def f():\n    import moshi", "imports moshi outside"),
        ("csm_jax/newcomer.py", "", "'newcomer' stands in no row"),
        ("csm_jax/cli.py", "from csm_jax.newcomer import x", "stands in no row"),
        ("csm_jax/cli.py", "from csm_jax import load_csm_1b", "stands in no row"),
        ("csm_jax/cli.py", "import jax", "cli imports jax at its top"),
        ("csm_jax/llama.py", "import csm_jax.cli", "llama (row 4) imports cli"),
    ],
)
def test_a_wrong_import_is_reported(path: str, source: str, complaint: str) -> None:
    found = violations(source, path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("csm_jax/weights/tables.py", "from .transforms import x\nfrom csm_jax.weights import y"),
        ("csm_jax/bridge/mimi.py", "import torch\nfrom csm_jax.codec import Codec"),
        ("csm_jax/cli.py", "def f():\n    import jax\n    from csm_jax import pipeline"),
    ],
)
def test_a_right_import_is_not(path: str, source: str) -> None:
    assert violations(source, path) == []
