"""One micro-batch as a method sees it: sides of rows, under the model and under the reference.

Every number is computed when it is first asked for, so a method pays for what it uses. Shapes: B
rows, T predicted tokens (one fewer than the width of the batch), V vocabulary, D width of a layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_unlearn.approximate.losses import label_log_probabilities

if TYPE_CHECKING:
    from llm_unlearn.approximate.reference import Reference

Batch = Mapping[str, Tensor]  # input_ids, attention_mask, labels: (B, T + 1); index, active: (B,)
UNITS = ("rows", "tokens", "positions")


@dataclass(frozen=True)
class Term:
    """One part of a loss: a sum over units, which is divided by how many the whole step has.

    Attributes:
        name: under which its mean is logged.
        total: scalar, the sum over this micro-batch's units.
        side, unit: whose units, and which: `rows`, `tokens` (with a label) or `positions` (all
            but padding).
    """

    name: str
    total: Tensor
    weight: float
    side: str
    unit: str


class Side:
    """Rows of one kind (`forget`, `retain`, `forget/refusal`, ...).

    Attributes:
        index_B: number of each row in its data set.
    """

    def __init__(self, name: str, batch: Batch, model: Any, reference: "Reference"):
        self.name = name
        self.batch = batch
        self.model = model
        self.reference = reference
        self.index_B = batch["index"]

    @cached_property
    def labels_BT(self) -> Tensor:
        """The next token of each position, -100 where the loss does not look."""
        return self.batch["labels"][:, 1:]

    @cached_property
    def tokens_BT(self) -> Tensor:
        """Whether a position has a label, in rows that count."""
        return (self.labels_BT >= 0) & self.batch["active"][:, None]

    @cached_property
    def positions_BT(self) -> Tensor:
        """Whether a position predicts a token that is there, in rows that count."""
        return self.batch["attention_mask"][:, 1:].bool() & self.batch["active"][:, None]

    @cached_property
    def _outputs(self) -> Any:
        return forward(self.model, self.batch, hidden=False)

    @cached_property
    def _hidden(self) -> Any:
        return forward(self.model, self.batch, hidden=True)

    @property
    def is_computed(self) -> bool:
        return bool({"_outputs", "_hidden"} & self.__dict__.keys())

    @cached_property
    def logits_BTV(self) -> Tensor:
        """Of each position, single precision."""
        given = self.__dict__.get("_hidden") or self._outputs
        return given.logits[:, :-1].float()

    @cached_property
    def distributions_BTV(self) -> Tensor:
        """Log-probabilities of the whole vocabulary."""
        return self.logits_BTV.log_softmax(-1)

    @cached_property
    def log_probabilities_BT(self) -> Tensor:
        """Of the labels; 0 where there is none."""
        return label_log_probabilities(self.logits_BTV, self.labels_BT)

    @property
    def row_log_probabilities_B(self) -> Tensor:
        """Summed over the labels of a row."""
        return self.log_probabilities_BT.sum(-1)

    @property
    def lengths_B(self) -> Tensor:
        """Labels of each row, at least 1."""
        return (self.labels_BT >= 0).sum(-1).clamp_min(1)

    def hidden_BTD(self, layer: int) -> Tensor:
        """Output of decoder layer `layer` (0 = the first) at the positions of the labels."""
        return self._hidden.hidden_states[layer + 1][:, 1:].float()

    @cached_property
    def reference_log_probabilities_BT(self) -> Tensor:
        return self.reference.log_probabilities(self)

    @property
    def reference_row_log_probabilities_B(self) -> Tensor:
        return self.reference_log_probabilities_BT.sum(-1)

    @cached_property
    def reference_distributions_BTV(self) -> Tensor:
        """Log-probabilities of the whole vocabulary under the reference."""
        return self.reference.distributions(self)

    def reference_hidden_BTD(self, layer: int) -> Tensor:
        return self.reference.hidden(self, layer)

    def per_token(self, name: str, values_BT: Tensor, weight: float = 1.0) -> Term:
        """A mean over labelled tokens."""
        total = (values_BT * self.tokens_BT).sum()
        return Term(name, total, weight, self.name, "tokens")

    def per_position(self, name: str, values_BT: Tensor, weight: float = 1.0) -> Term:
        """A mean over all predicted tokens, prompts included, padding not."""
        total = (values_BT * self.positions_BT).sum()
        return Term(name, total, weight, self.name, "positions")

    def per_row(self, name: str, values_B: Tensor, weight: float = 1.0) -> Term:
        """A mean over rows."""
        total = (values_B * self.batch["active"]).sum()
        return Term(name, total, weight, self.name, "rows")


class Step:
    """The sides of one micro-batch, and when it is.

    Attributes:
        epoch: whole epochs done before it.
        progress: part of all optimizer steps done before it, in [0, 1).
        model: what is trained, as the trainer wraps it.
    """

    def __init__(
        self,
        model: Any,
        batches: Mapping[str, Batch],
        reference: "Reference",
        epoch: int = 0,
        progress: float = 0.0,
    ):
        self.model = model
        self.epoch = epoch
        self.progress = progress
        self._sides = {name: Side(name, b, model, reference) for name, b in batches.items()}

    def __getitem__(self, side: str) -> Side:
        return self._sides[side]

    def computed(self) -> Iterator[Side]:
        """The forget and the retain side, if their logits have been computed."""
        for name in ("forget", "retain"):
            if name in self._sides and self._sides[name].is_computed:
                yield self._sides[name]


def forward(model: Any, batch: Batch, hidden: bool) -> Any:
    """A forward pass without a cache."""
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        output_hidden_states=hidden,
    )


def count_units(batches: Mapping[str, Batch]) -> dict[str, Tensor]:
    """How many rows, tokens and positions of each side count in a micro-batch, (3,) each."""
    found = {}
    for name, batch in batches.items():
        active = batch["active"]
        labels = (batch["labels"][:, 1:] >= 0) & active[:, None]
        present = batch["attention_mask"][:, 1:].bool() & active[:, None]
        found[name] = torch.stack([active.sum(), labels.sum(), present.sum()])
    return found
