"""What a run leaves behind: a model directory, adapters, or a voice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from csm_jax.array_typing import Params, PyTree
from csm_jax.config import CSMConfig
from csm_jax.corpus.files import sync_directory
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
    directory (tokenizer, codec, watermark) are copied from the base model, where it has them; a model
    trained from random weights has those that its data were made with. Those that it lacks and that
    have been put into `final` since stay there; all else in it is replaced, when all is written.

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

    final = settings.output_dir / FINAL_NAME
    if jax.process_index() != 0:
        return final
    new, old = (final.with_name(f".{FINAL_NAME}.{which}") for which in ("new", "old"))
    if old.exists() and not final.exists():  # stopped between two renames
        os.replace(old, final)
    for directory in (new, old):
        shutil.rmtree(directory, ignore_errors=True)
    try:
        if isinstance(method, (Full, Lora)):
            _write_model(new, final, settings, config, method, trainable, frozen, note)
        else:
            _write_voice(new, settings, config, trainable, frozen, data)
        _sync(new)
        if final.exists():
            os.replace(final, old)
        os.replace(new, final)
        sync_directory(final.parent)
    finally:
        for directory in (new, old):
            shutil.rmtree(directory, ignore_errors=True)
    return final


def _write_model(
    new: Path,
    final: Path,
    settings: RunSettings,
    config: CSMConfig,
    method: Full | Lora,
    trainable: PyTree,
    frozen: Params,
    note: Callable[[str], None],
) -> None:
    from csm_jax import hub, weights

    model, params, codec = settings.model_name_or_path, trainable, None
    if isinstance(method, Lora):
        params = merge_lora(frozen, trainable, method.lora, dtype=None)
    # Of a model on the hub that nothing was loaded from, the weights are not fetched now.
    if settings.scratch is None or hub.local_path(model) is not None:
        files = hub.locate(model)
        codec = files.checkpoint if _holds_codec(files) else None
    weights.save_checkpoint(new, config, params, layout=settings.export_layout, codec=codec)
    if isinstance(method, Lora):
        from csm_jax.train.peft import save_adapters

        save_adapters(new / "adapter", config, method.lora, trainable, base_model=model)
    _bring_along(model, new, final, note, mimi=codec is None)


def _bring_along(
    model: str, new: Path, final: Path, note: Callable[[str], None], *, mimi: bool
) -> None:
    """Copies what else belongs to a model directory from the base model, and says what it lacks."""
    from csm_jax import hub

    marks = f"silentcipher/{hub.WATERMARK_FOLDER}"
    wanted = [(hub.TOKENIZER, hub.locate_tokenizer), (marks, hub.locate_watermark)]
    if mimi:  # else it has been written with the weights
        wanted.append((hub.MIMI, hub.locate_mimi))
    for name, find in wanted:
        try:
            found = find(model)
        except (FileNotFoundError, hub.HubError):
            found = final / name
            if not found.exists():
                note(f"{final} lacks {name}, as {model} does: put it there to speak with it")
                continue
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if found.is_dir() else shutil.copyfile
        copy(found, new / name)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _holds_codec(files: ModelFiles) -> bool:
    from csm_jax.weights.mimi import holds_mimi

    return files.mimi_beside() is None and holds_mimi(files.checkpoint)


def _write_voice(
    new: Path,
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
    new.mkdir()
    write_voice(new / f"{voice.name}.safetensors", voice)
