"""PDU: flatten the forget set's logits, under a limit on what the retain set may lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import LOG_PROBABILITIES, Card, RetainMethod, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def flattening_loss(logits_BTV: Tensor) -> Tensor:
    """(max_v z - mean_v z)^2 at each position, (B, T); 0 where all logits are equal."""
    return (logits_BTV.amax(-1) - logits_BTV.mean(-1)).square()


def updated_dual(dual: float, excess: float, step: float) -> float:
    """max(0, dual + step * excess): it grows while the retain loss is above its limit."""
    return max(0.0, dual + step * excess)


@dataclass
class PDU(RetainMethod):
    """L = forget_weight * (max z - mean z)^2 (forget) + dual * (R(retain) - eps), dual >= 0."""

    retain_weight: float = flag(100.0, "the dual variable at the start (authors: 50 to 100)")
    retain_loss_eps: float | None = flag(
        None, "limit of the retain loss (default: what it was before, plus the margin)"
    )
    retain_loss_margin: float = flag(0.1, "nats a token that the retain set may lose")
    dual_step: float = flag(5.0, "step of the dual variable, once an optimizer step")
    dual_warmup: int = flag(5, "epochs before the dual variable moves")

    card = Card(
        title="Primal-dual unlearning",
        source="Entesari et al., Constrained Entropic Unlearning, arXiv 2506.05314",
        idea="Forgetting is a loss with a minimum (all logits equal), keeping a constraint: the retain "
        "loss stays below a limit, and its weight rises and falls until it does.",
        use_when="What may be lost can be said in nats, and weights are not to be searched for.",
        fails_when="The limit is below what the model can reach: the weight grows for ever. Flat "
        "logits are unlike a model that never saw the records, and show.",
        differs="The logits that predict labelled tokens are flattened (open-unlearning's mask is one "
        "position late), and the dual variable moves once an optimizer step on the mean over all "
        "micro-batches and processes (there: in each micro-batch of each process). Without "
        "--retain_loss_eps, which has no default there, the limit is the old model's loss on the same "
        "retain rows plus a margin; the authors advise a limit somewhat above that loss. Start, step and "
        "warm-up are what they give for TOFU.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=10.0, weight_decay=0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain_weight <= 0 or self.dual_step < 0:
            raise UserError("--retain_weight is above 0, and --dual_step not below it")
        self._dual = self.retain_weight
        self._epoch = 0

    @property
    def _is_relative(self) -> bool:
        """Whether the limit is measured from what the old model loses on the same rows."""
        return self.retain_loss_eps is None and self.retain_loss == "nll"

    def needs(self) -> Mapping[str, set[str]]:
        return {"retain": {LOG_PROBABILITIES}} if self._is_relative else super().needs()

    def terms(self, step: Step) -> list[Term]:
        self._epoch = step.epoch
        side = step["forget"]
        found = [side.per_token("forget", flattening_loss(side.logits_BTV), self.forget_weight)]
        found += [replace(term, weight=self._dual) for term in self.retain_terms(step)]
        if self._is_relative:
            side = step["retain"]
            before_BT = -side.reference_log_probabilities_BT
            found.append(side.per_token("retain before", before_BT, 0.0))
        return found

    def after_step(self, means: Mapping[str, float]) -> None:
        if self._epoch < self.dual_warmup:
            return
        limit = self.retain_loss_eps
        if limit is None:
            # A KL divergence to the old model was 0 before.
            limit = means.get("retain before", 0.0) + self.retain_loss_margin
        self._dual = updated_dual(self._dual, means["retain"] - limit, self.dual_step)

    def state(self) -> dict[str, Any]:
        return {"dual": self._dual}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._dual = float(state["dual"])
