"""EUL: unlearning layers after every feed-forward block, taught by the model before unlearning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import DISTRIBUTIONS, Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Side, Step, Term


def away_from(values: Tensor, most: float) -> Tensor:
    """What is to be raised, as a loss: its negative, flat beyond `most` nats (0: never)."""
    return -values.clamp(max=most) if most else -values


def _from_teacher(side: Side) -> Tensor:
    """KL(teacher || student) at each position, (B, T)."""
    from llm_unlearn.approximate.losses import divergence

    return divergence(side.reference_distributions_BTV, side.distributions_BTV)


def _text_losses(side: Side) -> Tensor:
    """Negative log-probability of every next token of the text, prompts included, (B, T)."""
    from llm_unlearn.approximate.losses import label_log_probabilities

    return -label_log_probabilities(side.logits_BTV, side.batch["input_ids"][:, 1:])


@dataclass
class EUL(Method):
    """Retain epochs: alpha KL + lambda NLL. Forget epochs: -KL - gamma NLL of the text."""

    alpha: float = flag(0.8, "weight of the teacher's KL on retain data")
    task_weight: float = flag(1.0, "the paper's lambda: weight of the retain data's own loss")
    text_weight: float = flag(0.2, "the paper's gamma: weight of the forget texts' raised loss")
    most: float = flag(10.0, "nats a token beyond which the forget terms push no further; 0: never")
    gram: bool = flag(True, "write what `llm-unlearn fuse` needs, a residue of the forget data")

    card = Card(
        title="EUL, unlearning layers",
        source="Chen and Yang, Unlearn What You Want to Forget, arXiv 2310.20150, eq. 1 to 6",
        idea="Small layers after each feed-forward block learn to agree with the old model on the retain "
        "set and to differ from it on the forget set. Several requests' layers are fused in closed "
        "form by `llm-unlearn fuse`.",
        use_when="Requests come one after another, and each is to be a small adapter of its own.",
        fails_when="The forget terms have no lower bound but --most; the paper's own results forget far "
        "more than retraining does. Gram matrices (gram.safetensors) are as wide as the feed-forward "
        "layer, and are statistics of the forget set: leave them out with --gram false, or "
        "delete them once no request is to be fused any more.",
        differs="The paper's layer is a bottleneck adapter; ours is a LoRA on the block's output "
        "projection: linear, so the result is an ordinary PEFT adapter and fusion is exact. Its masked "
        "language modelling loss is the negative log-likelihood of the whole forget text here. An "
        "epoch has as many rows as the forget set, of either kind; ten epochs are five of each.",
    )
    preset = flags(learning_rate=5e-5, num_train_epochs=10.0, warmup_steps=0.06)

    def trainable(self, model: Any) -> str | None:
        """The output projections of all feed-forward blocks."""
        from llm_unlearn.approximate.tuning import last_projections
        from llm_unlearn.decoder import find_decoder_layers

        return last_projections(model, range(len(find_decoder_layers(model)[1])))

    def needs(self) -> Mapping[str, set[str]]:
        return {"forget": {DISTRIBUTIONS}, "retain": {DISTRIBUTIONS}}

    def prepare(self, session: Session) -> None:
        config = session.config
        if not session.tuned.is_adapter:
            raise UserError("eul trains unlearning layers beside the weights: leave out --full")
        if config.max_steps <= 0 and config.num_train_epochs < 2:
            raise UserError(
                "eul's epochs are retain and forget in turn: --num_train_epochs 2 or more"
            )

    def terms(self, step: Step) -> list[Term]:
        if step.epoch % 2 == 0:
            side = step["retain"]
            return [
                side.per_token("retain", _from_teacher(side), self.alpha),
                side.per_token("task", -side.log_probabilities_BT, self.task_weight),
            ]
        side = step["forget"]
        return [
            side.per_token("forget", away_from(_from_teacher(side), self.most)),
            side.per_position("text", away_from(_text_losses(side), self.most), self.text_weight),
        ]

    def finish(self, session: Session) -> None:
        from llm_unlearn.approximate.fusion import GRAM_NAME, gram_file

        if self.gram:
            session.extra_files[GRAM_NAME] = gram_file(session)
            session.notes.append(
                f"{GRAM_NAME} was computed from the forget set, and tells about it"
            )
