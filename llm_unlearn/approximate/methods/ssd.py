"""Selective synaptic dampening: shrink what matters to the forget set more than to the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method, flag
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.session import Session
    from llm_unlearn.data.encoding import Example


def dampening(forget: Tensor, kept: Tensor, alpha: float, lambda_: float) -> Tensor:
    """What each parameter is multiplied by: min(lambda kept / forget, 1) where forget > alpha kept,
    1 elsewhere. Between 0 (matters to the forget set alone) and 1; never above.
    """
    factor = (lambda_ * kept / forget.clamp_min(1e-38)).clamp(max=1.0)
    return factor.where(forget > alpha * kept, 1.0)


def importance(session: Session, examples: Sequence[Example], rows: int) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of a batch's loss (mean over its tokens), for each
    trained tensor. With one row a batch it is the diagonal of the empirical Fisher matrix.
    """
    import torch

    from llm_unlearn.approximate.batches import collate
    from llm_unlearn.approximate.losses import label_log_probabilities
    from llm_unlearn.approximate.step import forward

    model, tuned = session.model, session.tuned.trainable
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in tuned.items()}
    starts = range(0, len(examples), rows)
    for start in starts:
        part = [(example, 0, True) for example in examples[start : start + rows]]
        batch = collate(part, session.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels_BT = batch["labels"][:, 1:]
        logits_BTV = forward(model, batch, hidden=False).logits[:, :-1].float()
        loss = -label_log_probabilities(logits_BTV, labels_BT).sum() / (labels_BT >= 0).sum()
        found = torch.autograd.grad(loss, list(tuned.values()), allow_unused=True)
        for name, gradient in zip(tuned, found, strict=True):
            if gradient is not None:
                total[name] += gradient.float().square()
    return {name: summed / len(starts) for name, summed in total.items()}


@dataclass
class SSD(Method):
    """theta <- theta * min(lambda I_D / I_f, 1) where I_f > alpha I_D."""

    alpha: float = flag(10.0, "how many times more it must matter to the forget set to be dampened")
    dampening: float = flag(1.0, "the paper's lambda: smaller dampens more")
    with_forget: bool = flag(False, "I_D over retain and forget records (the paper), not retain")
    per_module: bool = flag(False, "divide each tensor's importances by their mean in the tensor")
    rows_per_gradient: int = flag(1, "rows whose gradient is squared together (the paper: a batch)")

    card = Card(
        title="Selective synaptic dampening",
        source="Foster, Schoepf and Brintrup, arXiv 2308.07707, eq. 3 and 4",
        idea="Two passes of squared gradients say what matters to the forget set and what to the rest; "
        "weights that matter to the forget set alpha times more are shrunk. Nothing is trained.",
        use_when="Seconds matter, and some damage can be measured and borne.",
        fails_when="Alpha decides everything, and the right one differs by data and model: look at the "
        "share that was dampened. Where forget and retain records look alike their importances do "
        "too, and nothing is selected. On a LoRA it shrinks entries of A and B, which depend on the "
        "basis that training happened to choose.",
        differs="I_D is over the retain set unless --with_forget: with the paper's, which includes the "
        "forget set, I_f / I_D cannot exceed |D| / |D_f|, so alpha 10 selects nothing of a tenth. "
        "Gradients are squared row by row (the Fisher matrix's diagonal); the released code squares "
        "those of batches. --per_module is ours, for layers whose gradients differ in size.",
    )
    trains = False
    needs_weights = True

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and self.dampening > 0 and self.rows_per_gradient > 0):
            raise UserError("--alpha, --dampening and --rows_per_gradient are above 0")

    def finish(self, session: Session) -> None:
        """Dampen. Every process computes the same."""
        import torch

        forget, retain = session.sides["forget"], session.sides["retain"]
        everything = [*retain, *forget] if self.with_forget else retain
        if self.with_forget and len(everything) <= self.alpha * len(forget):
            raise UserError(
                f"--alpha {self.alpha:g} selects nothing: with --with_forget it must be below "
                f"{len(everything) / len(forget):g}, the number of records for each forget record"
            )
        session.model.to(session.config.device).eval()
        to_forget = importance(session, forget, self.rows_per_gradient)
        to_all = importance(session, everything, self.rows_per_gradient)
        dampened = 0
        with torch.no_grad():
            for name, parameter in session.tuned.trainable.items():
                factor = self._factor(to_forget.pop(name), to_all.pop(name))
                dampened += int((factor < 1).sum())
                parameter.mul_(factor.to(parameter.dtype))
        share = dampened / sum(p.numel() for p in session.tuned.trainable.values())
        session.notes.append(f"{share:.2%} of the parameters were dampened")

    def _factor(self, forget: Tensor, kept: Tensor) -> Tensor:
        if self.per_module:
            forget, kept = (x / x.mean().clamp_min(1e-38) for x in (forget, kept))
        return dampening(forget, kept, self.alpha, self.dampening)
