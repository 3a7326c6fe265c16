"""CE-U: learn the model's own distribution with the true token taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def without_label(log_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """softmax(z with the label's logit at minus infinity), (B, T, V), without a gradient."""
    where_BT1 = labels_BT.clamp_min(0).unsqueeze(-1)
    return log_BTV.detach().scatter(-1, where_BT1, float("-inf")).softmax(-1)


def ceu_loss(log_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy to the model's own distribution without the label, (B, T).

    The gradient of the label's logit is p, that of any other logit v is -p p_v / (1 - p), where p is
    the label's probability: bounded, and 0 once the label is gone.
    """
    return -(without_label(log_BTV, labels_BT) * log_BTV).sum(-1)


def later_tokens(labels_BT: Tensor, skipped: int) -> Tensor:
    """Whether a position has a label and is not among a row's first `skipped` that do, (B, T)."""
    labelled_BT = labels_BT >= 0
    return labelled_BT & (labelled_BT.cumsum(-1) > skipped)


@dataclass
class CEU(Method):
    """L = CE(softmax(z without the label), z)(forget tokens after the first)."""

    ignore_first_n_answer_tokens: int = flag(1, "tokens of an answer that are left as they are")

    card = Card(
        title="Cross-entropy unlearning",
        source="Yang, CE-U: Cross Entropy Unlearning, arXiv 2503.01224",
        idea="Each step trains towards what the model says now with the true token ruled out; where "
        "the label is likely the push is strong, and it ends when the label is gone.",
        use_when="No retain set and no reference model are at hand.",
        fails_when="Long runs: nothing holds the rest of the model, and common words of the answers "
        "are ruled out too. Answers of a single token are left alone by default.",
        differs="The sum is over the tokens that count, the divisor all labelled tokens of the step; "
        "open-unlearning divides by those that count. The ratio is constant for answers of one length, "
        "and Adam does not see it.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=8.0)
    uses_retain = False

    def __post_init__(self) -> None:
        if self.ignore_first_n_answer_tokens < 0:
            raise UserError("--ignore_first_n_answer_tokens is 0 or more")

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        counted_BT = later_tokens(side.labels_BT, self.ignore_first_n_answer_tokens)
        return [
            side.per_token("forget", ceu_loss(side.distributions_BTV, side.labels_BT) * counted_BT)
        ]
