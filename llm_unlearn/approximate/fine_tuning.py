"""Ordinary fine-tuning with the same trainer: the model before unlearning, and its retrained twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import Card, Method

if TYPE_CHECKING:
    from peft import LoraConfig

    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record
    from llm_unlearn.observing import Observer


@dataclass
class Learning(Method):
    """L = NLL of the records' labels. It unlearns nothing, so it is not in the table."""

    card = Card(
        title="Fine-tuning",
        source="arXiv 2106.09685 (LoRA)",
        idea="Learns records.",
        use_when="A model that knows, or a retrained one, is wanted.",
        fails_when="Too few epochs.",
    )
    uses_retain = False

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        return [side.per_token("records", -side.log_probabilities_BT)]


def fine_tune(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    config: UnlearningConfig,
    lora: LoraConfig,
    on_step: Callable[[int, int], None] | None = None,
    observer: Observer | None = None,
) -> Path:
    """Train a fresh LoRA (or, with `config.full`, the weights) on records, and write it.

    Args:
        observer: watches every forward pass, by the numbers of the records.

    Returns:
        `config.output_dir`: an ordinary adapter or model with its tokenizer, without checkpoints.
    """
    from llm_unlearn.approximate.result import save_result
    from llm_unlearn.approximate.unlearn import prepare, train

    session, output = prepare(model, tokenizer, records, (), config, Learning(), lora)
    train(session, Learning(), None, on_step, observer)
    save_result(session, output)
    return output
