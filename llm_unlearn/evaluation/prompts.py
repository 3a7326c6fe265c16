"""How a question is put to a model: chat template or tags, with examples before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.scorer import Item


class Shot(NamedTuple):
    """A question with its answer, shown before the one that is asked."""

    question: str
    answer: str


class Encoded(NamedTuple):
    """A question or a passage, ready for a model.

    Attributes:
        item: the right answer after the prompt, to be scored.
        prompt: what an answer is generated from.
        reference: what the generated text is compared with.
    """

    item: Item
    prompt: tuple[int, ...]
    reference: str


@dataclass(frozen=True)
class Tags:
    """Texts around questions and answers, for models without a chat template.

    The answer follows `answer` and a space.
    """

    question: str
    question_end: str
    answer: str
    answer_end: str


TAGS = {
    # MUSE, and TOFU for base models; what recipes/s3t.py makes of questions and answers.
    "question": Tags("Question: ", "\n", "Answer:", "\n\n"),
    # The question and nothing else: the embedded demonstration.
    "plain": Tags("", "", "", "\n"),
}
TEMPLATES = (*TAGS, "chat")


@dataclass(frozen=True)
class Prompting:
    """A template's name (`question`, `plain`, `chat`), and what a chat begins with."""

    template: str = "question"
    system_prompt: str | None = None
    date_string: str | None = None

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise UserError(f"unknown template {self.template!r}: one of {', '.join(TEMPLATES)}")

    def stem(self, question: str, shots: Sequence[Shot]) -> str:
        """Everything up to the answer, without the space before it."""
        tags = TAGS[self.template]
        shown = "".join(
            f"{tags.question}{shot.question}{tags.question_end}{tags.answer} {shot.answer}{tags.answer_end}"
            for shot in shots
        )
        return f"{shown}{tags.question}{question}{tags.question_end}{tags.answer}"

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        answer: str,
        shots: Sequence[Shot],
    ) -> tuple[list[int], list[int]]:
        """Ids up to the answer, and ids of all, by the tokenizer's own chat template.

        Raises:
            UserError: it has none.
        """
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template: use --template question, or an instruct model"
            )
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        for shot in (*shots, Shot(question, answer)):
            messages += [{"role": "user", "content": shot.question}]
            messages += [{"role": "assistant", "content": shot.answer}]
        options: dict[str, Any] = {"date_string": self.date_string} if self.date_string else {}

        def ids(said: list[dict[str, str]], go_on: bool) -> list[int]:
            encoded = tokenizer.apply_chat_template(
                said, tokenize=True, return_dict=True, add_generation_prompt=go_on, **options
            )
            return list(cast(dict[str, list[int]], encoded)["input_ids"])

        return ids(messages[:-1], True), ids(messages, False)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading ids are equal."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))
