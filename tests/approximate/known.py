"""A tiny model that knows its records, and what a model knows."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.data.encoding import encode
from llm_unlearn.data.records import Record
from tests.tiny import make_tiny_model, make_tiny_tokenizer, tiny_records

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def forget_and_retain() -> tuple[list[Record], list[Record]]:
    """Four of twelve subjects are to be forgotten, two records each."""
    records = tiny_records(12, 2)
    return records[:8], records[8:]


@functools.cache
def _trained() -> Any:
    """Every record is known: about -0.05 nats a token."""
    forget, retain = forget_and_retain()
    model, tokenizer = make_tiny_model(layers=2), make_tiny_tokenizer()
    examples = [encode(r, tokenizer, 64, True) for r in [*forget, *retain]]
    width = max(len(e.input_ids) for e in examples)
    ids = torch.tensor([e.input_ids + [0] * (width - len(e.input_ids)) for e in examples])
    labels = torch.tensor([e.labels + [-100] * (width - len(e.labels)) for e in examples])
    mask = torch.tensor(
        [[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in examples]
    )
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def knowing_model() -> Any:
    """A fresh copy of the model that knows every record."""
    return copy.deepcopy(_trained())


def knowledge(model: Any, records: Sequence[Record]) -> float:
    """Mean log-probability of an answer's token, over all tokens of all records, in nats."""
    tokenizer, total, count = make_tiny_tokenizer(), 0.0, 0
    model.eval()
    for record in records:
        example = encode(record, tokenizer, 64, True)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
        with torch.no_grad():
            log_TV = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        counted = labels >= 0
        log_T = log_TV.float().log_softmax(-1)[torch.arange(len(labels)), labels.clamp_min(0)]
        total += float(log_T[counted].sum())
        count += int(counted.sum())
    return total / count


def arguments(output: Path, method: str, **options: Any) -> UnlearningConfig:
    """Few steps with a high learning rate: enough for a direction to be sure."""
    defaults: dict[str, Any] = {
        "num_train_epochs": 5, "learning_rate": 2e-3, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "warmup_steps": 0, "max_length": 64, "save_strategy": "no",
        "use_cpu": True, "bf16": False,
    }  # fmt: skip
    return UnlearningConfig(output_dir=str(output), method=method, **{**defaults, **options})


def read_result(output: Path, full: bool) -> Any:
    """What was written, loaded as a user would."""
    from transformers import AutoModelForCausalLM

    if full:
        return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(knowing_model(), str(output)).eval()
