"""Refusal tuning: ordinary fine-tuning on refusals after the forget prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, RetainMethod, flags
from llm_unlearn.approximate.refusals import refusals_flag, refused

if TYPE_CHECKING:
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record


@dataclass
class RefusalTuning(RetainMethod):
    """L = forget_weight * NLL(refusal | forget prompt) + retain_weight * R(retain)."""

    refusals: str | None = refusals_flag()

    card = Card(
        title="Refusal tuning",
        source="Maini et al., TOFU, arXiv 2401.06121, its released code's `idk` loss",
        idea="Fine-tunes on the forget prompts with refusals for answers, and on the retain set.",
        use_when="A simple baseline that ends in polite words is wanted.",
        fails_when="The old answer is only covered: its probability falls as far as the refusal's first "
        "words take it, and an attack that forces those words finds the rest. Neighbours are refused.",
        differs="The released code takes one mean over the tokens of refusals and retain rows together; "
        "ours is a mean over each, so that longer retain answers do not outweigh the refusals.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=5.0, weight_decay=0.01)

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        return {"forget/refusal": refused(session.forget, self.refusals, session.config.seed)}

    def terms(self, step: Step) -> list[Term]:
        side = step["forget/refusal"]
        forget = side.per_token("forget", -side.log_probabilities_BT, self.forget_weight)
        return [forget, *self.retain_terms(step)]
