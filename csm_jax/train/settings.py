"""All settings of a training run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

METHODS = ("full", "lora", "prefix")
OPTIMIZERS = ("adamw", "muon")
"""What moves the weights (`optim`)."""
SCHEDULES = ("cosine", "linear", "constant")
"""What follows the warm-up (`lr_scheduler_type` of the Hugging Face Trainer)."""
Quantization = Literal["nf4", "int4", "int8"]
"""How the weights below adapters may be kept (`csm_jax.train.quantize`)."""
LEARNING_RATES = {"full": 1e-5, "lora": 2e-4, "prefix": 3e-2, "scratch": 3e-3}
"""What `learning_rate=None` means, by method; `scratch` where the weights start random."""
WEIGHT_DECAYS = {"full": 0.0, "lora": 0.0, "prefix": 0.0, "scratch": 0.1}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A run. Names as on the command line, which follow csm-hf and the Hugging Face Trainer.

    `csm-jax train --help` says what each is for.
    """

    train_file: Path
    output_dir: Path
    model_name_or_path: str = "sesame/csm-1b"
    layout: str | None = None
    scratch: str | None = None
    eval_file: Path | None = None
    method: str = "full"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    quantize: Quantization | None = None
    prefix_positions: int = 16
    amortization_ratio: int = 16
    decoder_loss_weight: float = 1.0
    history_noise: float = 0.0
    noisy_share: float = 0.8
    codebook_dropout: float = 0.0
    max_length: int = 2048
    num_train_epochs: int = 3
    max_steps: int | None = None
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    optim: str = "adamw"
    learning_rate: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42
    dtype: str | None = None
    remat: str = "minimal"
    mesh: str | None = None
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int | None = 2
    eval_steps: int | None = None
    resume_from_checkpoint: int | None = None
    tensorboard: bool = False
    sample_steps: int | None = None
    sample_text: tuple[str, ...] = ()
    sample_speaker: int = 0
    watermark: bool = True
    export_layout: str = "sesame"
    voice_name: str = "trained"
    consent: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.scratch is not None and self.method != "full":
            raise ValueError(
                f"scratch trains all weights, so method must be 'full', not {self.method!r}"
            )
        if self.quantize is not None and (self.method != "lora" or self.mesh is not None):
            raise ValueError("quantize is for method='lora' on one device, without a mesh")
        if self.optim == "muon" and (self.method != "full" or self.mesh is not None):
            raise ValueError("optim='muon' is for method='full' on one device, without a mesh")
        for name in (
            "amortization_ratio", "max_length", "num_train_epochs", "per_device_train_batch_size",
            "gradient_accumulation_steps", "logging_steps", "save_steps", "lora_rank",
            "prefix_positions", "save_total_limit", "max_steps", "eval_steps", "sample_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.decoder_loss_weight < math.inf:
            raise ValueError(
                f"decoder_loss_weight must be at least 0 and finite, got {self.decoder_loss_weight}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        if self.sample_speaker < 0:
            raise ValueError(f"sample_speaker must be at least 0, got {self.sample_speaker}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"warmup_ratio must be at least 0 and below 1, got {self.warmup_ratio}"
            )
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.eval_steps is not None and self.eval_file is None:
            raise ValueError("eval_steps needs an eval_file")
        if self.method == "prefix" and not self.consent:
            raise ValueError(
                "a prefix is a voice: say that whoever is heard in the recordings agreed to being cloned "
                "(--consent, consent=True)"
            )
        if (self.sample_steps is not None) != bool(self.sample_text):
            raise ValueError("sample_steps and sample_text go together")
        if self.max_length <= self.prefix_length:
            raise ValueError(
                f"max_length={self.max_length} leaves no room beside prefix_positions={self.prefix_positions}"
            )

    @property
    def prefix_length(self) -> int:
        """Positions of every segment that a trained prefix takes."""
        return self.prefix_positions if self.method == "prefix" else 0

    @property
    def kind(self) -> str:
        """The method, or `scratch`: what the learning rate's default goes by."""
        return "scratch" if self.scratch is not None else self.method

    def deciding(self) -> dict[str, Any]:
        """Returns the settings that decide what weights a run ends with, as JSON.

        Without those that have no effect beside the others, and without those of which the run itself
        says what they came to: its first weights, sizes, dtype, mesh and rows.
        """
        left_out = {
            "output_dir", "train_file", "eval_file", "logging_steps", "save_steps", "save_total_limit",
            "eval_steps", "resume_from_checkpoint", "tensorboard", "sample_steps", "sample_text",
            "sample_speaker", "watermark", "export_layout", "voice_name", "consent",
            "model_name_or_path", "layout", "scratch", "dtype", "mesh", "per_device_train_batch_size",
        }  # fmt: skip
        if self.max_steps is not None:
            left_out |= {"num_train_epochs"}
        if self.method != "lora":
            left_out |= {"lora_rank", "lora_alpha", "quantize"}
        if self.method != "prefix":
            left_out |= {"prefix_positions"}
        if not self.history_noise:
            left_out |= {"noisy_share"}
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in left_out
        }
