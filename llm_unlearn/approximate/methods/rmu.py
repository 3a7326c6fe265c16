"""RMU: turn the hidden states of the forget set towards a random direction, keep the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import HIDDEN, Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term


def row_squared_errors(hidden_BTD: Tensor, target_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Mean over D and over a row's tokens of (h - target)^2, (B,); 0 where they are equal.

    A row without tokens is 0. `target_BTD` may be a single direction of shape (D,).
    """
    errors_BT = (hidden_BTD - target_BTD).square().mean(-1)
    return (errors_BT * tokens_BT).sum(-1) / tokens_BT.sum(-1).clamp_min(1)


def draw_direction(width: int, seed: int) -> list[float]:
    """A vector of length one in the positive orthant: uniform in [0, 1), normalised. It depends on
    the seed alone, on no other random number.
    """
    import torch

    drawn_D = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return (drawn_D / drawn_D.norm()).tolist()


@dataclass
class RMU(Method):
    """L = forget_weight * |h - c u|^2 (forget) + retain_weight * |h - h_before|^2 (retain)."""

    steering_coefficient: float = flag(2.0, "c, the length to steer to (paper: 6.5 to 300)")
    layer: int | None = flag(
        None, "decoder layer whose output is steered, from 0 (default: 7, or the middle of a model "
        "with fewer than 12); it and the two below are trained",
    )  # fmt: skip
    forget_weight: float = flag(1.0, "weight of the forget loss")
    retain_weight: float = flag(1.0, "weight of the retain loss (paper: 1200 with c = 6.5)")

    card = Card(
        title="Representation misdirection for unlearning",
        source="Li et al., The WMDP Benchmark, arXiv 2403.03218, section 4",
        idea="Early hidden states of forget texts are pulled to one random vector, so that later "
        "layers find nothing there; those of retain texts stay where they were.",
        use_when="A topic or capability is to go, more than single facts; few steps are wanted.",
        fails_when="c is smaller than the model's own hidden states need, or the retain set is close "
        "to the forget set. It scrambles the way to the knowledge: probes and relearning find it again.",
        differs="Trains only the last projection of layers l - 2 to l, as the paper's code; "
        "open-unlearning's default gives all weights to the optimizer. Its c of 2 and weights of 1 are "
        "our defaults. With a LoRA the same three projections carry it. The output of the very last "
        "layer is taken after the final norm.",
    )
    preset = flags(learning_rate=5e-5, num_train_epochs=10.0, lr_scheduler_type="constant")

    def __post_init__(self) -> None:
        self._direction: list[float] = []
        self._layer = 0

    def _choose_layer(self, count: int) -> int:
        layer = self.layer
        if layer is None:
            layer = 7 if count >= 12 else (count - 1) // 2
        if not 0 <= layer < count:
            raise UserError(f"--layer {layer}: the model has layers 0 to {count - 1}")
        return layer

    def trainable(self, model: Any) -> str:
        from llm_unlearn.approximate.tuning import last_projections
        from llm_unlearn.decoder import find_decoder_layers

        layer = self._choose_layer(len(find_decoder_layers(model)[1]))
        return last_projections(model, range(max(0, layer - 2), layer + 1))

    def needs(self) -> Mapping[str, set[str]]:
        return {"retain": {HIDDEN}} if self.retain_weight != 0 else {}

    def prepare(self, session: Session) -> None:
        from llm_unlearn.decoder import find_decoder_layers

        self._layer = self._choose_layer(len(find_decoder_layers(session.model)[1]))
        width = session.model.config.get_text_config(decoder=True).hidden_size
        self._direction = draw_direction(width, session.config.seed)
        session.notes.append(f"hidden states of decoder layer {self._layer} are steered")

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        hidden_BTD = side.hidden_BTD(self._layer)
        target_D = self.steering_coefficient * hidden_BTD.new_tensor(self._direction)
        loss_B = row_squared_errors(hidden_BTD, target_D, side.tokens_BT)
        found = [side.per_row("forget", loss_B, self.forget_weight)]
        if self.retain_weight != 0:
            side = step["retain"]
            kept_BTD = side.reference_hidden_BTD(self._layer)
            kept_B = row_squared_errors(side.hidden_BTD(self._layer), kept_BTD, side.tokens_BT)
            found.append(side.per_row("retain", kept_B, self.retain_weight))
        return found

    def state(self) -> dict[str, Any]:
        return {"direction": self._direction}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._direction = list(state["direction"])
