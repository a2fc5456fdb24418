"""What a run leaves behind: a model directory, adapters, or a voice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from csm_jax.array_typing import Params, PyTree
from csm_jax.config import CSMConfig
from csm_jax.data.loader import TrainData
from csm_jax.train.lora import merge_lora
from csm_jax.train.methods import Full, Lora, Method
from csm_jax.train.settings import RunSettings

if TYPE_CHECKING:
    from csm_jax.hub import ModelFiles

FINAL_NAME = "final"


def export(
    settings: RunSettings,
    config: CSMConfig,
    method: Method,
    trainable: PyTree,
    frozen: Params,
    *,
    data: TrainData,
    note: Callable[[str], None],
) -> Path:
    """Returns `<output_dir>/final` with what was trained.

    All weights: a model directory in `export_layout`, float32. LoRA: the adapters in PEFT's form in
    `adapter/`, and the model with them merged. A prefix: a voice file. Files that belong to a model
    directory (tokenizer, codec, watermark) are copied from the base model, where it has them.

    Args:
        settings: Of the run.
        config: Sizes.
        method: What was trained.
        trainable: As it ended.
        frozen: What it stood beside.
        data: What it was trained on.
        note: Told what the base model lacks that a model directory needs.

    Raises:
        OSError: It cannot be written.
    """
    import jax

    from csm_jax import hub, weights

    final = settings.output_dir / FINAL_NAME
    if jax.process_index() != 0:
        return final
    if isinstance(method, (Full, Lora)):
        params = trainable
        if isinstance(method, Lora):
            from csm_jax.train.peft import save_adapters

            save_adapters(
                final / "adapter",
                config,
                method.lora,
                trainable,
                base_model=settings.model_name_or_path,
                overwrite=True,
            )
            params = merge_lora(frozen, trainable, method.lora, dtype=None)
        files = None if settings.scratch is not None else hub.locate(settings.model_name_or_path)
        weights.save_checkpoint(
            final,
            config,
            params,
            layout=settings.export_layout,
            codec=files.checkpoint if files is not None and _holds_codec(files) else None,
            overwrite=True,
        )
        if files is not None:
            _bring_along(files, final, note)
        return final
    _write_voice(final, settings, config, trainable, frozen, data)
    return final


def _bring_along(files: ModelFiles, final: Path, note: Callable[[str], None]) -> None:
    """Copies what else belongs to a model directory from the base model, and says what it lacks."""
    from csm_jax.hub import MIMI, TOKENIZER, WATERMARK_FOLDER, HubError

    marks = f"silentcipher/{WATERMARK_FOLDER}"
    wanted = [(TOKENIZER, files.tokenizer), (marks, files.watermark_dir)]
    if not _holds_codec(files):  # else it has been written with the weights
        wanted.append((MIMI, files.mimi))
    for name, find in wanted:
        try:
            found = find()
        except (FileNotFoundError, HubError):
            note(
                f"{final} lacks {name}, as {files.checkpoint.parent} does: put it there to speak with it"
            )
            continue
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if found.is_dir() else shutil.copyfile
        if not (final / name).exists():
            copy(found, final / name)


def _holds_codec(files: ModelFiles) -> bool:
    from csm_jax.weights.mimi import holds_mimi

    return files.mimi_beside() is None and holds_mimi(files.checkpoint)


def _write_voice(
    final: Path,
    settings: RunSettings,
    config: CSMConfig,
    trainable: PyTree,
    frozen: Params,
    data: TrainData,
) -> None:
    import numpy as np

    from csm_jax.voices import make_provenance, model_hash, prefix_voice
    from csm_jax.voices.files import write_voice

    told = make_provenance(
        f"prefix of {settings.model_name_or_path}, trained on {settings.train_file.name} "
        f"({data.fingerprint[:16]})",
        consent=settings.consent,
    )
    voice = prefix_voice(
        settings.voice_name,
        np.asarray(trainable["vectors"], np.float32),
        config=config,
        model=model_hash(frozen) or "",
        provenance=told,
    )
    final.mkdir(parents=True, exist_ok=True)
    path = final / f"{voice.name}.safetensors"
    path.unlink(missing_ok=True)
    write_voice(path, voice)
