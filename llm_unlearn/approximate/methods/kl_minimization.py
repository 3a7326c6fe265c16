"""KL minimisation: gradient ascent that stays near the old model on the retain set."""

from __future__ import annotations

from dataclasses import dataclass

from llm_unlearn.approximate.method import Card, flag, flags
from llm_unlearn.approximate.methods.gradient_difference import GradientDifference


@dataclass
class KLMinimization(GradientDifference):
    """L = -NLL(forget) + KL(before || now)(retain)."""

    retain_loss: str = flag("kl", "on retain data: nll, or kl (to the model before unlearning)")

    card = Card(
        title="KL minimisation",
        source="Maini et al., TOFU, arXiv 2401.06121, section 4 (KL Minimization)",
        idea="Gradient ascent on the forget set with a KL divergence to the old model on the retain "
        "set: what the old model said there is to stay, right or wrong.",
        use_when="The retain set's own answers are not to be trained any further.",
        fails_when="Like gradient ascent, in the end: the forget loss has no lower bound.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=5.0, weight_decay=0.01)
