"""Gradient ascent: make the forget set unlikely, whatever it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method

if TYPE_CHECKING:
    from llm_unlearn.approximate.step import Step, Term


@dataclass
class GradientAscent(Method):
    """L = mean over forget tokens of log p(token)."""

    card = Card(
        title="Gradient ascent",
        source="Jang et al., Knowledge Unlearning for Mitigating Privacy Risks in Language Models, "
        "arXiv 2210.01504, eq. 1; MUSE's GA (arXiv 2407.06460)",
        idea="Ascends the training loss on the forget set. Nothing holds the rest of the model.",
        use_when="As the floor that every comparison needs, or for very few steps.",
        fails_when="After some epochs: the loss has no lower bound, and the model stops being one.",
    )
    uses_retain = False

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        return [side.per_token("forget", side.log_probabilities_BT)]
