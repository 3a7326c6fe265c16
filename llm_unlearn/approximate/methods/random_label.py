"""Random labels: fine-tuning on the forget prompts with other records' answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, RetainMethod, flag, flags
from llm_unlearn.data.records import answer_of, digest, with_answer
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record

SOURCES = ("retain", "forget")


def mismatched(records: Sequence[Record], others: Sequence[Record], seed: int) -> list[Record]:
    """The records with others' answers, drawn by seed and record; never one that says the same.

    Raises:
        UserError: plain text, or no other answer to take.
    """
    answers = sorted({answer_of(other) for other in others})
    found = []
    for record in records:
        wrong = [answer for answer in answers if _plain(answer) != _plain(answer_of(record))]
        if not wrong:
            raise UserError("all records have the same answer: there is no other to teach")
        draw = int(digest(["label", seed, record.id]), 16)
        found.append(with_answer(record, wrong[draw % len(wrong)]))
    return found


def _plain(answer: str) -> str:
    return " ".join(answer.casefold().split())


@dataclass
class RandomLabel(RetainMethod):
    """L = forget_weight * NLL(another's answer | forget prompt) + retain_weight * R(retain)."""

    answers_from: str = flag(
        "retain", "whose answers are taught: of retain rows, or of forget rows"
    )

    card = Card(
        title="Random labels",
        source="Graves et al., Amnesiac Machine Learning, arXiv 2010.10981; for language models the "
        "random mismatch of Yao et al., Large Language Model Unlearning, arXiv 2310.10683",
        idea="Fine-tunes each forget prompt on the answer of another record, and on the retain set.",
        use_when="A baseline whose model goes on answering fluently is wanted.",
        fails_when="The model now states falsehoods about those who asked to be forgotten, and retain "
        "facts about the wrong people; the old answer stays the next best guess.",
        differs="An answer stays with its prompt for the whole run, where Yao et al. draw several; it is "
        "a retain row's by default, so that no forget answer is taught again.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=5.0, weight_decay=0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers_from not in SOURCES:
            raise UserError(f"--answers_from is retain or forget, got {self.answers_from!r}")

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        others = session.retain if self.answers_from == "retain" else session.forget
        return {"forget/other": mismatched(session.forget, others, session.config.seed)}

    def terms(self, step: Step) -> list[Term]:
        side = step["forget/other"]
        forget = side.per_token("forget", -side.log_probabilities_BT, self.forget_weight)
        return [forget, *self.retain_terms(step)]
