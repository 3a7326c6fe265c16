"""DPO: another answer is preferred to the one that is to be forgotten; here a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import LOG_PROBABILITIES, Card, RetainMethod, flag, flags
from llm_unlearn.approximate.refusals import refusals_flag, refused

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Side, Step, Term
    from llm_unlearn.data.records import Record


def dpo_loss(
    preferred_B: Tensor,
    preferred_reference_B: Tensor,
    rejected_B: Tensor,
    rejected_reference_B: Tensor,
    beta: float,
) -> Tensor:
    """-(2 / beta) log sigmoid(beta ([log p - log p_ref](y_w) - [log p - log p_ref](y_l))), (B,).

    Of sums over a row's labels; y_w is preferred to y_l. It is (2 / beta) log 2 where both models
    agree, never below 0, and 2 / beta times the loss of Rafailov et al. (arXiv 2305.18290, eq. 7).
    """
    from llm_unlearn.approximate.losses import preference

    gained_B = preferred_B - preferred_reference_B
    return preference(gained_B - (rejected_B - rejected_reference_B), beta)


@dataclass
class DPO(RetainMethod):
    """L = forget_weight * DPO(preferred over forget) + retain_weight * R(retain)."""

    beta: float = flag(0.1, "inverse temperature of the preference")

    preset = flags(learning_rate=1e-5, num_train_epochs=10.0, weight_decay=0.01)

    def preferred(self, step: Step) -> Side:
        """The side with the preferred answers, row by row with `forget`."""
        raise NotImplementedError

    def terms(self, step: Step) -> list[Term]:
        preferred, rejected = self.preferred(step), step["forget"]
        loss_B = dpo_loss(
            preferred.row_log_probabilities_B,
            preferred.reference_row_log_probabilities_B,
            rejected.row_log_probabilities_B,
            rejected.reference_row_log_probabilities_B,
            self.beta,
        )
        return [rejected.per_row("forget", loss_B, self.forget_weight), *self.retain_terms(step)]


@dataclass
class IdkDPO(DPO):
    """DPO with a refusal as the preferred answer."""

    refusals: str | None = refusals_flag()

    card = Card(
        title="DPO with refusals",
        source="Maini et al., TOFU, arXiv 2401.06121, section 4 (Preference Optimization); Zhang et "
        "al., arXiv 2404.05868; DPO: Rafailov et al., arXiv 2305.18290, eq. 7",
        idea="A preference pair for each forget prompt: a refusal before the answer that is to be "
        "forgotten, measured against the model before unlearning.",
        use_when="The model is to say that it does not know, and not to make something up.",
        fails_when="The refusal is learnt sooner than the answer is forgotten: the answer stays in the "
        "distribution, where sampling, other prompts and relearning find it; neighbours of the forget "
        "set are refused too.",
        differs="The factor 2 / beta is open-unlearning's, which makes weights comparable with NPO's. "
        "TOFU's released DPO does not run; its text has no retain term. Each row has one refusal, "
        "TOFU draws another one each time.",
    )

    def needs(self) -> Mapping[str, set[str]]:
        own = {"forget": {LOG_PROBABILITIES}, "forget/refusal": {LOG_PROBABILITIES}}
        return {**super().needs(), **own}

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        return {"forget/refusal": refused(session.forget, self.refusals, session.config.seed)}

    def preferred(self, step: Step) -> Side:
        return step["forget/refusal"]
