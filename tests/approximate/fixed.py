"""Sides whose logits and hidden states are given, so that a method's terms can be computed by hand."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.approximate.step import UNITS, Batch, Step, Term, count_units


def make_batch(
    labels: Sequence[Sequence[int]], side: str, active: Sequence[bool] | None = None
) -> Batch:
    """Rows of one length; the ids say nothing but the side."""
    rows = torch.tensor(labels)
    return {
        "input_ids": torch.full_like(rows, int(side == "retain")),
        "attention_mask": torch.ones_like(rows),
        "labels": rows,
        "index": torch.arange(len(rows)),
        "active": torch.tensor(active if active is not None else [True] * len(rows)),
    }


class Fixed:
    """A model and a reference that answer with what they were given, by side."""

    def __init__(
        self,
        logits: Mapping[str, Tensor],
        reference_logits: Mapping[str, Tensor] | None = None,
        hidden: Mapping[str, Tensor] | None = None,
        reference_hidden: Mapping[str, Tensor] | None = None,
    ):
        self.given = logits
        self.before = reference_logits or logits
        self.states = hidden or {}
        self.states_before = reference_hidden or self.states

    def __call__(self, input_ids: Tensor, output_hidden_states: bool, **_: Any) -> Any:
        side = "retain" if bool(input_ids[0, 0]) else "forget"
        layers = (None, self.states[side]) if output_hidden_states else None
        return SimpleNamespace(logits=self.given[side], hidden_states=layers)

    def distributions(self, side: Any) -> Tensor:
        return self.before[side.name][:, :-1].log_softmax(-1)

    def log_probabilities(self, side: Any) -> Tensor:
        labels_BT1 = side.labels_BT.clamp_min(0).unsqueeze(-1)
        return self.distributions(side).gather(-1, labels_BT1)[..., 0] * (side.labels_BT >= 0)

    def hidden(self, side: Any, layer: int) -> Tensor:
        return self.states_before[side.name][:, 1:]


def make_step(fixed: Any, batches: Mapping[str, Batch], epoch: int = 0) -> Step:
    return Step(fixed, batches, fixed, epoch)


def means(terms: Sequence[Term], batches: Mapping[str, Batch]) -> dict[str, float]:
    """What the trainer makes of terms, by name, without their weights."""
    counts = count_units(batches)
    return {t.name: float(t.total / counts[t.side][UNITS.index(t.unit)]) for t in terms}


def logits_of(*rows: Sequence[Sequence[float]]) -> Tensor:
    """Logits whose softmax is given, (B, T + 1, V); what the last position predicts does not count."""
    return torch.tensor([[*row, [1.0] * len(row[0])] for row in rows]).log()
