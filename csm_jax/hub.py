"""Finds the files of a model: in one directory, without any network, or on the Hugging Face hub.

The name `demo` is the small model that is part of the package.

A model directory holds `config.json`, one checkpoint, `tokenizer.json`, Mimi's weights and, under
`silentcipher/44_1_khz/73999_iteration/`, the watermark's. On the hub they live in four
repositories, named below. The environment variables of `huggingface_hub` apply: `HF_HUB_OFFLINE`,
`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

CSM_REPO = "sesame/csm-1b"
"""CSM-1B's checkpoint, config and example prompts; gated."""
TOKENIZER_REPOS = ("meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B")
"""Llama 3's tokenizer: the reference's source, which is gated, then an open copy of it."""
MIMI_REPO = "kyutai/moshiko-pytorch-bf16"
"""Mimi's weights in moshi's names (moshi `loaders.py`)."""
WATERMARK_REPO = "sony/silentcipher"
"""silentcipher's checkpoints."""

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"
DEMO = "demo"
"""The name of the model inside the package; a directory of that name is `./demo`."""
VOCABULARY = "vocabulary.txt"
"""Of a model that knows few words: those, one a line."""
WATERMARK_FOLDER = "44_1_khz/73999_iteration"
WATERMARK_FILES = ("hparams.yaml", "enc_c.ckpt", "dec_c.ckpt", "dec_m_0.ckpt")
CHECKPOINTS = (
    "model.safetensors",
    "ckpt.pt",
    "transformers.safetensors.index.json",
    "model.safetensors.index.json",
    "ckpt.safetensors",  # csm-mlx's names
    "mlx-ckpt.safetensors",
    "latest.safetensors",
)
"""Names of a checkpoint, in order of preference; after these, the orbax directory `params`."""
CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".pt", ".pth", ".bin")
"""Endings of a checkpoint's file, `.json` for an index; what `csm_jax.weights` opens."""
ORBAX = "params"
_ORBAX_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")

_CODEC_PREFIX = "codec_model."  # of the codec's tensors inside a checkpoint of transformers
_MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, by its specification
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


class HubError(OSError):
    """A file could not be fetched from the hub; the message says why and what to do."""


class _NoSuchFileError(HubError):
    """The repository is there, but this file is not in it."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where a model's files are. Files only some uses need are found when asked for.

    Attributes:
        checkpoint: A checkpoint file, an index file beside its shards, or an orbax directory.
        config: `config.json`; None where a lone checkpoint has none beside it.
        prompts_dir: Example recordings; None where there are none.
        places: Directories to look in for the other files.
        local: Whether those are the only places; otherwise the hub follows.
    """

    checkpoint: Path
    config: Path | None
    prompts_dir: Path | None
    places: tuple[Path, ...]
    local: bool

    def tokenizer(self) -> Path:
        """Returns the path of `tokenizer.json`.

        Raises:
            FileNotFoundError: The model directory lacks it; all missing files are listed.
            HubError: It cannot be fetched.
        """
        return self._find(TOKENIZER, _fetch_tokenizer)

    def mimi(self) -> Path:
        """Returns the path of Mimi's weights.

        Raises:
            FileNotFoundError: The model directory lacks them; all missing files are listed.
            HubError: They cannot be fetched.
        """
        return self._find(MIMI, lambda: _fetch(MIMI_REPO, MIMI))

    def mimi_beside(self) -> Path | None:
        """Returns the path of Mimi's weights if they are in one of the model's places."""
        return next((place / MIMI for place in self.places if (place / MIMI).is_file()), None)

    def vocabulary(self) -> frozenset[str] | None:
        """Returns the only words that the model knows, None where that is not stated.

        Raises:
            OSError, UnicodeDecodeError: The list cannot be read.
        """
        for place in self.places:
            if (place / VOCABULARY).is_file():
                return frozenset((place / VOCABULARY).read_text(encoding="utf-8").split())
        return None

    def watermark_dir(self) -> Path:
        """Returns the directory of silentcipher's files.

        Raises:
            FileNotFoundError: The model directory lacks some; all missing files are listed.
            HubError: They cannot be fetched.
        """
        for place in self.places:
            if not _missing_watermark(place):
                return _watermark_dir(place)
        if self.local:
            raise FileNotFoundError(_list_missing(self.places[0]))
        return _fetch_watermark()

    def _find(self, name: str, fetch: Callable[[], Path]) -> Path:
        for place in self.places:
            if (place / name).is_file():
                return place / name
        if self.local:
            raise FileNotFoundError(_list_missing(self.places[0], asked=name))
        return fetch()


def is_watermarked(source: str | os.PathLike[str]) -> bool:
    """Returns whether a model comes with a watermark: all but the demo, for which no networks ship."""
    return os.fspath(source) != DEMO


def local_path(source: str | os.PathLike[str]) -> Path | None:
    """Returns the path of a model on this machine: a directory, a checkpoint file, an orbax directory or
    the demo; None if `source` reads like a hub id and is no path. Asks no network.

    Raises:
        FileNotFoundError: It is neither.
        ValueError: It is a file, but no checkpoint.
    """
    text = os.fspath(source)
    if text == DEMO:
        return Path(__file__).parent / "demo_voice"
    path = Path(text).expanduser()
    if text and path.exists():
        if not path.is_dir() and path.suffix not in CHECKPOINT_SUFFIXES:
            raise ValueError(
                f"{path} is no model: unknown kind of file; known endings are "
                f"{', '.join(CHECKPOINT_SUFFIXES)}"
            )
        return path
    if not isinstance(source, str) or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(
            f"no model at {text!r}: give a model directory, a checkpoint file, a hub id such as "
            f"{CSM_REPO!r}, or {DEMO!r}"
        )
    return None


def locate(source: str | os.PathLike[str] = CSM_REPO) -> ModelFiles:
    """Returns the files of a model.

    Args:
        source: A model directory, or `demo`: then nothing is looked for elsewhere. Or a checkpoint
            file or orbax directory: what is not beside it comes from the hub. Or a hub id such as
            `sesame/csm-1b`.

    Raises:
        FileNotFoundError: A local path does not exist, or a model directory lacks its checkpoint or
            config; all missing files are listed, with the command that gets each.
        ValueError: A file is no checkpoint, or an index names files outside its own directory.
        HubError: A file cannot be fetched: gated, offline, not there, or the connection failed.
    """
    path = local_path(source)
    if path is None:
        checkpoint, config = _fetch_checkpoint(os.fspath(source))
        return ModelFiles(
            checkpoint=checkpoint, config=config, prompts_dir=None, places=(), local=False
        )
    if path.is_dir() and not _is_orbax(path):
        return _locate_directory(path)
    return _locate_beside(path)


def locate_config(source: str | os.PathLike[str] = CSM_REPO) -> Path | None:
    """Returns the path of `config.json` alone, which is small: to check a request before a download.

    None where a lone checkpoint has none beside it.

    Raises:
        FileNotFoundError, ValueError, HubError: As `locate`.
    """
    if local_path(source) is None:
        return _fetch(os.fspath(source), CONFIG)
    return locate(source).config


def locate_mimi(source: str | os.PathLike[str] = CSM_REPO) -> Path:
    """Returns the path of Mimi's own weights alone, for coding audio without a model.

    Raises:
        FileNotFoundError, ValueError, HubError: As `locate`, or the model directory lacks them.
    """
    if local_path(source) is None:
        return _fetch(MIMI_REPO, MIMI)
    return locate(source).mimi()


def locate_tokenizer(source: str | os.PathLike[str] = CSM_REPO) -> Path:
    """Returns the path of `tokenizer.json` alone, for reading text without a model.

    Raises:
        FileNotFoundError, ValueError, HubError: As `locate`, or the model directory lacks it.
    """
    if local_path(source) is None:
        return _fetch_tokenizer()
    return locate(source).tokenizer()


def locate_watermark(source: str | os.PathLike[str] = CSM_REPO) -> Path:
    """Returns the directory of the watermark's files alone, for checking audio without a model.

    Raises:
        FileNotFoundError: `source` is a directory without them, or neither a path nor a hub id.
        ValueError: `source` is a file, but no checkpoint.
        HubError: They cannot be fetched.
    """
    if not is_watermarked(source):
        raise FileNotFoundError("the demo comes without a watermark: its audio is never marked")
    path = local_path(source)
    if path is None:
        return _fetch_watermark()
    if not path.is_dir() or _is_orbax(path):
        return _locate_beside(path).watermark_dir()
    if _missing_watermark(path):
        raise FileNotFoundError(_list_missing(path))
    return _watermark_dir(path)


def locate_prompt(name: str, source: str | os.PathLike[str] = CSM_REPO) -> Path:
    """Returns an example recording, such as `conversational_a`, of a model directory or hub id.

    Raises:
        FileNotFoundError: A model directory has no such recording.
        HubError: It cannot be fetched.
    """
    path, file = local_path(source), f"prompts/{name}.wav"
    if path is not None and path.is_dir():
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path} has no {file}")
        return path / file
    return _fetch(os.fspath(source), file)


# --- on this machine ---------------------------------------------------------------------------


def _is_orbax(path: Path) -> bool:
    return any((path / mark).exists() for mark in _ORBAX_MARKS)


def _watermark_dir(directory: Path) -> Path:
    return directory / "silentcipher" / WATERMARK_FOLDER


def _missing_watermark(directory: Path) -> list[str]:
    folder = _watermark_dir(directory)
    return [name for name in WATERMARK_FILES if not (folder / name).is_file()]


def _find_checkpoint(directory: Path) -> Path | None:
    for name in CHECKPOINTS:
        if (directory / name).is_file():
            return directory / name
    return directory / ORBAX if _is_orbax(directory / ORBAX) else None


def _brings_codec(checkpoint: Path | None) -> bool:
    # Reads names only. A damaged file brings nothing here and is reported when it is loaded.
    names: object = ()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if checkpoint is None or checkpoint.is_dir():
            return False
        if checkpoint.suffix == ".json":
            names = json.loads(checkpoint.read_text(encoding="utf-8"))["weight_map"]
        elif checkpoint.suffix == ".safetensors":
            with checkpoint.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                names = json.loads(file.read(size)) if size <= _MAX_HEADER_BYTES else ()
    return isinstance(names, dict) and any(name.startswith(_CODEC_PREFIX) for name in names)


def _list_missing(directory: Path, asked: str = "") -> str:
    # Everything at once, so that nobody learns of the next missing file only after fetching one.
    lines, commands = [], []

    def need(name: str, what: str, repo: str) -> None:
        if not (directory / name).is_file():
            lines.append(f"{name} ({what})")
            commands.append(f"hf download {repo} {name} --local-dir {directory}")

    checkpoint = _find_checkpoint(directory)
    if checkpoint is None:
        others = ", ".join(CHECKPOINTS[1:])
        need(CHECKPOINTS[0], f"checkpoint; or {others}, or {ORBAX}/ from orbax", CSM_REPO)
    elif checkpoint.name.endswith(".index.json"):
        for shard in _shards(checkpoint):
            need(shard, "part of the checkpoint", CSM_REPO)
    if checkpoint is None or checkpoint.name != ORBAX:
        need(CONFIG, "model sizes", CSM_REPO)
    need(TOKENIZER, "text tokenizer", TOKENIZER_REPOS[1])
    if asked == MIMI or not _brings_codec(checkpoint):
        need(MIMI, "Mimi codec, for audio", MIMI_REPO)
    folder = _watermark_dir(directory).relative_to(directory)
    for name in _missing_watermark(directory):
        lines.append(f"{folder}/{name} (watermark; not needed when it is turned off)")
        commands.append(
            f"hf download {WATERMARK_REPO} --include '{WATERMARK_FOLDER}/*' "
            f"--local-dir {directory / 'silentcipher'}"
        )
    return "\n".join(
        [f"the model directory {directory} lacks:"]
        + [f"  {line}" for line in lines]
        + ["get what is missing with:"]
        + [f"  {command}" for command in dict.fromkeys(commands)]
    )


def _locate_directory(directory: Path) -> ModelFiles:
    checkpoint = _find_checkpoint(directory)
    config: Path | None = directory / CONFIG
    needed = [] if checkpoint is None or checkpoint.name == ORBAX else [CONFIG]
    if checkpoint is not None and checkpoint.name.endswith(".index.json"):
        needed += _shards(checkpoint)
    if checkpoint is None or not all((directory / name).is_file() for name in needed):
        raise FileNotFoundError(_list_missing(directory))
    return ModelFiles(
        checkpoint=checkpoint,
        config=config if config.is_file() else None,
        prompts_dir=_prompts((directory,)),
        places=(directory,),
        local=True,
    )


def _locate_beside(checkpoint: Path) -> ModelFiles:
    if checkpoint.name.endswith(".json"):
        _shards(checkpoint)  # another JSON file, such as config.json, is found out before any work
    parent = checkpoint.absolute().parent
    # An orbax directory may hold the other files itself.
    places = (checkpoint, parent) if checkpoint.is_dir() else (parent,)
    config = next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)
    return ModelFiles(
        checkpoint=checkpoint,
        config=config,
        prompts_dir=_prompts(places),
        places=places,
        local=False,
    )


def _prompts(places: tuple[Path, ...]) -> Path | None:
    return next((place / "prompts" for place in places if (place / "prompts").is_dir()), None)


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise ValueError(f"{index} names the file {name!r}, which is outside its directory")
    return names


# --- on the hub --------------------------------------------------------------------------------


def _fetch_checkpoint(repo: str) -> tuple[Path, Path]:
    config = _fetch(repo, CONFIG)
    for name in CHECKPOINTS:
        try:
            checkpoint = _fetch(repo, name)
        except _NoSuchFileError:
            continue
        if name.endswith(".index.json"):
            for shard in _shards(checkpoint):
                _fetch(repo, shard)
        return checkpoint, config
    raise HubError(f"{repo} has none of {', '.join(CHECKPOINTS)}, so it holds no CSM checkpoint")


def _fetch_tokenizer() -> Path:
    first: HubError | None = None
    for repo in TOKENIZER_REPOS:
        try:
            return _fetch(repo, TOKENIZER)
        except HubError as error:
            logger.info("no tokenizer from %s: %s", repo, error)
            first = first or error
    raise HubError(f"{first}\n(the open copy in {TOKENIZER_REPOS[1]} cannot be had either)")


def _fetch_watermark() -> Path:
    paths = [_fetch(WATERMARK_REPO, f"{WATERMARK_FOLDER}/{name}") for name in WATERMARK_FILES]
    return paths[0].parent


def _fetch(repo: str, name: str) -> Path:
    """Returns the local copy of a hub file, downloaded unless the cache has it.

    Raises:
        HubError: With the remedy; `_NoSuchFileError` where only the file is missing.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{repo}"
    elsewhere = f"or put {Path(name).name} into a model directory and pass that directory"
    access = (
        f"accept its conditions at {page}, then log in with `hf auth login` or set HF_TOKEN; "
        f"{elsewhere}"
    )
    try:
        return Path(hf_hub_download(repo, name))
    except HFValidationError as error:
        raise HubError(f"{repo!r} is not a hub id: {error}") from error
    except GatedRepoError as error:
        raise HubError(f"{repo} is gated and this account has no access: {access}") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no repository {repo}, or it is private or gated and nobody is logged in: "
            f"check the name, or {access}"
        ) from error
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            raise HubError(
                f"{name} of {repo} is not in the hub's cache and HF_HUB_OFFLINE is set: run "
                f"`hf download {repo} {name}` while online, {elsewhere}"
            ) from error
        raise HubError(
            f"{name} of {repo} is not in the hub's cache and {constants.ENDPOINT} cannot be "
            f"reached ({_reason(error.__cause__ or error)}): check the connection and HF_ENDPOINT, "
            f"{elsewhere}"
        ) from error
    except EntryNotFoundError as error:
        raise _NoSuchFileError(f"{repo} has no file {name} (see {page}/tree/main)") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise HubError(f"the hub refuses {name} of {repo}: {access}") from error
        raise HubError(f"the hub cannot give {name} of {repo}: {_reason(error)}") from error
    except (_transport_error(), OSError) as error:
        raise HubError(
            f"downloading {name} of {repo} broke off ({_reason(error)}): run the same command again"
        ) from error


def _transport_error() -> type[BaseException]:
    # The HTTP client below huggingface_hub changed its name twice; its base error stays the parent
    # of the hub's own.
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
