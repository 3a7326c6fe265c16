"""AltPO: alternate answers are preferred to the ones that are to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import LOG_PROBABILITIES, Card, flag
from llm_unlearn.approximate.methods.idk_dpo import DPO
from llm_unlearn.data.records import with_answer
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Side, Step
    from llm_unlearn.data.records import Record


@dataclass
class AltPO(DPO):
    """DPO whose preferred answer is, epoch after epoch, the next of a row's alternates."""

    alternates: str | None = flag(
        None, "file with a column `alternate`, by `prompt` or in the forget set's order"
    )
    number_of_alternates: int = flag(5, "alternates for each forget row")
    temperature: float = flag(1.0, "at which alternates are sampled, where no file is given")

    card = Card(
        title="Alternate preference optimisation",
        source="Mekala et al., Alternate Preference Optimization for Unlearning Factual Knowledge in "
        "Large Language Models, arXiv 2409.13474",
        idea="Before training the model makes up other answers to the forget prompts; DPO then prefers "
        "them to the true ones, with a loss on the retain set.",
        use_when="The unlearned model is to go on giving fluent, in-domain answers.",
        fails_when="The model cannot make up plausible answers (a small base model): then it learns "
        "noise, so give --alternates. What it says afterwards is false.",
        differs="The paper makes a pair of each of 5 alternates and trains 2 epochs; here an epoch "
        "takes one alternate of every row in turn, so that 10 epochs see the same pairs. The wording "
        "that asks for alternates is ours, without examples. Beta, learning rate and retain weight "
        "are open-unlearning's DPO defaults; the paper tunes them.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.number_of_alternates < 1 or self.temperature <= 0:
            raise UserError("--number_of_alternates is at least 1 and --temperature above 0")

    def _names(self) -> list[str]:
        return [f"forget/alternate{number}" for number in range(self.number_of_alternates)]

    def needs(self) -> Mapping[str, set[str]]:
        own = {name: {LOG_PROBABILITIES} for name in ["forget", *self._names()]}
        return {**super().needs(), **own}

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        from llm_unlearn.approximate.alternates import make_up, read_alternates

        if self.alternates is not None:
            found = read_alternates(self.alternates, session.forget)
        else:
            found = make_up(session, self.number_of_alternates, self.temperature)
        # A file may have fewer for a row: they are gone through again.
        return {
            name: [
                with_answer(record, texts[number % len(texts)])
                for record, texts in zip(session.forget, found, strict=True)
            ]
            for number, name in enumerate(self._names())
        }

    def preferred(self, step: Step) -> Side:
        return step[self._names()[step.epoch % self.number_of_alternates]]
