"""NPO: gradient ascent that slows down as the forget set gets unlikely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import LOG_PROBABILITIES, Card, RetainMethod, flag, flags

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def npo_loss(log_probabilities_B: Tensor, reference_B: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(-beta (log p - log p_ref)), (B,), of sums over a row's labels.

    It is (2 / beta) log 2 where both models agree, never below 0, and gradient ascent as beta goes
    to 0: its gradient is w times that of log p, with w = 2 p^beta / (p^beta + p_ref^beta).
    """
    from llm_unlearn.approximate.losses import preference

    return preference(reference_B - log_probabilities_B, beta)


@dataclass
class NPO(RetainMethod):
    """L = forget_weight * NPO(forget) + retain_weight * R(retain)."""

    beta: float = flag(0.1, "inverse temperature; gradient ascent as it goes to 0")

    card = Card(
        title="Negative preference optimisation",
        source="Zhang et al., arXiv 2404.05868, eq. 3",
        idea="The forget answers are the rejected half of a preference pair. Its gradient is gradient "
        "ascent's, times a weight that vanishes as the answer gets unlikely.",
        use_when="A strong general baseline is wanted; the first to try beside exact unlearning.",
        fails_when="Many epochs without a retain loss; short of that it tends to leave knowledge "
        "behind, and relearning brings it back.",
        differs="MUSE's released NPO takes the mean of raw logits over the vocabulary, so its published "
        "rows do not measure NPO. Ours sums log-probabilities of labels, as paper and open-unlearning.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=10.0, weight_decay=0.01)

    def needs(self) -> Mapping[str, set[str]]:
        return {**super().needs(), "forget": {LOG_PROBABILITIES}}

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        loss_B = npo_loss(
            side.row_log_probabilities_B, side.reference_row_log_probabilities_B, self.beta
        )
        return [side.per_row("forget", loss_B, self.forget_weight), *self.retain_terms(step)]
