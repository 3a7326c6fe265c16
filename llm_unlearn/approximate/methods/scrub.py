"""SCRUB: disobey the old model on the forget set, then obey it on the retain set, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import DISTRIBUTIONS, Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def disobedience(teacher_log_BTV: Tensor, log_BTV: Tensor, clamp: float) -> Tensor:
    """-KL(teacher || student) at each position, (B, T), not below -clamp (0: no bound).

    Its gradient is 0 beyond the bound, and where both agree.
    """
    from llm_unlearn.approximate.losses import divergence

    found_BT = divergence(teacher_log_BTV, log_BTV)
    return -(found_BT.clamp_max(clamp) if clamp > 0 else found_BT)


def disobeys(epoch: int, msteps: int) -> bool:
    """Whether an epoch ascends: every second one, until it has been `msteps`."""
    return epoch % 2 == 1 and epoch < 2 * msteps


@dataclass
class SCRUB(Method):
    """L = -KL(before || now)(forget) and alpha KL(before || now) + gamma NLL (retain), in turns."""

    alpha: float = flag(0.5, "weight of the KL divergence on retain data")
    gamma: float = flag(1.0, "weight of the training loss on retain data")
    msteps: int = flag(3, "epochs that ascend on forget data, every second one")
    clamp: float = flag(0.0, "KL in nats beyond which a forget token is left alone (0: never)")

    card = Card(
        title="SCRUB",
        source="Kurmanji et al., Towards Unbounded Machine Unlearning, arXiv 2302.09880, section 3",
        idea="The old model teaches. Some epochs move away from it on the forget set, the others "
        "towards it, and towards the labels, on the retain set; the last ones repair.",
        use_when="The forget set may become as wrong as possible (biases, mislabelled data).",
        fails_when="The ascent has no bound (--clamp gives it one): too many ascending epochs or too "
        "high a rate, and repairing fails. Membership attacks see that forget data is too unlikely: the "
        "paper's rewinding, which goes back to the epoch whose forget loss is that of unseen data, is "
        "left out; --stop_when forget_at_retrain is near it.",
        differs="Turns begin with the retain set: a student that equals its teacher has no gradient to "
        "disobey by (the released code begins with the forget set, on networks that dropout and batch "
        "norm set apart). A retain epoch sees as many rows as the forget set has. Temperature is 1 (the "
        "released code: 4, for classes of images). alpha, gamma and msteps are those of its small "
        "experiments.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=10.0)

    def __post_init__(self) -> None:
        if self.msteps < 1 or self.clamp < 0:
            raise UserError("--msteps is 1 or more, and --clamp not below 0")

    def needs(self) -> Mapping[str, set[str]]:
        retain = {"retain": {DISTRIBUTIONS}} if self.alpha != 0 else {}
        return {"forget": {DISTRIBUTIONS}, **retain}

    def terms(self, step: Step) -> list[Term]:
        from llm_unlearn.approximate.losses import divergence

        if disobeys(step.epoch, self.msteps):
            side = step["forget"]
            away_BT = disobedience(
                side.reference_distributions_BTV, side.distributions_BTV, self.clamp
            )
            return [side.per_token("forget", away_BT)]
        side = step["retain"]
        found = [side.per_token("retain", -side.log_probabilities_BT, self.gamma)]
        if self.alpha != 0:
            kl_BT = divergence(side.reference_distributions_BTV, side.distributions_BTV)
            found.append(side.per_token("retain kl", kl_BT, self.alpha))
        return found
