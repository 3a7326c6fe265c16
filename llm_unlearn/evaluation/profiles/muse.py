"""The conventions of MUSE's released code (swj0419/muse_bench), for its own suites."""

from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.profiles.default import VERBATIM_TOKENS, Profile
from llm_unlearn.evaluation.prompts import Encoded, Prompting, Shot
from llm_unlearn.evaluation.scorer import Item, tokenize
from llm_unlearn.evaluation.text import cut


class MuseProfile(Profile):
    """Percent; a space ends a question's prompt; the reference's first 128 tokens hold its BOS."""

    name: ClassVar[str] = "muse"
    percent: ClassVar[bool] = True
    stemmer: ClassVar[bool | None] = False
    at_least_one: ClassVar[bool] = False
    members_positive: ClassVar[bool] = False
    empty_reference: ClassVar[float] = 0.0

    def question(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        answer: str,
        shots: Sequence[Shot],
        prompting: Prompting,
    ) -> Encoded:
        if prompting.template == "chat":
            raise UserError("the muse profile has no chats: use --profile default")
        scored = super().question(tokenizer, question, answer, shots, prompting)
        prompt = tokenize(tokenizer, prompting.stem(question, shots) + " ")
        return Encoded(scored.item, tuple(prompt), answer)

    def continuation(self, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Encoded:
        scored = super().continuation(tokenizer, prompt, text)
        reference = tokenize(tokenizer, text)[:VERBATIM_TOKENS]
        return Encoded(
            scored.item, tuple(tokenize(tokenizer, prompt)), self.decode(tokenizer, reference)
        )

    def passage(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Item:
        ids = tuple(tokenize(tokenizer, text))
        return Item(ids[:1], ids[1:])

    def clean(
        self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str]
    ) -> str:
        return cut(self.decode(tokenizer, ids), stops)

    def decode(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=True)
        )
