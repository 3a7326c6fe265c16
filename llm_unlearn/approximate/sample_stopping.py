"""Per-sample stopping: which forget rows are forgotten (ICU, arXiv 2407.20271, and its code).

A row is forgotten when what the model writes after its first part is unlike what came there; it is
left out of the next epoch, and comes back when a later epoch brings the text back. When the rows
together are no better known than unseen text, all of them are.
"""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig

from llm_unlearn.approximate.batches import collate
from llm_unlearn.approximate.encoder import Encoder, load_encoder
from llm_unlearn.data.encoding import IGNORED, Example, encode

if TYPE_CHECKING:
    from llm_unlearn.approximate.method import Method
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.trainer import SampleStopper

TOKENS_ASKED = 50  # of the given part of a text, and of what must follow
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class ForgottenWhen:
    """The numbers of the rule; the defaults are those of ICU's code.

    Attributes:
        bleu, similarity: a row is forgotten below either.
        accuracy, extraction: all rows are, when both of their means are below these.
        length, stride: n-grams of the extraction likelihood, and every how many tokens it starts.
        beams: of the continuation that is compared (ICU: 2).
    """

    bleu: float = 0.01
    similarity: float = 0.3
    accuracy: float = 0.5994
    extraction: float = 0.0499
    length: int = 10
    stride: int = 10
    beams: int = 1


class Part(NamedTuple):
    """A row as it is asked for: what is given, and what followed."""

    given: list[int]
    rest: list[int]


class Found(NamedTuple):
    """What the model still knows of a row."""

    is_forgotten: bool
    accuracy: float
    extraction: float


def split(example: Example) -> Part:
    """A row with an answer: all before its last one, and that. A text: its first half, its second.

    Halves are at most 50 tokens long, from the text's start.
    """
    ids, labels = example.input_ids, example.labels
    unlearnt = [place for place, label in enumerate(labels) if label == IGNORED]
    if not unlearnt:
        half = max(1, min(TOKENS_ASKED, len(ids) // 2))
        return Part(ids[:half], ids[half : 2 * half] or ids[half:])
    end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
    start = max(place for place in unlearnt if place < end) + 1
    return Part(ids[:start], ids[start:end])


def bleu(written: str, true: str) -> float:
    """Sentence BLEU without smoothing, in [0, 1], of lower-case words and punctuation marks.

    n-grams up to 4, or up to the true text's length: BLEU-4 of an exact three-word answer is 0.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    words, reference = WORD.findall(written.lower()), WORD.findall(true.lower())
    order = min(4, len(reference))
    if not words or not order:
        return float(words == reference)
    with warnings.catch_warnings(action="ignore"):  # that BLEU is 0 where no n-gram matches
        score = sentence_bleu([reference], words, (1 / order,) * order, SmoothingFunction().method0)
    return float(score)  # pyright: ignore[reportArgumentType]


def greedy_match(left_TD: Tensor, right_UD: Tensor) -> float:
    """BERTScore's F1 without rescaling (arXiv 1904.09675): every token with its most similar one."""
    similar_TU = left_TD @ right_UD.T
    if not similar_TU.numel():
        return 0.0
    precision, recall = similar_TU.amax(1).mean(), similar_TU.amax(0).mean()
    return float(2 * precision * recall / (precision + recall).clamp_min(1e-9))


def ngram_overlap(written: Sequence[int], true: Sequence[int], length: int) -> float:
    """Share of what is written that is in the true text: n-grams found, of those of the true text."""
    grams = [
        [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
        for ids in (written, true)
    ]
    known = set(grams[1])
    counts = Counter(gram in known for gram in grams[0])
    return counts[True] / max(1, len(grams[1]))


def make_stopper(rule: str, session: "Session", method: "Method") -> "SampleStopper | None":
    """None where every row counts to the end."""
    if rule == "never":
        return None
    rows = [
        encode(record, session.tokenizer, session.config.max_length, completion_only=True)
        for record in session.forget
    ]
    encoder = load_encoder(session.encoder, session.model.device) if session.encoder else None
    numbers = getattr(method, "forgotten_when", ForgottenWhen())
    return IterativeStopper(rows, session.tokenizer, session.pad_token_id, numbers, encoder)


class IterativeStopper:
    """Asks the model for every forget row, with the rows shared out among the processes.

    Args:
        encoder: compares tokens too (BERTScore); without one BLEU decides alone.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        tokenizer: Any,
        pad_token_id: int,
        numbers: ForgottenWhen | None = None,
        encoder: Encoder | None = None,
        batch_size: int = 16,
    ):
        self.rows = rows
        self.parts = [split(row) for row in rows]
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.numbers = numbers or ForgottenWhen()
        self.encoder = encoder
        self.batch_size = batch_size

    def stopped(self, model: Any) -> set[int]:
        """Numbers of the rows that are forgotten; the same in every process."""
        state = PartialState()
        mine = range(state.process_index, len(self.rows), state.num_processes)
        found: dict[int, Found] = {}
        for start in range(0, len(mine), self.batch_size):
            part = mine[start : start + self.batch_size]
            found |= zip(part, self._ask(model, part), strict=True)
        gathered = dict(gather_object(list(found.items())))
        mean_accuracy = sum(one.accuracy for one in gathered.values()) / len(gathered)
        mean_extraction = sum(one.extraction for one in gathered.values()) / len(gathered)
        numbers = self.numbers
        if mean_accuracy < numbers.accuracy and mean_extraction < numbers.extraction:
            return set(gathered)
        return {number for number, one in gathered.items() if one.is_forgotten}

    def _ask(self, model: Any, numbers: Sequence[int]) -> list[Found]:
        parts = [self.parts[number] for number in numbers]
        accuracies = self._accuracies(model, numbers)
        written = self._continue(model, parts, self.numbers.beams)
        forgotten = self._are_forgotten(written, [part.rest for part in parts])
        found = zip(forgotten, accuracies, self._extractions(model, parts), strict=True)
        return [Found(*one) for one in found]

    def _are_forgotten(
        self, written: Sequence[Sequence[int]], true: Sequence[Sequence[int]]
    ) -> list[bool]:
        told = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in [*written, *true]]
        pairs = list(zip(told[: len(written)], told[len(written) :], strict=True))
        forgotten = [bleu(*pair) < self.numbers.bleu for pair in pairs]
        if self.encoder is None:
            return forgotten
        vectors = self.encoder.tokens(told)
        matches = zip(vectors[: len(written)], vectors[len(written) :], strict=True)
        unlike = [greedy_match(*pair) < self.numbers.similarity for pair in matches]
        return [one or other for one, other in zip(forgotten, unlike, strict=True)]

    def _accuracies(self, model: Any, numbers: Sequence[int]) -> list[float]:
        """Share of each row's labels that are the model's first choice."""
        batch = collate([(self.rows[n], n, True) for n in numbers], self.pad_token_id)
        ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        logits_BTV = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        labels_BT = batch["labels"][:, 1:].to(model.device)
        hits_BT = (logits_BTV.argmax(-1) == labels_BT) & (labels_BT >= 0)
        counted_B = (labels_BT >= 0).sum(1).clamp_min(1)
        return (hits_BT.sum(1) / counted_B).tolist()

    def _extractions(self, model: Any, parts: Sequence[Part]) -> list[float]:
        """Extraction likelihood (Jang et al., arXiv 2210.01504) over the rest of each row.

        Mean over starts, a stride apart, of the overlap of what is written from there with the true
        text. A rest shorter than the n-grams is compared as one.
        """
        starts: list[tuple[int, Part, int]] = []
        for row, (given, rest) in enumerate(parts):
            length = max(1, min(self.numbers.length, len(rest)))
            for place in range(0, len(rest) - length + 1, self.numbers.stride):
                starts.append((row, Part(given + rest[:place], rest[place:]), length))
        totals, counts = [0.0] * len(parts), [0] * len(parts)
        for first in range(0, len(starts), self.batch_size):
            some = starts[first : first + self.batch_size]
            written = self._continue(model, [part for _, part, _ in some], beams=1)
            for (row, part, length), ids in zip(some, written, strict=True):
                totals[row] += ngram_overlap(ids, part.rest, length)
                counts[row] += 1
        return [total / max(1, count) for total, count in zip(totals, counts, strict=True)]

    def _continue(self, model: Any, parts: Sequence[Part], beams: int) -> list[list[int]]:
        """As many tokens as followed the given ones, without sampling."""
        width = max(len(part.given) for part in parts)
        ids = [[self.pad_token_id] * (width - len(p.given)) + p.given for p in parts]
        mask = [[0] * (width - len(p.given)) + [1] * len(p.given) for p in parts]
        config = GenerationConfig(
            max_new_tokens=max(1, *(len(part.rest) for part in parts)),
            do_sample=False,
            num_beams=beams,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
        new = output[:, width:].tolist()
        return [ids[: len(part.rest)] for ids, part in zip(new, parts, strict=True)]
