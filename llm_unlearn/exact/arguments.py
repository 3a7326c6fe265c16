"""The flags of an exact run: TRL's own plus those of S3T, and how they become a `RunConfig`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from llm_unlearn.errors import UserError
from llm_unlearn.exact.config import LoraSettings, ModelShape, RunConfig
from llm_unlearn.exact.modules import describe_model
from llm_unlearn.exact.selection import AGGREGATES, Rule
from llm_unlearn.exact.sequences import select_sequences

# Stored with their values even where they are the library's defaults, which may change.
ALWAYS_STORED = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "tf32", "loss_type", "seed",
    "activation_checkpointing", "average_tokens_across_devices", "dataloader_drop_last", "neftune_noise_alpha",
)  # fmt: skip

# Arguments that decide no bits but must reach the trainer.
RUNTIME = (
    "use_cpu",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "ddp_timeout",
    "torch_empty_cache_steps",
)

# Arguments of other parts: of evaluation, logging, saving, the Hub, data preparation, or set by us.
NOT_STORED = (
    "output_dir", "run_name", "report_to", "project", "disable_tqdm", "log_level", "log_level_replica",
    "log_on_each_node", "data_seed", "max_length", "completion_only_loss", "remove_unused_columns",
    "dataset_num_proc", "skip_memory_metrics", "local_rank", "ddp_find_unused_parameters", "ddp_backend",
    "push_to_hub", "per_device_eval_batch_size", "do_train", "do_eval", "do_predict", "debug",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",
)  # fmt: skip
NOT_STORED_PREFIXES = (
    "logging_",
    "eval_",
    "save_",
    "hub_",
    "trackio_",
    "include_",
    "dataloader_",
    "dataset_",
)
HIDDEN_URL = "<LEDGER_URL>"

# What would let one record's presence decide the bits of a node that it is not in, what would be
# ignored without a word, and why.
REFUSED: dict[str, str] = {
    "packing": "a packed sequence mixes records of different subjects",
    "padding_free": "a padding-free batch mixes records of different subjects",
    "load_best_model_at_end": "the best checkpoint would be chosen by looking at deletable data",
    "auto_find_batch_size": "the batch size, hence the bits, would depend on the free memory",
    "assistant_only_loss": "say --completion_only_loss, which covers chats too",
    "chat_template_path": "it adds trainable tokens, which all slices would share",
    "eos_token": "set it in the tokenizer: it is part of what the run is made of",
    "pad_token": "set it in the tokenizer: it is part of what the run is made of",
    "model_init_kwargs": "say --dtype and --attn_implementation",
    "trust_remote_code": "code from a model repository is not run",
    "use_liger_kernel": "its kernels were not checked for bitwise reproducibility",
    "resume_from_checkpoint": "an interrupted run resumes by itself: start it again on the same --output_dir",
}


# What is meant where a flag is not given. An expert is a shard of one slice: a LoRA on all layers,
# trained on nothing else, with enough steps, on whole sequences, so that a prompt tells whose it is;
# and if each subject has one, a deletion costs nobody else anything (recipes/exact_study.py).
# SISA has one order of slices: a stage continues the one before it, so another order is another run.
PRESETS: dict[str, dict[str, Any]] = {
    "s3t": {
        "num_shards": 1, "num_slices": 4, "num_sequences": 2, "num_train_epochs": 5.0,
        "blocks": "ranks", "completion_only_loss": True, "aggregate": "average",
    },
    "experts": {
        "num_shards": 0, "num_slices": 1, "num_sequences": 1, "num_train_epochs": 25.0,
        "blocks": "ranks", "completion_only_loss": False, "aggregate": "select",
    },
    "lego": {
        "num_shards": 12, "num_slices": 1, "num_sequences": 1, "num_train_epochs": 25.0,
        "blocks": "ranks", "completion_only_loss": True, "aggregate": "nearest",
    },
    "sisa": {
        "num_shards": 4, "num_slices": 3, "num_sequences": 1, "num_train_epochs": 5.0,
        "blocks": "whole", "completion_only_loss": True, "aggregate": "average",
    },
}  # fmt: skip


@dataclass
class S3TConfig(SFTConfig):
    """Training arguments of TRL, and the shape of an exact run."""

    output_dir: str | None = field(default="runs/s3t", metadata={"help": "The run directory."})
    exact_method: str = field(
        default="experts",
        metadata={
            "help": "experts (a LoRA for each shard, trained on its own), s3t (the paper's), sisa (a LoRA for "
            "each shard, trained slice after slice with checkpoints) or lego (each record in the "
            "shards whose public keys it resembles)."
        },
    )
    num_shards: int = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={
            "help": "Shards m: members of the ensemble, or experts; 0: one for each subject "
            "(experts: 0; s3t: 1; sisa: 4; lego: 12)."
        },
    )
    copies: int = field(
        default=2, metadata={"help": "lego: how many shards learn a record, and answer a prompt."}
    )
    public_path: str | None = field(
        default=None,
        metadata={"help": "lego: file of texts that are nobody's; its keys are made of them."},
    )
    num_slices: int = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={
            "help": "Slices L of a shard: the granularity of deletion (experts, lego: 1; s3t: 4; sisa: 3)."
        },
    )
    num_sequences: int = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={"help": "Sequences B per shard: the training budget (1; s3t: 2)."},
    )
    aggregate: str | None = field(
        default=None,
        metadata={
            "help": "How shards answer: average, vote or merge (one adapter) of all, or select or "
            "mixture of those that a prompt is for, else the base (experts: select; else average; "
            "lego: nearest, the mean of those whose keys the prompt resembles)."
        },
    )
    select_lead: float = field(
        default=Rule.lead,
        metadata={
            "help": "select: part of a prompt's weight by which a subject's words must lead to be "
            "believed unread; with less the prompt is read."
        },
    )
    select_margin: float = field(
        default=Rule.margin,
        metadata={"help": "select: nats a token by which the best must lead the second best."},
    )
    select_floor: float | None = field(
        default=None,
        metadata={"help": "select: least log-probability of any token of a prompt (off)."},
    )
    sequence_method: str = field(
        default="cyclic",
        metadata={"help": "How sequences are chosen: cyclic, bms, conditional or random."},
    )
    slice_prior: list[float] | None = field(
        default=None,
        metadata={"help": "Probability that a request hits slice 1, 2, ... (bms, conditional)."},
    )
    blocks: str = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={
            "help": "What a stage owns: ranks (a band in every layer), layers (the S3T paper), or, "
            "with sisa alone, whole (ranks; sisa: whole)."
        },
    )
    slice_data: str = field(
        default="cumulative",
        metadata={"help": "What a stage sees: cumulative (slices 1 to i) or disjoint (slice i)."},
    )
    prefix_cache: bool = field(
        default=True, metadata={"help": "Replay the hidden states below a block (--blocks layers)."}
    )
    num_threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of every process; bits are compared under equal ones only."},
    )
    hub_base_model: str | None = field(
        default=None,
        metadata={
            "help": "--push_to_hub: the base model's name on the Hub, if it is a directory here."
        },
    )
    track_memorization: bool = field(
        default=False,
        metadata={
            "help": "Keep what training shows of each record, epoch by epoch, for `llm-unlearn memorization`."
        },
    )
    key_path: str | None = field(
        default=None,
        metadata={"help": "secret.key of another run, to reproduce its slices and bits."},
    )
    ledger_url: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "Keep the ledger on a PostgreSQL server: postgresql://USER@HOST/DATABASE, the password "
            "in ~/.pgpass or PGPASSWORD (default: a SQLite file in the run)."
        },
    )
    encrypt: bool = field(
        default=False,
        metadata={
            "help": "Encrypt records, nodes and caches on disk, each under a key that a deletion destroys."
        },
    )
    key_store: str | None = field(
        default=None,
        metadata={
            "help": "encrypt: a file for the keys, outside of what is backed up, or "
            "vault+https://HOST/MOUNT/PATH (slice.keys in the run directory)."
        },
    )
    learning_rate: float = field(
        default=2e-4, metadata={"help": "Peak learning rate of every node."}
    )
    num_train_epochs: float = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={"help": "Epochs of every node over its own data (experts, lego: 25; else 5)."},
    )
    gradient_checkpointing: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Old name of --activation_checkpointing."}
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Learn completions only, where records have a prompt (experts: false)."},
    )

    def __post_init__(self) -> None:
        if self.exact_method not in PRESETS:
            raise UserError(
                f"--exact_method must be one of {', '.join(PRESETS)}, got {self.exact_method!r}"
            )
        for name, value in PRESETS[self.exact_method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        # Without an accelerator several processes only find each other when the CPU is asked for.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """All flags as plain values, but for the ledger's URL, in which a password may stand."""
        return super().to_dict() | {"ledger_url": self.ledger_url and HIDDEN_URL}

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace(self.ledger_url, HIDDEN_URL) if self.ledger_url else text


def check_arguments(arguments: S3TConfig, model_arguments: ModelConfig) -> None:
    """Refuse what would break exactness, and what cannot be.

    Raises:
        UserError: names the flag and the reason.
    """
    for name, reason in REFUSED.items():
        if getattr(arguments, name):
            raise UserError(f"--{name} is refused: {reason}")
    if str(arguments.eval_strategy) not in ("no", "IntervalStrategy.NO"):
        raise UserError("--eval_strategy is refused: score the served adapter afterwards")
    if str(arguments.train_sampling_strategy) != "random":
        raise UserError(
            "--train_sampling_strategy is refused: batches must not depend on other records' lengths"
        )
    if arguments.dataset_text_field != "text":
        raise UserError(
            f"--dataset_text_field is refused: rename column {arguments.dataset_text_field!r} to text"
        )
    if arguments.key_store is not None and not arguments.encrypt:
        raise UserError("--key_store is for the keys of an encrypted run: say --encrypt too")
    if arguments.report_to not in (["none"], [], "none", None):
        raise UserError(
            "--report_to is refused: training curves of single nodes would outlive a deletion"
        )
    if (
        model_arguments.lora_modules_to_save
        or model_arguments.use_dora
        or model_arguments.lora_target_parameters
    ):
        raise UserError(
            "only plain LoRA factors can be switched off exactly: no modules_to_save, DoRA or parameters"
        )
    if model_arguments.load_in_4bit or model_arguments.load_in_8bit:
        raise UserError(
            "quantised bases are not supported: their kernels were not checked for reproducibility"
        )
    _check_shape(arguments)


def _check_shape(arguments: S3TConfig) -> None:
    choices = {
        "blocks": ("layers", "ranks", "whole"),
        "slice_data": ("cumulative", "disjoint"),
        "aggregate": AGGREGATES,
    }
    for name, known in choices.items():
        if getattr(arguments, name) not in known:
            raise UserError(
                f"--{name} must be one of {', '.join(known)}, got {getattr(arguments, name)!r}"
            )
    if (
        arguments.exact_method in ("experts", "lego")
        and arguments.num_slices * arguments.num_sequences != 1
    ):
        raise UserError(
            f"with {arguments.exact_method} a shard has one slice and one sequence: --num_shards "
            "says how many there are"
        )
    if (arguments.exact_method == "sisa") != (arguments.blocks == "whole"):
        raise UserError(
            "--exact_method sisa and --blocks whole go together: leave --blocks out for sisa, and "
            "say ranks or layers for the others"
        )
    if arguments.exact_method == "sisa" and arguments.num_sequences != 1:
        raise UserError(
            "sisa trains the slices of a shard in one order: leave --num_sequences out, or use s3t"
        )
    _check_keys(arguments)
    if not arguments.select_margin >= 0 or (arguments.select_floor or 0) > 0:
        raise UserError("--select_margin is 0 or more, --select_floor a log-probability: 0 or less")
    if not 0 <= arguments.select_lead <= 1:
        raise UserError(f"--select_lead is a part, 0 to 1, got {arguments.select_lead}")
    for name in ("num_shards", "num_slices", "num_sequences"):
        least = 0 if name == "num_shards" and arguments.exact_method == "experts" else 1
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")


def _check_keys(arguments: S3TConfig) -> None:
    by_key = ("nearest", "average", "vote", "merge")
    if arguments.exact_method != "lego":
        if arguments.aggregate == "nearest":
            raise UserError("--aggregate nearest needs the keys of --exact_method lego")
    elif arguments.aggregate not in by_key:
        raise UserError(f"lego finds shards by its keys: --aggregate one of {', '.join(by_key)}")
    elif not 1 <= arguments.copies <= arguments.num_shards:
        raise UserError(f"--copies must be 1 to --num_shards, got {arguments.copies}")


def make_config(arguments: S3TConfig, model_arguments: ModelConfig) -> RunConfig:
    """The frozen configuration of a run.

    Raises:
        UserError: a flag is refused or impossible.
    """
    check_arguments(arguments, model_arguments)
    try:
        sequences = select_sequences(
            arguments.num_slices,
            arguments.num_sequences,
            arguments.sequence_method,
            arguments.slice_prior,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    values = arguments.to_dict()
    return RunConfig(
        num_shards=arguments.num_shards,
        num_slices=arguments.num_slices,
        sequences=tuple(sequences),
        blocks=arguments.blocks,  # pyright: ignore[reportArgumentType]
        slice_data=arguments.slice_data,  # pyright: ignore[reportArgumentType]
        max_length=arguments.max_length or 1024,
        completion_only=bool(arguments.completion_only_loss),
        prefix_cache=arguments.prefix_cache and arguments.blocks == "layers",
        lora=LoraSettings(
            rank=model_arguments.lora_r,
            alpha=model_arguments.lora_alpha,
            dropout=model_arguments.lora_dropout,
            use_rslora=model_arguments.use_rslora,
        ),
        training=_stored(values),
        model={
            "dtype": model_arguments.dtype,
            "attn_implementation": model_arguments.attn_implementation,
        },
        runtime={name: values[name] for name in RUNTIME},
        num_threads=arguments.num_threads or torch.get_num_threads(),
        copies=arguments.copies if arguments.exact_method == "lego" else 1,
        rule=Rule(
            arguments.aggregate,  # pyright: ignore[reportArgumentType]
            arguments.select_margin,
            arguments.select_floor,
            arguments.select_lead,
        ),
    )


def _stored(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments that decide bits: a fixed list, and whatever else was changed and is not known as neutral."""
    neutral_start = {"output_dir": "unused", "bf16": False, "activation_checkpointing": False}
    defaults = SFTConfig(**neutral_start, use_cpu=values["use_cpu"]).to_dict()
    stored = {name: values[name] for name in ALWAYS_STORED}
    for name, default in defaults.items():
        neutral = name in (*RUNTIME, *NOT_STORED) or name.startswith(NOT_STORED_PREFIXES)
        if name not in stored and not neutral and values[name] != default:
            stored[name] = values[name]
    return stored


def make_shape(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_arguments: ModelConfig
) -> ModelShape:
    """Describe the base model for a run, with the target modules that were asked for."""
    targets = model_arguments.lora_target_modules
    names: list[str] | None = [targets] if isinstance(targets, str) else targets
    name = str(model_arguments.model_name_or_path or model.config.name_or_path)
    revision = model_arguments.model_revision
    return describe_model(model, tokenizer, name, None if revision == "main" else revision, names)
