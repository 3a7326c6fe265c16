"""IDK + AP: refusals on the forget set, and answers preferred to refusals on the retain set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.approximate.refusals import refusals_flag, refused

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record


def answer_preservation_loss(answer_B: Tensor, refusal_B: Tensor, beta: float) -> Tensor:
    """-(1 / beta) log sigmoid(beta (log p(answer) - log p(refusal))), (B,), of sums over labels.

    It is log 2 / beta where both are as likely, and goes to 0 as the answer wins. No reference.
    Source: arXiv 2410.08109, section 4.2.
    """
    from llm_unlearn.approximate.losses import preference

    return preference(answer_B - refusal_B, beta) / 2


@dataclass
class IdkAP(Method):
    """L = forget_weight * NLL(refusal | forget prompt) + retain_weight * AP(retain)."""

    forget_weight: float = flag(1.0, "weight of the refusals on the forget set")
    retain_weight: float = flag(1.0, "weight of answer preservation on the retain set")
    beta: float = flag(0.1, "inverse temperature of the preference")
    refusals: str | None = refusals_flag()

    card = Card(
        title="IDK with answer preservation",
        source="Yuan et al., A Closer Look at Machine Unlearning for Large Language Models, "
        "arXiv 2410.08109, section 4.2",
        idea="Refusal tuning on the forget set; on retain questions the answer is preferred to a "
        "refusal, so that the model does not learn to refuse everything.",
        use_when="Refusals are wanted and refusal tuning refuses too much.",
        fails_when="Like all refusals, it covers the answer rather than removing it. Nothing trains the "
        "retain answers beyond their lead over a refusal, so their wording can drift.",
        differs="Each row has one refusal for the whole run; the released code draws another each time.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=5.0, weight_decay=0.01)

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        seed = session.config.seed
        return {
            "forget/refusal": refused(session.forget, self.refusals, seed),
            "retain/refusal": refused(session.retain, self.refusals, seed),
        }

    def terms(self, step: Step) -> list[Term]:
        refusal, retain = step["forget/refusal"], step["retain"]
        kept_B = answer_preservation_loss(
            retain.row_log_probabilities_B,
            step["retain/refusal"].row_log_probabilities_B,
            self.beta,
        )
        return [
            refusal.per_token("forget", -refusal.log_probabilities_BT, self.forget_weight),
            retain.per_row("retain", kept_B, self.retain_weight),
        ]
