"""What a run begins with: a model's sizes, and data of that model's own tokenizer and codec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from csm_jax import config as csm_config
from csm_jax.config import CSMConfig
from csm_jax.data.loader import TrainData
from csm_jax.train.hooks import Hooks, Stopped
from csm_jax.train.settings import RunSettings


def find_model(settings: RunSettings) -> tuple[CSMConfig, Path | None]:
    """Returns the model's sizes and its checkpoint, None where the weights start random.

    Raises:
        FileNotFoundError, ValueError, HubError: As `csm_jax.hub.locate`.
    """
    if settings.scratch is not None:
        presets = {"csm_1b": csm_config.csm_1b, "tiny": csm_config.tiny}
        if settings.scratch in presets:
            return presets[settings.scratch](), None
        return csm_config.read_config(settings.scratch), None
    from csm_jax import hub

    files = hub.locate(settings.model_name_or_path)
    # A lone checkpoint has no config.json.
    if files.config is None:
        return csm_config.csm_1b(), files.checkpoint
    return csm_config.read_config(files.config), files.checkpoint


def open_data(
    settings: RunSettings, path: Path, name: str, config: CSMConfig, hooks: Hooks
) -> TrainData:
    """Returns tokenised data; what is not tokenised yet is, into the run's directory.

    Raises:
        FileNotFoundError: Something is missing.
        ValueError: The data are bad, or were made for another model.
        Stopped: `hooks.stopping` said so; what is tokenised stays.
    """
    if not path.is_dir():
        path = _tokenize(settings, path, name, hooks)
    data = TrainData(
        path,
        config=config,
        max_length=settings.max_length,
        prefix_positions=settings.prefix_length,
    )
    check_origin(data, settings.model_name_or_path, hooks.note)
    return data


def _tokenize(settings: RunSettings, path: Path, name: str, hooks: Hooks) -> Path:
    from csm_jax.data.tokenize import tokenize_for

    made, prefix = settings.output_dir / "data" / name, settings.prefix_length
    hooks.note(f"tokenising {path} into {made}")

    def stop(*_: Any) -> None:
        if hooks.stopping():
            raise Stopped(0)

    try:
        tokenize_for(
            path,
            made,
            model=settings.model_name_or_path,
            max_length=settings.max_length - prefix,
            on_item=stop,
            on_progress=stop,
        )
    except ValueError as error:
        if not prefix:
            raise
        raise ValueError(
            f"{error} (of max_length={settings.max_length:,} positions the prefix takes "
            f"prefix_positions={prefix:,})"
        ) from error
    return made


def check_origin(data: TrainData, model: str, note: Callable[[str], None]) -> None:
    """Checks that data hold the ids and codes of a model's own tokenizer and codec.

    Raises:
        ValueError: Of others. What the model's files do not hold is noted and not compared.
    """
    from csm_jax import hub
    from csm_jax.data.identity import codec_hash, tokenizer_hash

    for what, known, find in (
        ("tokenizer", data.tokenizer_hash, lambda: tokenizer_hash(hub.locate_tokenizer(model))),
        ("codec", data.codec_hash, lambda: codec_hash(model)),
    ):
        try:
            own = find()
        except (FileNotFoundError, hub.HubError) as error:
            note(
                f"the data's {what} is not compared with the model's: {str(error).splitlines()[0]}"
            )
            continue
        if own != known:
            raise ValueError(
                f"{data.directory} was tokenised with another {what} ({known[:12]}) than that of {model} "
                f"({own[:12]}): tokenise the recordings again with --model {model}"
            )
