"""The default profile: the papers' definitions, with the mistakes of their code mended.

A profile says how texts become ids, what of an answer is compared with what, and which small
constants enter the formulas. The others override what their code does otherwise; docs/evaluation.md
lists the differences with their causes.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from llm_unlearn.evaluation.prompts import (
    Encoded,
    Prompting,
    Shot,
    common_prefix,
)
from llm_unlearn.evaluation.scorer import Item, TokenScores, tokenize_open
from llm_unlearn.evaluation.text import cut

VERBATIM_TOKENS = 128  # MUSE: of the continuation, generated and compared


class Profile:
    """Scoring as we believe it is right.

    Attributes:
        percent: whether shares are given times 100.
        stemmer: whether ROUGE stems words; None leaves it to the suite, as its authors do.
        extraction_floor: whether extraction strength of a text without a hit is 1/m, not 0.
        at_least_one: whether Min-K% takes one token of a text too short for a share.
        epsilon: added to denominators of truth ratios, option probabilities and PrivLeak.
        empty_reference: the overlap of an answer with a reference that has no word.
        members_positive: whether an attack's AUC is near 1, not near 0, when members stand out.
    """

    name: ClassVar[str] = "default"
    percent: ClassVar[bool] = False
    stemmer: ClassVar[bool | None] = None
    extraction_floor: ClassVar[bool] = False
    at_least_one: ClassVar[bool] = True
    epsilon: ClassVar[float] = 0.0
    empty_reference: ClassVar[float] = math.nan
    members_positive: ClassVar[bool] = True

    def question(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        answer: str,
        shots: Sequence[Shot],
        prompting: Prompting,
    ) -> Encoded:
        """The answer, its end of sequence included, after question and examples.

        No space ends the prompt: most tokenizers join it to the answer's first word, and a model that is
        handed a lone space goes on differently. An empty answer is not scored.
        """
        if prompting.template == "chat":
            prompt, full = prompting.chat(tokenizer, question, answer, shots)
        else:
            stem = prompting.stem(question, shots)
            prompt = tokenize_open(tokenizer, stem)
            full = _with_end(tokenizer, tokenize_open(tokenizer, f"{stem} {answer}"))
        item = _split(prompt, full if answer.strip() else prompt)
        return Encoded(item, tuple(prompt), answer)

    def continuation(self, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Encoded:
        """A passage's own continuation after its beginning; the first 128 tokens are compared."""
        joint = "" if prompt[-1:].isspace() or text[:1].isspace() or not prompt else " "
        start = tokenize_open(tokenizer, prompt)
        item = _split(start, tokenize_open(tokenizer, f"{prompt}{joint}{text}"))
        compared = self.decode(tokenizer, item.target[:VERBATIM_TOKENS]).strip()
        return Encoded(item, tuple(start), compared)

    def passage(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Item:
        """All tokens of a text; the first can be scored only where the tokenizer adds one before."""
        return _split(tokenize_open(tokenizer, ""), tokenize_open(tokenizer, text))

    def attacked(self, scores: TokenScores) -> TokenScores:
        """The tokens that Min-K%, Min-K%++, exact memorization and extraction strength read."""
        return scores

    def zlib_text(self, tokenizer: PreTrainedTokenizerBase, text: str, item: Item) -> str:
        """The text whose compressed size scales the zlib attack."""
        return text

    def clean(
        self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str]
    ) -> str:
        """A generated answer as it is compared."""
        return cut(self.decode(tokenizer, ids), stops).strip()

    def decode(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _split(prompt: Sequence[int], full: Sequence[int]) -> Item:
    """The part of `full` after what it shares with the prompt; one token at least stays before."""
    kept = max(1, common_prefix(prompt, full))
    return Item(tuple(full[:kept]), tuple(full[kept:]))


def _with_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids if tokenizer.eos_token_id is None else [*ids, int(tokenizer.eos_token_id)]  # pyright: ignore[reportArgumentType]
