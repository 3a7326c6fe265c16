"""Fine-tuning on what is kept, with an optional pull towards sparse weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.approximate.step import Step, Term


def decayed(weight: float, progress: float) -> float:
    """The weight at a part of all steps, in [0, 1]: linear from `weight` to 0."""
    return weight * (1.0 - progress)


@dataclass
class RetainFineTuning(Method):
    """L = NLL(retain) + l1 (1 - step / steps) * sum of |trainable parameters|."""

    l1: float = flag(0.0, "weight of the L1 norm of what is trained, falling to 0 over the steps")

    card = Card(
        title="Fine-tuning on the retain set",
        source="Jia et al., Model Sparsity Can Simplify Machine Unlearning, arXiv 2304.04934, eq. 4 "
        "and section 4 (l1-sparse MU); without --l1 plain fine-tuning",
        idea="Goes on training on the retain set alone and trusts in catastrophic forgetting. With "
        "--l1 the weights are drawn to 0, so that what no retain row needs goes first.",
        use_when="As the control that every forget loss must beat.",
        fails_when="Nearly always on its own: nothing asks the model to forget. A high --l1 costs the "
        "rest of the model's knowledge.",
        differs="The schedule falls by steps, the released code's by epochs. With a LoRA the norm is of "
        "the adapter's factors, which pulls towards the model underneath, not towards sparse weights.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=5.0, weight_decay=0.01)
    anchor = "retain"

    def __post_init__(self) -> None:
        if self.l1 < 0:
            raise UserError("--l1 is 0 or more")

    def terms(self, step: Step) -> list[Term]:
        import torch

        side = step["retain"]
        terms = [side.per_token("retain", -side.log_probabilities_BT)]
        if self.l1:
            trained = (p for p in step.model.parameters() if p.requires_grad)
            # As a mean over rows it counts once a step, however many micro-batches a step has.
            norm_B = torch.stack([p.abs().sum() for p in trained]).sum().expand(len(side.index_B))
            terms.append(side.per_row("l1", norm_B, decayed(self.l1, step.progress)))
        return terms
