"""The conventions of open-unlearning (locuslab/open-unlearning, December 2025).

Its numbers, quirks included, as long as the padding token is not the end of sequence: there the peer
also hides the real ends of turns from the model, which is not done here.
"""

from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from llm_unlearn.evaluation.profiles.default import Profile
from llm_unlearn.evaluation.prompts import Encoded, Prompting, Shot
from llm_unlearn.evaluation.scorer import Item, TokenScores, tokenize
from llm_unlearn.evaluation.text import cut

QUESTION_TOKENS = 512  # longer questions lose their end, without a word
PASSAGE_TOKENS = 2048


class OpenUnlearningProfile(Profile):
    """Stems words; a space ends the prompt, so an answer's first token may not be scored; the last
    token is left out of Min-K% and memorization; extraction strength is at least 1/m."""

    name: ClassVar[str] = "open-unlearning"
    stemmer: ClassVar[bool | None] = True
    extraction_floor: ClassVar[bool] = True
    epsilon: ClassVar[float] = 1e-10
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
            prompt, full = prompting.chat(tokenizer, question, answer, shots)
        else:
            stem = prompting.stem(question, shots) + " "
            limit = {"max_length": QUESTION_TOKENS, "truncation": True}
            prompt = tokenize(tokenizer, stem, **limit)
            full = tokenize(tokenizer, stem + answer, **limit)
        if full[-1] != tokenizer.eos_token_id and tokenizer.eos_token_id is not None:
            full.append(int(tokenizer.eos_token_id))  # pyright: ignore[reportArgumentType]
        return self._encoded(
            tokenizer, prompt, Item(tuple(full[: len(prompt)]), tuple(full[len(prompt) :]))
        )

    def continuation(self, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Encoded:
        start = tokenize(tokenizer, prompt)
        return self._encoded(tokenizer, start, _passage(tokenizer, start, f"{prompt} {text}"))

    def passage(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Item:
        return _passage(tokenizer, tokenize(tokenizer, ""), text)

    def attacked(self, scores: TokenScores) -> TokenScores:
        return TokenScores(*(column[:-1] for column in scores))

    def zlib_text(self, tokenizer: PreTrainedTokenizerBase, text: str, item: Item) -> str:
        return str(tokenizer.decode(list(item.target), skip_special_tokens=True))

    def clean(
        self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str]
    ) -> str:
        ends = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
        return cut(self.decode(tokenizer, ids), [*ends, *stops]).strip()

    def decode(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=True)
        )

    def _encoded(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], item: Item
    ) -> Encoded:
        said = self.decode(tokenizer, item.target)
        asked = self.decode(tokenizer, prompt)
        # Without an asked text nothing is taken away (an empty string would be found everywhere).
        reference = (said.replace(asked, "") if asked else said).strip()
        return Encoded(item, tuple(prompt), reference)


def _passage(tokenizer: PreTrainedTokenizerBase, start: Sequence[int], text: str) -> Item:
    ids = tokenize(tokenizer, text)[: len(start) + PASSAGE_TOKENS]
    kept = max(1, len(start))
    return Item(tuple(ids[:kept]), tuple(ids[kept:]))
