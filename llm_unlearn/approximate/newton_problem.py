"""What Newton's methods minimise: a model's loss over retain rows, less a part of that over forget rows.

Rows of a step depend on the seed and the step's number alone. Some retain rows are never among them: their
loss says whether what is learnt on the others costs something.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.approximate.batches import seeded_order
from llm_unlearn.approximate.curvature import (
    Curvature,
    Part,
    check_products,
    flat,
    parts_of,
    put,
    total_loss,
)
from llm_unlearn.approximate.session import Session
from llm_unlearn.data.encoding import Example
from llm_unlearn.data.records import make_records
from llm_unlearn.data.sources import read_rows
from llm_unlearn.errors import RunError, UserError

MOST_HELD_OUT = 5  # a fifth of the retain rows
PAST, AT = 1.1, 0.9  # of the way from the forget set's loss to that of unseen rows


@dataclass(frozen=True)
class Rows:
    """How many rows a step looks at, and what they weigh.

    Attributes:
        gradient: retain rows (and forget rows) of the gradient and the ratio test; 0: all.
        curvature: rows of the Hessian, drawn on their own; 0: those of the gradient.
        held_out: retain rows that are left out, a fifth at most.
        forget_weight: of the forget rows' loss, which is to rise.
        most_rise: nats a token by which the loss of held-out rows may rise, for each nat (at least
            one) that it was.
        keep_graphs: see `Curvature`.
    """

    gradient: int = 32
    curvature: int = 0
    held_out: int = 16
    forget_weight: float = 0.0
    most_rise: float = 0.01
    keep_graphs: bool = True

    def __post_init__(self) -> None:
        if min(self.gradient, self.curvature, self.held_out) < 0:
            raise UserError("numbers of rows are 0 or more")
        if not (self.forget_weight >= 0 and self.most_rise >= 0):
            raise UserError("--forget_weight and --most_rise are 0 or more")


@dataclass(frozen=True)
class Standing:
    """Loss of a token, in nats, over all forget rows and over the held-out retain rows."""

    forget: float
    held_out: float


class DrawnLoss:
    """A session's loss over rows that are drawn for each step, and the tensors it is a function of."""

    def __init__(self, session: Session, rows: Rows):
        self.session, self.rows = session, rows
        self.model = session.model.to(session.config.device).eval()
        self.parameters = list(session.tuned.trainable.values())
        retain = session.sides["retain"]
        count = min(rows.held_out, len(retain) // MOST_HELD_OUT)
        order = seeded_order(len(retain), f"{session.config.seed} held out")
        self._retain = [retain[number] for number in order[count:]]
        self._unused = [retain[number] for number in order[:count] or order]

    def parts(self, examples: Sequence[Example], weight: float = 1.0) -> list[Part]:
        size = self.session.config.per_device_train_batch_size
        pad, device = self.session.pad_token_id, self.model.device
        return parts_of(examples, size, pad, weight, device)

    def check(self, how: str) -> float:
        """Refuse a model whose loss cannot be differentiated twice; see `check_products`."""
        rows = self.session.sides["retain"]
        row = next((row for row in rows if len(row.input_ids) > 1), rows[0])  # one predicts nothing
        (part,) = self.parts([row])
        return check_products(self.model, self.parameters, part, how, self.session.config.seed)

    def local(self, number: int) -> Curvature:
        gradient = self._drawn(f"newton {number}", self.rows.gradient)
        curvature = (
            self._drawn(f"curvature {number}", self.rows.curvature) if self.rows.curvature else None
        )
        return Curvature(self.model, self.parameters, gradient, curvature, self.rows.keep_graphs)

    def _drawn(self, phrase: str, count: int) -> list[Part]:
        """Retain rows without replacement, and as many forget rows where they weigh something."""
        found = self.parts(self._some(self._retain, phrase, count))
        if self.rows.forget_weight:
            forget = self._some(self.session.sides["forget"], f"forget {phrase}", count)
            found += self.parts(forget, -self.rows.forget_weight)
        return found

    def _some(self, examples: Sequence[Example], phrase: str, count: int) -> Sequence[Example]:
        if not 0 < count < len(examples):
            return examples
        order = seeded_order(len(examples), f"{self.session.config.seed} {phrase}")
        return [examples[number] for number in order[:count]]

    def weights(self) -> Tensor:
        return flat(self.parameters)

    def put(self, weights_D: Tensor) -> None:
        put(self.parameters, weights_D)


class NewtonProblem(DrawnLoss):
    """It as a `cubic_newton.Problem`, with limits to how far it may go.

    Attributes:
        level: loss at which forget rows are like unseen ones; None: not known.
        start: the standing before the first step.

    Raises:
        RunError: the model's loss is no number.
    """

    def __init__(self, session: Session, rows: Rows, level: float | None = None):
        super().__init__(session, rows)
        self.level = level
        self._held_out = self.parts(self._unused)
        self._forget = self.parts(session.sides["forget"])
        self._standing: Standing | None = None
        self.start = self.standing()
        if not math.isfinite(self.start.forget + self.start.held_out):
            raise RunError(
                "the model's loss is no number before the first step: nothing was written"
            )

    def put(self, weights_D: Tensor) -> None:
        super().put(weights_D)
        self._standing = None

    def standing(self) -> Standing:
        """Of the weights as they are; it is asked for more often than they change."""
        if self._standing is None:
            self._standing = Standing(
                total_loss(self.model, self._forget), total_loss(self.model, self._held_out)
            )
        return self._standing

    def objection(self) -> str:
        """Held-out rows that suffer, or forget rows that are further than unseen ones."""
        now, start = self.standing(), self.start
        if not math.isfinite(now.forget + now.held_out):
            return "the loss of forget or held-out rows was no number"
        if now.held_out - start.held_out > self.rows.most_rise * max(1.0, start.held_out):
            return "held-out retain rows would suffer (--most_rise)"
        if self.level is not None and self._way() > PAST:
            return "forget rows would be less likely than unseen ones"
        return ""

    def _way(self) -> float:
        """How far the forget set's loss is, from 0 at the start to 1 at the level."""
        assert self.level is not None
        return (self.standing().forget - self.start.forget) / (self.level - self.start.forget)

    def is_forgotten(self) -> bool:
        """Whether forget rows are about as likely as unseen ones."""
        return self.level is not None and self._way() >= AT


def unseen_level(problem: NewtonProblem, unseen: str) -> float:
    """The loss of a token that the model never saw: of the rows of a file, or, without one, of the
    forget set under the model without its adapter.

    Raises:
        UserError: it is not above the forget set's own.
    """
    session = problem.session
    if unseen:
        level = total_loss(
            problem.model, problem.parts(session.encode(make_records(read_rows(unseen))))
        )
        told = (
            f"{unseen} is no less known than the forget set: expected rows that the model never saw"
        )
    else:
        level = _without_adapter(problem)
        told = (
            "the model before fine-tuning is not at hand to say how likely unseen rows are: give --unseen "
            "FILE, rows like the forget set's that the model never saw"
        )
    if not level > problem.start.forget:
        raise UserError(
            f"{told} (loss of a token {level:.3f}, forget set {problem.start.forget:.3f})"
        )
    return level


def _without_adapter(problem: NewtonProblem) -> float:
    model: Any = problem.model
    if not problem.session.tuned.is_adapter:
        return problem.start.forget
    with model.disable_adapter(), torch.no_grad():
        return total_loss(model, problem.parts(problem.session.sides["forget"]))
