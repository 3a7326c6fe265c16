"""The flags of approximate unlearning: those of Transformers' trainer, and ours."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from llm_unlearn.approximate.methods import METHODS, load_method
from llm_unlearn.errors import UserError

# What holds where neither the person nor the method's paper says otherwise (open-unlearning's).
COMMON: dict[str, Any] = {
    "learning_rate": 1e-5, "num_train_epochs": 10.0, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4, "weight_decay": 0.0, "lr_scheduler_type": "linear",
    "warmup_steps": 0.0, "optim": "adamw_torch", "optim_args": None, "adam_beta2": 0.999,
    "max_grad_norm": 1.0, "max_steps": -1, "stop_samples": "never",
}  # fmt: skip
# Papers tune all weights; a LoRA wants a learning rate about ten times higher.
LORA_FACTOR = 10.0

REFUSED: dict[str, str] = {
    "load_best_model_at_end": "say --keep best",
    "auto_find_batch_size": "the batch size would depend on the free memory",
    "group_by_length": "the order of rows depends on the seed alone",
}
STOPS = ("never", "utility_floor", "forget_at_retrain")
KEEPS = ("last", "best")


def preset_field(name: str, what: str) -> Any:
    return field(default=None, metadata={"help": f"{what} (default: the method's paper's)"})


@dataclass
class UnlearningConfig(TrainingArguments):
    """Training arguments, and how a forget set is unlearned.

    Flags that are not given come from the method's preset, then from `COMMON`.
    """

    output_dir: str | None = field(default="runs/unlearned", metadata={"help": "Where it goes."})
    method: str = field(default="npo", metadata={"help": "One of the table's."})
    full: bool = field(default=False, metadata={"help": "Train the weights, not a LoRA."})
    trainable: str | None = field(
        default=None, metadata={"help": "Regular expression of the modules to train (all)."}
    )
    max_length: int = field(default=1024, metadata={"help": "Rows are cut at the end beyond it."})
    completion_only_loss: bool = field(
        default=True, metadata={"help": "Look at answers only, where rows have a prompt."}
    )
    retain_projection: float | None = field(
        default=None,
        metadata={
            "help": "PGU: take out of each gradient what lies in the span of the retain set's inputs, "
            "that part of their variance (paper: 0.95; off)."
        },
    )
    stop_samples: str = preset_field(
        "stop_samples", "Leave out forget rows that are forgotten, each round: never or icu"
    )
    stop_when: str = field(default="never", metadata={"help": f"End early: {', '.join(STOPS)}."})
    utility_floor: float | None = field(
        default=None,
        metadata={"help": "Utility below which training ends (the retrained model's)."},
    )
    keep: str = field(
        default="last", metadata={"help": "Which state is written: last, or best (evaluated)."}
    )
    num_threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of every process; equal bits need equal ones (torch's)."},
    )
    hub_base_model: str | None = field(
        default=None,
        metadata={
            "help": "--push_to_hub: the base model's name on the Hub, if it is a directory here."
        },
    )
    save_strategy: str = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="epoch", metadata={"help": "epoch: an interrupted run goes on from there; or no."}
    )
    learning_rate: float = preset_field("learning_rate", "Peak learning rate")
    num_train_epochs: float = preset_field("num_train_epochs", "Passes over the forget set")
    max_steps: int = preset_field("max_steps", "Optimizer steps instead of epochs")
    per_device_train_batch_size: int = preset_field("per_device_train_batch_size", "Rows a batch")
    gradient_accumulation_steps: int = preset_field("gradient_accumulation_steps", "Batches a step")
    weight_decay: float = preset_field("weight_decay", "Weight decay")
    lr_scheduler_type: str = preset_field("lr_scheduler_type", "Schedule")
    warmup_steps: float = preset_field("warmup_steps", "Steps of warm-up, or a share below 1")
    optim: str = preset_field("optim", "Optimizer")
    adam_beta2: float = preset_field("adam_beta2", "Adam's second beta")
    max_grad_norm: float = preset_field("max_grad_norm", "Clip gradients at this norm; 0: never")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown --method {self.method!r}: one of {', '.join(METHODS)}")
        preset = {**COMMON, **load_method(self.method).preset}
        if not self.full:
            preset["learning_rate"] *= LORA_FACTOR
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        # Without an accelerator several processes only find each other when the CPU is asked for.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self._check()
        self.remove_unused_columns = False
        self.disable_tqdm = True
        self.report_to = "none"
        self.logging_strategy = "no"
        self.save_strategy = "no" if self.save_strategy == "no" else "epoch"
        self.save_total_limit = 1
        super().__post_init__()

    def _check(self) -> None:
        for name, reason in REFUSED.items():
            if getattr(self, name, False):
                raise UserError(f"--{name} is refused: {reason}")
        for name, known in (
            ("stop_when", STOPS), ("keep", KEEPS), ("stop_samples", ("never", "icu")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.eval_strategy != "no":
            raise UserError(
                "--eval_strategy is refused: say --eval_suite, which asks after each epoch"
            )
        if min(self.per_device_train_batch_size, self.gradient_accumulation_steps) < 1:
            raise UserError(
                "--per_device_train_batch_size and --gradient_accumulation_steps are at least 1"
            )
        if not self.learning_rate > 0 or self.num_train_epochs <= 0 or self.max_length < 2:
            raise UserError("--learning_rate, --num_train_epochs and --max_length are above 0")
        if self.num_threads is not None and self.num_threads < 1:
            raise UserError(f"--num_threads must be at least 1, got {self.num_threads}")
        if self.retain_projection is not None and not 0 < self.retain_projection < 1:
            raise UserError("--retain_projection is a part of the variance, between 0 and 1")
