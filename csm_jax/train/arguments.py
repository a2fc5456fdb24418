"""The arguments of `csm-jax train`; parsing them needs the standard library only.

Names follow csm-hf and the Hugging Face Trainer; each may be written with hyphens too.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args

from csm_jax.train.settings import (
    LEARNING_RATES,
    METHODS,
    OPTIMIZERS,
    SCHEDULES,
    WEIGHT_DECAYS,
    Quantization,
    RunSettings,
)

DESCRIPTION = """\
Fine-tunes a model on conversations: all weights, LoRA adapters, or a prefix (a voice).
Whatever stops a run, the same command goes on from its last checkpoint.
"""
EXAMPLES = """\
exit status: 0 done, 2 error, 130 interrupted and 143 terminated (both after saving)

examples:
  csm-jax train --train_file talks.jsonl --eval_file held-out.jsonl --output_dir run1
  csm-jax train --train_file data/train --output_dir anna --method lora --model_name_or_path ./csm-1b
  csm-jax train --train_file data/anna --output_dir anna --method prefix --voice_name anna --consent
  csm-jax train --train_file data/train --output_dir big --mesh data=2,fsdp=4
then:
  csm-jax generate "Hello." --model run1/final
  csm-jax generate "Hello." --voice anna/final/anna.safetensors

run1/ then holds run.json, log.jsonl, checkpoints/, samples/ and final/, a model directory.
docs/training.md goes from recordings to a voice; docs/data.md describes the data.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `csm-jax train` to a parser."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    defaults = {field.name: field.default for field in dataclasses.fields(RunSettings)}

    def group(title: str) -> Any:
        section = parser.add_argument_group(title)

        def add(name: str, kind: Any, help: str, **options: Any) -> None:
            default = defaults[name]
            required = default is dataclasses.MISSING
            if not required:
                # `append` would add to a tuple.
                options["default"] = None if default == () else default
            if kind is bool:
                action = argparse.BooleanOptionalAction if default else "store_true"
                options["action"] = action
            else:
                options["type"] = kind
                options.setdefault(
                    "metavar", "PATH" if kind is Path else "N" if kind is int else "X"
                )
            shown = "" if required or default in (None, False, ()) else f" (default: {default})"
            names = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
            section.add_argument(*names, required=required, help=help + shown, **options)

        return add

    add = group("model and data")
    add(
        "train_file",
        Path,
        "JSON Lines, tars or Parquet, or what `csm-jax data tokenize` made of them",
    )
    add("eval_file", Path, "the same, for evaluation")
    add("output_dir", Path, "of the run; made, or continued")
    add("model_name_or_path", str, "a directory, a checkpoint file, or a hub id", metavar="SOURCE")
    add("layout", str, "the checkpoint's layout, where its names cannot tell", metavar="NAME")
    add("scratch", str, "random weights instead: csm_1b, tiny, or a config.json", metavar="SIZES")

    add = group("what is trained")
    add("method", str, "all weights, low-rank adapters, or a prefix", choices=METHODS, metavar=None)
    add("lora_rank", int, "rank of the adapters")
    add("lora_alpha", float, "they are scaled by this over the rank")
    add(
        "quantize",
        str,
        "keep the weights below LoRA's adapters in 4 or 8 bits",
        choices=get_args(Quantization),
        metavar=None,
    )
    add("prefix_positions", int, "vectors of the prefix")
    add("voice_name", str, "what the prefix's voice is called", metavar="NAME")
    add("consent", bool, "whoever is heard in the recordings agreed to being cloned (for a prefix)")

    add = group("objective")
    add("amortization_ratio", int, "the decoder sees one in N frames, drawn anew at every step")
    add("decoder_loss_weight", float, "of codebooks 1 to 31 against codebook 0")

    add("history_noise", float, "share of the audio codes read that are replaced by random ones")
    add("noisy_share", float, "share of the conversations that this is done to")
    add("codebook_dropout", float, "share of the frames read of which only the first codes are")

    def by_kind(values: dict[str, float]) -> str:
        return ", ".join(f"{kind} {value:g}" for kind, value in values.items())

    add = group("optimiser")
    add(
        "optim",
        str,
        "muon moves the matrices, AdamW the rest; for models from scratch",
        choices=OPTIMIZERS,
        metavar=None,
    )
    add("learning_rate", float, f"at its highest (default: {by_kind(LEARNING_RATES)})")
    add(
        "lr_scheduler_type",
        str,
        "after the warm-up",
        choices=SCHEDULES,
        metavar=None,
    )
    add("warmup_ratio", float, "share of the steps with a rising rate")
    add("weight_decay", float, f"(default: {by_kind(WEIGHT_DECAYS)})")
    add("adam_beta1", float, "")
    add("adam_beta2", float, "")
    add("adam_epsilon", float, "")
    add("max_grad_norm", float, "gradients are scaled down to this norm")
    add("num_train_epochs", int, "times through the data")
    add("max_steps", int, "this many steps instead")
    add(
        "per_device_train_batch_size",
        int,
        "rows of max_length positions per device and micro-batch",
    )
    add("gradient_accumulation_steps", int, "micro-batches per step")
    add("seed", int, "of order, drawn frames and new weights")

    add = group("machine")
    add(
        "dtype",
        str,
        "computed in (default: bfloat16, on a CPU float32)",
        choices=("float32", "bfloat16"),
        metavar=None,
    )
    add("max_length", int, "positions of a row, in which conversations are packed")
    add(
        "remat",
        str,
        "computed again instead of kept",
        choices=("none", "minimal", "full"),
        metavar=None,
    )
    add("mesh", str, "devices: data=2,fsdp=4,tensor=1 (default: one device)", metavar="AXES")

    add = group("what is told and kept")
    add("logging_steps", int, "steps from line to line of log.jsonl")
    add("save_steps", int, "steps from checkpoint to checkpoint")
    add("save_total_limit", int, "latest checkpoints kept")
    add(
        "resume_from_checkpoint",
        int,
        "go back to this step; later checkpoints are removed, so leave it out at the next start",
    )
    add("eval_steps", int, "steps from evaluation to evaluation (default: at the end only)")
    add("tensorboard", bool, "write TensorBoard's files as well")
    add("sample_steps", int, "steps from sample to sample of speech, and at the end")
    add(
        "sample_text",
        str,
        "what is spoken; may be given several times",
        action="append",
        metavar="TEXT",
    )
    add("sample_speaker", int, "who speaks it")
    add("watermark", bool, "mark the samples as generated")
    add(
        "export_layout",
        str,
        "of the trained weights: a name that `csm-jax convert --to` takes",
        metavar="NAME",
    )


def settings_of(args: argparse.Namespace) -> RunSettings:
    """Returns the settings of parsed arguments.

    Raises:
        ValueError: They contradict each other.
    """
    values: dict[str, Any] = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(RunSettings)
    }
    values["sample_text"] = tuple(values["sample_text"] or ())
    return RunSettings(**values)
