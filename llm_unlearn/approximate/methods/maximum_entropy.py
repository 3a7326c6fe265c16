"""ME: on the forget set every next token is to be as likely as any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, RetainMethod, flag, flags

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def uniform_divergence(log_BTV: Tensor) -> Tensor:
    """KL(U || p) = -log V - mean_v log p_v at each position, (B, T); 0 where p is uniform.

    Source: arXiv 2410.08109, eq. 6. It has no upper bound.
    """
    import math

    return -math.log(log_BTV.shape[-1]) - log_BTV.mean(-1)


@dataclass
class MaximumEntropy(RetainMethod):
    """L = forget_weight * KL(U || p)(forget, prompts included) + retain_weight * R(retain)."""

    forget_weight: float = flag(0.1, "weight of the forget loss (paper: 0.1 on TOFU)")

    card = Card(
        title="Maximum entropy with gradient descent",
        source="Yuan et al., A Closer Look at Machine Unlearning for Large Language Models, "
        "arXiv 2410.08109, section 4.1 (ME+GD)",
        idea="On the forget set, questions included, the model is to be as undecided as a die; an "
        "ordinary loss on the retain set keeps the rest.",
        use_when="No particular answer is wanted, and the forget loss is to have a lower bound.",
        fails_when="The prompts are forgotten with the answers, so what shares their words suffers; "
        "answers turn to noise, which tells an observer that something was removed.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=5.0, weight_decay=0.01)

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        values_BT = uniform_divergence(side.distributions_BTV)
        return [
            side.per_position("forget", values_BT, self.forget_weight),
            *self.retain_terms(step),
        ]
