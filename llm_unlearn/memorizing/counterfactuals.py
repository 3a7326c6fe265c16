"""The counterfactual reference of a run or model: LoRA runs on parts of the records, nothing of them kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import files
from llm_unlearn.data.encoding import Example, encode
from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.counterfactual import (
    PREFIX,
    Outcome,
    Subsampling,
    run_counterfactual,
    runs_of,
)
from llm_unlearn.memorization.probing import probe
from llm_unlearn.memorizing.scoring import pad_of
from llm_unlearn.memorizing.targets import RunTarget, Target
from llm_unlearn.record_tables import RECORD

if TYPE_CHECKING:
    from peft import LoraConfig

    from llm_unlearn.approximate.arguments import UnlearningConfig

# Of a run's own training flags, those that an ordinary fine-tuning has too.
SHARED = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "adam_beta2",
    "max_grad_norm", "optim", "bf16", "fp16",
)  # fmt: skip


def measure_counterfactual(
    target: Target,
    base: Any,
    tokenizer: Any,
    config: "UnlearningConfig",
    lora: "LoraConfig",
    plan: Subsampling,
    say: Callable[[int, int], None] = lambda _done, _total: None,
) -> float:
    """Train the runs that are missing and keep what they gave each record beside the target.

    Args:
        base: the model before any fine-tuning; it comes back without an adapter.
        config: how each run trains; its output directory is used for nothing that stays.

    Returns:
        Seconds that all runs took.
    """
    from llm_unlearn.approximate.claim import training_flags
    from llm_unlearn.digests import base_digest

    length, completion_only = config.max_length, config.completion_only_loss
    examples = [encode(r, tokenizer, length, completion_only) for r in target.records]

    def train_and_probe(records: list[Record], seed: int) -> Outcome:
        return _train_and_probe(
            base, tokenizer, records, examples, replace(config, seed=seed), lora
        )

    flags = {**training_flags(config), "seed": None, "num_threads": None}
    shape = [lora.r, lora.lora_alpha, lora.lora_dropout]
    about = {"kind": "counterfactual", "config": digest([flags, shape]), "base": base_digest(base)}
    return run_counterfactual(
        target.tables, target.records, train_and_probe, plan, about, say, target.write
    )


def _train_and_probe(
    base: Any,
    tokenizer: Any,
    records: Sequence[Record],
    examples: Sequence[Example],
    config: "UnlearningConfig",
    lora: "LoraConfig",
) -> Outcome:
    from llm_unlearn.approximate.fine_tuning import Learning
    from llm_unlearn.approximate.unlearn import prepare, train

    session, output = prepare(base, tokenizer, records, (), config, Learning(), lora)
    try:
        train(session, Learning(), None, None)
        return probe(session.model, examples, pad_of(tokenizer))
    finally:
        files.remove(output)
        session.model.unload()


def of_run(
    target: RunTarget, plan: Subsampling, say: Callable[[int, int], None] = lambda _d, _t: None
) -> float:
    """`measure_counterfactual` of a run, with its own base, records and flags.

    What is trained is one ordinary LoRA on all records, since a node's data is not what is asked about.

    Raises:
        UserError: runs that are there were not asked about records that came since (a correction).
        RunError: a deletion came meanwhile; the runs that are finished are kept, without its rows.
    """
    from llm_unlearn.exact.base_model import load_base_of

    directory = target.run.directory
    base, tokenizer = load_base_of(directory)
    config, lora = flags_of_run(target)
    _check_complete(target)
    return measure_counterfactual(target, base, tokenizer, config, lora, plan, say)


def _check_complete(target: Target) -> None:
    held = set(target.pseudonyms())
    for name in runs_of(target.tables):
        if set(target.tables.read(name).columns[RECORD]) != held:
            raise UserError(
                f"{target.path / 'memorization'} holds counterfactual runs on other records than there are now: "
                f"remove {PREFIX}*.parquet there, and they are trained on what is left"
            )


def flags_of_run(target: RunTarget) -> "tuple[UnlearningConfig, LoraConfig]":
    """How a run trains its nodes, for one ordinary LoRA."""
    from peft import LoraConfig

    from llm_unlearn.approximate.arguments import UnlearningConfig

    run = target.run.directory.config
    shared: Mapping[str, Any] = {
        n: run.training[n] for n in SHARED if run.training.get(n) is not None
    }
    config = UnlearningConfig(
        output_dir=str(Path(target.path, "trainer", "counterfactual")), method="ga",
        save_strategy="no", max_length=run.max_length, num_threads=run.num_threads,
        completion_only_loss=run.completion_only, **shared,
    )  # fmt: skip
    lora = LoraConfig(
        r=run.lora.rank, lora_alpha=int(run.lora.alpha), lora_dropout=run.lora.dropout,
        use_rslora=run.lora.use_rslora, target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    return config, lora
