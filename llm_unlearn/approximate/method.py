"""What a method is: a card, its paper's defaults, its own flags, and one loss.

Nothing here imports torch, and the files of the methods import it inside their functions, so that
`--method NAME --help` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record

LOG_PROBABILITIES = "log_probabilities"  # of the reference model, for each label: a number a token
DISTRIBUTIONS = "distributions"  # of the reference model, over the whole vocabulary
HIDDEN = "hidden"  # the reference model's hidden states


@dataclass(frozen=True)
class Card:
    """What a person reads before choosing a method.

    Attributes:
        title: the method's name in words.
        source: paper and equation.
        idea: what it does, in a sentence or two.
        use_when, fails_when: advice.
        differs: where ours is not the paper's or other code's, and why.
    """

    title: str
    source: str
    idea: str
    use_when: str
    fails_when: str
    differs: str = ""


def flag(default: Any, help: str) -> Any:  # noqa: A002 - what argparse calls it
    """A flag of a method, with the words that `--help` shows."""
    return field(default=default, metadata={"help": help})


def flags(**values: Any) -> Mapping[str, Any]:
    """A preset: training flags by name, which nobody can change."""
    return MappingProxyType(values)


@dataclass
class Method:
    """Base of all methods; a method is a dataclass whose fields are its flags.

    Attributes:
        card: what it is.
        preset: training flags of its paper, for full fine-tuning; everything that is not there
            comes from `arguments.COMMON`. With LoRA the learning rate is ten times higher.
        uses_retain: whether it needs a retain set.
        anchor: whose rows an epoch goes through once (`forget` or `retain`); the other side's rows
            come along in a seeded order.
        trains: whether anything is trained by gradients (`terms`) at all.
        needs_weights: works on weights that are there, so a fresh LoRA is of no use to it.
        needs_full: works on the model's own weights, so no LoRA is of use to it.
        is_suppression: what it writes hides knowledge that the weights still hold.
    """

    card: ClassVar[Card]
    preset: ClassVar[Mapping[str, Any]] = flags()
    uses_retain: ClassVar[bool] = True
    anchor: ClassVar[str] = "forget"
    trains: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False
    needs_full: ClassVar[bool] = False
    is_suppression: ClassVar[bool] = False

    def start_from(self, model: Any) -> Any:
        """What is trained, of the model that is given.

        Raises:
            UserError: it answers through a wrapper, which training would leave behind.
        """
        from llm_unlearn.errors import UserError

        if getattr(model, "is_wrapper", False):
            raise UserError(
                "the model answers through a method's wrapper, which training would leave behind: begin "
                "with the model before that method, or (after o3) go on with --method o3"
            )
        return model

    def needs(self) -> Mapping[str, set[str]]:
        """What it asks of the reference model, by side: `LOG_PROBABILITIES`, `DISTRIBUTIONS`, `HIDDEN`."""
        return {}

    def trainable(self, model: Any) -> str | None:
        """What it trains unless `--trainable` says otherwise: a regular expression of the names of
        modules, or None for all. `model` is as it was given, or merged with `--full`.
        """
        return None

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        """Further sides of the batch. `forget/NAME` has a record for each forget record, in order,
        and `retain/NAME` for each retain record.
        """
        return {}

    def prepare(self, session: Session) -> None:
        """Called once before training, with the model as it was given."""

    def terms(self, step: Step) -> list[Term]:
        """The loss of one micro-batch, as terms that the trainer averages over the whole step."""
        raise NotImplementedError(f"{type(self).__name__} is not trained by gradients")

    def after_step(self, means: Mapping[str, float]) -> None:
        """Called after each optimizer step with every term's mean over it, by the term's name."""

    def finish(self, session: Session) -> None:
        """Called once after training, before the result is written."""

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, directory: Path, settings: Mapping[str, Any]) -> Any:
        """What answers, made of the model or adapter that was written, for methods whose result is
        more than weights: those that put `wrapper.json` (`settings`) into `session.extra_files`.

        Returns:
            A `torch.nn.Module` with `device`, `config`, `forward(input_ids, attention_mask)` giving
            `logits`, and `generate` as in Transformers, rows of a batch independent of each other.
        """
        return model

    def state(self) -> dict[str, Any]:
        """What a resumed run must know beside weights and optimizer; plain JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""


@dataclass
class RetainMethod(Method):
    """A forget loss with a retain loss beside it: `forget_weight * F + retain_weight * R`."""

    forget_weight: float = flag(1.0, "weight of the forget loss")
    retain_weight: float = flag(1.0, "weight of the retain loss; 0 leaves it out")
    retain_loss: str = flag("nll", "on retain data: nll, or kl (to the model before unlearning)")

    def __post_init__(self) -> None:
        from llm_unlearn.errors import UserError

        if self.retain_loss not in ("nll", "kl"):
            raise UserError(f"--retain_loss is nll or kl, got {self.retain_loss!r}")

    def needs(self) -> Mapping[str, set[str]]:
        uses_kl = self.retain_weight != 0 and self.retain_loss == "kl"
        return {"retain": {DISTRIBUTIONS}} if uses_kl else {}

    def retain_terms(self, step: Step) -> list[Term]:
        """The retain loss, as a mean over retain tokens; no forward pass where it weighs nothing."""
        from llm_unlearn.approximate.losses import divergence

        if self.retain_weight == 0:
            return []
        side = step["retain"]
        if self.retain_loss == "nll":
            return [side.per_token("retain", -side.log_probabilities_BT, self.retain_weight)]
        values_BT = divergence(side.reference_distributions_BTV, side.distributions_BTV)
        return [side.per_token("retain", values_BT, self.retain_weight)]
