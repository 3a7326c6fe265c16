"""Gram matrices of what goes into linear layers: X^T X over every position of every row.

They are computed from text and tell about it: whoever writes one to disk says so.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.approximate.batches import collate
from llm_unlearn.approximate.step import forward
from llm_unlearn.data.encoding import Example

BATCH = 8


def input_grams(
    model: Any, modules: Collection[str], examples: Sequence[Example], pad_token_id: int
) -> dict[str, Tensor]:
    """X^T X of each module's inputs, (D, D) in double precision on the CPU, without dropout."""
    found: dict[str, Tensor] = {}

    def adds(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def add(_: Any, given: tuple[Any, ...]) -> None:
            rows_ND = given[0].detach().reshape(-1, given[0].shape[-1])
            rows_ND = rows_ND.to(precise(rows_ND.device)).double()
            found[name] = found.get(name, 0.0) + (rows_ND.T @ rows_ND).cpu()

        return add

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(adds(name)) for name in sorted(modules)
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for part in _equally_long(examples):
                batch = collate([(example, 0, True) for example in part], pad_token_id)
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                forward(model, batch, hidden=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return found


def precise(device: torch.device) -> torch.device:
    """Where double precision is: there, but on Apple's GPUs."""
    return torch.device("cpu") if device.type == "mps" else device


def _equally_long(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Batches without padding, so that every input that a layer sees is one of a token."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    for _, rows in itertools.groupby(ordered, key=lambda example: len(example.input_ids)):
        same = list(rows)
        yield from (same[start : start + BATCH] for start in range(0, len(same), BATCH))
