"""Task vector: learn the forget set harder, then go the other way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term


@dataclass
class Reinforced(Method):
    """Trains on the forget set as a person would who wants it known; `finish` makes use of that."""

    preset = flags(learning_rate=1e-5, num_train_epochs=10.0, lr_scheduler_type="cosine")
    uses_retain = False

    def prepare(self, session: Session) -> None:
        config = session.config
        if config.keep != "last" or config.stop_when != "never" or config.stop_samples != "never":
            raise UserError(
                f"{config.method} first learns the forget set, so --keep, --stop_when and "
                "--stop_samples would look at the wrong model: leave them out"
            )

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        return [side.per_token("reinforce", -side.log_probabilities_BT)]


def start_values(session: Session) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every trained tensor with its value before training, one after another."""
    from safetensors import safe_open

    from llm_unlearn.approximate.session import START_NAME

    trainable, start = session.tuned.trainable, session.tuned.start
    if start is not None:
        yield from ((trainable[name], start[name]) for name in trainable)
        return
    with safe_open(session.work / START_NAME, framework="pt") as stored:
        for name, parameter in trainable.items():
            yield parameter, stored.get_tensor(name).to(parameter.device)


def negated(start: Tensor, trained: Tensor, alpha: float) -> Tensor:
    """start - alpha (trained - start), computed in single precision: start where alpha is 0."""
    low = start.float() - alpha * (trained.float() - start.float())
    return low.to(start.dtype)


@dataclass
class TaskVector(Reinforced):
    """theta = theta_before - alpha (theta_reinforced - theta_before)."""

    alpha: float = flag(5.0, "how far to go the other way (MUSE's script: 5; its paper: 512)")

    card = Card(
        title="Task vector",
        source="Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089; as MUSE "
        "(arXiv 2407.06460) uses it",
        idea="Fine-tunes on the forget set and subtracts alpha times the change of the weights.",
        use_when="There is no retain data, and alpha can be chosen by evaluation.",
        fails_when="What is already known hardly moves the weights, so the vector is small: with a low "
        "alpha nothing is forgotten (MUSE's rows), with a high one the model breaks.",
        differs="With an adapter the arithmetic is on the products B A, not on the factors, so the "
        "merged weights are exactly the paper's.",
    )

    def finish(self, session: Session) -> None:
        import torch

        if session.tuned.is_adapter:
            from llm_unlearn.approximate.adapter_arithmetic import negate_adapter

            negate_adapter(session.tuned, self.alpha)
            return
        with torch.no_grad():
            for parameter, start in start_values(session):
                parameter.copy_(negated(start, parameter, self.alpha))
