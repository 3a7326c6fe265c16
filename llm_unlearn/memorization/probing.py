"""Any model asked about records once: what it gives their tokens, evaluating and without dropout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_unlearn.data.encoding import IGNORED, Example
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.memorization.scores import means_by_record

TOKENS_AT_ONCE = 4096


def batches(examples: Sequence[Example], limit: int = TOKENS_AT_ONCE) -> Iterator[list[int]]:
    """Numbers of the examples, long ones together: a batch padded holds at most `limit` tokens."""
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) + 1) * len(examples[number].input_ids) > limit:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def padded(examples: Sequence[Example], pad_token_id: int, device: Any) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (B, T) each, padded on the right."""
    width = max(len(example.input_ids) for example in examples)

    def rows(values: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor(
            [value + [filler] * (width - len(value)) for value in values], device=device
        )

    return {
        "input_ids": rows([e.input_ids for e in examples], pad_token_id),
        "attention_mask": rows([[1] * len(e.input_ids) for e in examples], 0),
        "labels": rows([e.labels for e in examples], IGNORED),
    }


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout, as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the next tokens, (B, T - 1, V); those of the labels `batch["labels"][:, 1:]`."""
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**asked, use_cache=False).logits[:, :-1]


def probe(
    model: Any,
    examples: Sequence[Example],
    pad_token_id: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, NDArray[Any]]:
    """What the finished model gives each record: `ROW_VALUES` and `tokens`, in the order of the records.

    These are values of one moment, and no means over training.
    """
    seen = Observations()
    with evaluating(model), torch.no_grad():
        for numbers in batches(examples):
            batch = padded([examples[n] for n in numbers], pad_token_id, model.device)
            index = torch.tensor(numbers)
            seen.observe_logits(index, 0, logits_of(model, batch), batch["labels"][:, 1:])
            advance(len(numbers))
    columns = seen.collect()
    count = len(examples)
    return {
        name: means_by_record(columns["index"], columns[name], count)
        for name in columns
        if name not in ("index", "epoch")
    }


def token_counts(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Supervised tokens of each record."""
    return np.array([sum(label != IGNORED for label in e.labels[1:]) for e in examples])
