"""BalancedSubnet: learn which weights of feed-forward blocks to drop, and drop them for good."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term

# Feed-forward blocks go by these names; what is inside is told apart from attention by them alone.
FEED_FORWARD = r"\.(mlp|feed_forward|ffn|fc1|fc2|fc_in|fc_out)\b"


def top_mask(scores: Tensor, ratio: float) -> Tensor:
    """0 for the given part of the scores with the smallest absolute values (rounded down), 1 for all
    others; its gradient is taken to be that of the absolute values.
    """
    size = scores.detach().abs()
    dropped = int(ratio * size.numel())
    threshold = size.flatten().kthvalue(dropped).values if dropped else -1.0
    # In these brackets is 0: the mask stays exact.
    return (size > threshold).to(scores.dtype) + (scores.abs() - size)


def masking(scores: Tensor, ratio: float) -> Any:
    """A parametrization: the weight times the mask of its scores."""
    from torch import nn

    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(scores)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * top_mask(self.scores, ratio).to(weight.dtype)

    return Masking()


@dataclass
class BalancedSubnet(Method):
    """L = -forget_weight * NLL(forget) + retain_weight * NLL(retain), of a mask over frozen weights."""

    ratio: float = flag(
        0.05, "part of each feed-forward weight that is dropped (paper: 1e-5 to 0.1)"
    )
    forget_weight: float = flag(
        32.0, "weight of the forget rows; the paper sums over 64 mixed rows"
    )
    retain_weight: float = flag(32.0, "weight of the retain rows; 0: the paper's Subnet")

    card = Card(
        title="BalancedSubnet",
        source="Sakarvadia et al., Mitigating Memorization in Language Models, arXiv 2410.02159, "
        "section 4.3",
        idea="Weights stay as they are; a score for each weight of the feed-forward blocks is trained "
        "to say which of them, when set to zero, cost the forget set most and the retain set least.",
        use_when="Verbatim sequences are to go, and full weights may be edited.",
        fails_when="The ratio is too large for the model (fluency goes first) or too small to matter. "
        "The forget loss has no lower bound. What attention layers know they keep.",
        differs="Both losses are means over a step's rows times a constant, so the ratio of forget to "
        "retain rows does not decide their balance; with 32 pairs a batch they are the paper's sum. "
        "A batch size or learning rate of your own needs other weights.",
    )
    preset = flags(
        learning_rate=0.1, optim="sgd", optim_args="momentum=0.9", weight_decay=5e-4,
        lr_scheduler_type="constant", num_train_epochs=5.0, per_device_train_batch_size=32,
        gradient_accumulation_steps=1, max_grad_norm=0.0,
    )  # fmt: skip
    needs_full = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"--ratio is a part of the weights, between 0 and 1, got {self.ratio}")

    def prepare(self, session: Session) -> None:
        """Put scores over the weights, and train them in the weights' place."""
        import torch
        from torch.nn.utils import parametrize
        from transformers.pytorch_utils import Conv1D

        from llm_unlearn.approximate.tuning import Tuned

        model, wanted = session.model, session.tuned.trainable
        generator = torch.Generator().manual_seed(session.config.seed)
        self._masked: list[Any] = []
        chosen = {}
        for name, weight in wanted.items():
            weight.requires_grad_(False)
            layer, _, leaf = name.rpartition(".")
            module = model.get_submodule(layer)
            is_linear = isinstance(module, (torch.nn.Linear, Conv1D)) and leaf == "weight"
            if is_linear and re.search(FEED_FORWARD, layer):
                # Kaiming's uniform with a = sqrt(5), as linear layers start.
                bound = weight.shape[1] ** -0.5
                scores = (torch.rand(weight.shape, generator=generator) * 2 - 1) * bound
                masked = masking(scores.to(weight.device), self.ratio)
                parametrize.register_parametrization(module, "weight", masked)
                self._masked.append(module)
                chosen[f"{layer}.scores"] = masked.scores
        if not chosen:
            raise UserError("no feed-forward weight is among the trained modules: see --trainable")
        session.tuned = Tuned(model, chosen)

    def terms(self, step: Step) -> list[Term]:
        terms = []
        for name, weight in (("forget", -self.forget_weight), ("retain", self.retain_weight)):
            if weight:
                side = step[name]
                loss_B = -side.row_log_probabilities_B / side.lengths_B
                terms.append(side.per_row(name, loss_B, weight))
        return terms

    def finish(self, session: Session) -> None:
        """Make the masks permanent."""
        from torch.nn.utils import parametrize

        for module in self._masked:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        dropped = sum(
            int(self.ratio * scores.numel()) for scores in session.tuned.trainable.values()
        )
        session.notes.append(f"{dropped} weights of {len(self._masked)} layers were set to 0")
