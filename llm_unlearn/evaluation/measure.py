"""From a suite's sections to numbers by row: every forward pass and every answer is used once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.evaluation import membership, text, tofu, tokens
from llm_unlearn.evaluation.profiles.default import Profile
from llm_unlearn.evaluation.prompts import Encoded, Prompting
from llm_unlearn.evaluation.results import NAN, Columns, Records, Text
from llm_unlearn.evaluation.scorer import Item, Scorer, TokenScores
from llm_unlearn.evaluation.suites.suite import (
    Canaries,
    Continuations,
    Passages,
    Questions,
    Section,
    Suite,
)

Answers = list[list[int]]  # new ids of each answer to one prompt


@dataclass(frozen=True)
class Measurement:
    """What one model gave: numbers by row, and what it said."""

    records: Records
    texts: list[Text]


@dataclass(frozen=True)
class Measuring:
    """What stays the same while the sections of a suite are measured.

    Attributes:
        with_gradients: whether the gradient-norm attack is wanted: a backward pass for each text.
    """

    scorer: Scorer
    suite: Suite
    profile: Profile
    prompting: Prompting
    with_gradients: bool = False

    def run(self) -> Measurement:
        records: Records = {}
        texts: list[Text] = []
        encoded = {name: self._encode_section(s) for name, s in self.suite.sections.items()}
        answers = self._generate(encoded)
        for name, section in self.suite.sections.items():
            if isinstance(section, Questions | Continuations):
                said = self._clean(section, answers.get(name, []))
                records[name] = self._answered(section, encoded[name], said)
                texts += self._texts(name, section, encoded[name], said)
            elif isinstance(section, Passages):
                records[name] = self._passages(section)
            else:
                records[name] = self._canaries(section)
        return Measurement(records, texts)

    def _encode_section(self, section: Section) -> list[Encoded]:
        """Rows that are answered, ready for the model; none for other sections."""
        if isinstance(section, Questions):
            return [self._encode(section, row["question"], row["answer"]) for row in section.rows]
        if not isinstance(section, Continuations):
            return []
        encode, tokenizer = self.profile.continuation, self.scorer.tokenizer
        return [encode(tokenizer, str(row["prompt"]), str(row["gt"])) for row in section.rows]

    def _generate(self, encoded: Mapping[str, Sequence[Encoded]]) -> dict[str, list[Answers]]:
        """Greedy answers by section. Sections share batches: their longest answers are awaited once."""
        lengths: dict[int, list[str]] = {}
        for name, section in self.suite.sections.items():
            if isinstance(section, Questions | Continuations) and section.new_tokens:
                lengths.setdefault(section.new_tokens, []).append(name)
        found: dict[str, list[Answers]] = {}
        for new_tokens, names in lengths.items():
            prompts = [e.prompt for name in names for e in encoded[name]]
            answers = iter(self.scorer.generate(prompts, new_tokens))
            for name in names:
                found[name] = [next(answers) for _ in encoded[name]]
        return found

    def _clean(
        self, section: Questions | Continuations, answers: Sequence[Answers]
    ) -> list[str | None]:
        """Answers as they are compared; None where the prompt fills the model's context."""
        stops = section.stops if isinstance(section, Questions) else ()
        clean, tokenizer = self.profile.clean, self.scorer.tokenizer
        return [clean(tokenizer, said[0], stops) if said else None for said in answers]

    def _answered(
        self,
        section: Questions | Continuations,
        encoded: Sequence[Encoded],
        answers: Sequence[str | None],
    ) -> Columns:
        columns: Columns = {}
        if isinstance(section, Continuations):
            columns |= self._memorization(self.scorer.likelihoods([e.item for e in encoded]))
        elif section.is_scored:
            columns |= self._scored_answers(section, encoded)
        if not answers:
            return columns
        columns |= self._compare(answers, [e.reference for e in encoded])
        if isinstance(section, Questions):
            columns |= self._manner(section, answers)
        return columns

    def _manner(self, section: Questions, answers: Sequence[str | None]) -> Columns:
        """How a question was answered, whatever the right answer is."""
        columns = {
            "refused": _column(
                NAN if said is None else float(text.is_refusal(said)) for said in answers
            ),
            "token_entropy": _column(
                NAN if said is None else text.token_entropy(self._ids(said)) for said in answers
            ),
        }
        if section.is_forgotten:
            columns["substituted"] = self._substitutions(section, answers)
        return columns

    def _passages(self, section: Passages) -> Columns:
        passages = [str(row["text"]) for row in section.rows]
        items = [self.profile.passage(self.scorer.tokenizer, passage) for passage in passages]
        scores = self.scorer.likelihoods(items)
        return self._membership(passages, items, scores)

    def _canaries(self, section: Canaries) -> Columns:
        """How far up the list of possible values the true one stands."""
        groups = [
            [
                self._encode(section, row["prompt"], value).item
                for value in (row["canary"], *row["candidates"])
            ]
            for row in section.rows
        ]
        losses = self._losses_by_row(groups)
        return {
            "exposure": _column(tokens.exposure(row[0], row[1:]).value for row in losses),
        }

    def _encode(self, section: Section, question: Any, answer: Any) -> Encoded:
        shots = section.shots if isinstance(section, Questions) else ()
        return self.profile.question(
            self.scorer.tokenizer, str(question), str(answer), shots, self.prompting
        )

    def _compare(self, answers: Sequence[str | None], references: Sequence[str]) -> Columns:
        stemmer = self.suite.stemmer if self.profile.stemmer is None else self.profile.stemmer
        overlaps = [
            None if said is None else text.rouge(said, reference, stemmer)
            for said, reference in zip(answers, references, strict=True)
        ]
        empty = self.profile.empty_reference
        return {
            "rougeL_f1": _overlaps([o and o.rougeL_f1 for o in overlaps], empty),
            "rougeL_recall": _overlaps([o and o.rougeL_recall for o in overlaps], empty),
            "exact": _column(
                NAN if said is None or not reference.strip() else text.is_exact(said, reference)
                for said, reference in zip(answers, references, strict=True)
            ),
        }

    def _substitutions(
        self, section: Questions, answers: Sequence[str | None]
    ) -> NDArray[np.float64]:
        others = text.Facts([*self.suite.others_facts, *self.suite.others])
        return _column(
            NAN
            if said is None
            else text.substitution(said, [str(row["answer"])], others, str(row["question"]))
            for said, row in zip(answers, section.rows, strict=True)
        )

    def _scored_answers(self, section: Questions, encoded: Sequence[Encoded]) -> Columns:
        items = [e.item for e in encoded]
        scores = self.scorer.likelihoods(items)
        answers = [str(row["answer"]) for row in section.rows]
        columns = self._memorization(scores) | self._membership(answers, items, scores)
        if all("perturbed_answer" in row for row in section.rows):
            columns |= self._truth_ratios(section, -columns["loss"])
        return columns

    def _truth_ratios(self, section: Questions, losses: NDArray[np.float64]) -> Columns:
        """TOFU's, from the wrong answers and the right one in other words (or as it stands)."""
        wrong = self._losses_by_row(
            [
                [self._encode(section, row["question"], a).item for a in row["perturbed_answer"]]
                for row in section.rows
            ]
        )
        right = losses
        if all("paraphrased_answer" in row for row in section.rows):
            right = self._losses_by_row(
                [
                    [self._encode(section, row["question"], a).item for a in _several(row)]
                    for row in section.rows
                ]
            ).mean(axis=1)
        epsilon = self.profile.epsilon
        columns = {"truth_ratio": tofu.truth_ratio(right, wrong, epsilon=epsilon)}
        if section.among_options:
            columns["option_probability"] = tofu.probability(losses, wrong, epsilon)
        return columns

    def _memorization(self, scores: Sequence[TokenScores | None]) -> Columns:
        hits = [np.array([]) if row is None else self.profile.attacked(row).hits for row in scores]
        floor = self.profile.extraction_floor
        return {
            "exact_memorization": _column(map(tokens.exact_memorization, hits)),
            "extraction_strength": _column(tokens.extraction_strength(h, floor) for h in hits),
            "probability": _column(
                NAN if row is None else tokens.answer_probability(row.log_probabilities)
                for row in scores
            ),
        }

    def _membership(
        self, passages: Sequence[str], items: Sequence[Item], scores: Sequence[TokenScores | None]
    ) -> Columns:
        """Every score points the same way: higher = likelier a member."""
        zlib_text, tokenizer = self.profile.zlib_text, self.scorer.tokenizer
        attacks: dict[str, Callable[[str, Item, TokenScores], float]] = {
            "loss": lambda _passage, _item, row: membership.loss_score(row.log_probabilities),
            "zlib": lambda passage, item, row: membership.zlib_score(
                row.log_probabilities, zlib_text(tokenizer, passage, item)
            ),
            "min_k": lambda _passage, _item, row: membership.min_k_score(
                self.profile.attacked(row).log_probabilities,
                at_least_one=self.profile.at_least_one,
            ),
            "min_k_plus_plus": lambda _passage, _item, row: _standardised(
                self.profile.attacked(row)
            ),
        }
        rows = list(zip(passages, items, scores, strict=True))
        columns = {
            name: _column(NAN if row is None else score(p, i, row) for p, i, row in rows)
            for name, score in attacks.items()
        }
        if self.with_gradients:
            norms = self.scorer.gradient_norms([self._attacked_item(item) for item in items])
            columns["gradnorm"] = -_column(norms)
        return columns

    def _attacked_item(self, item: Item) -> Item:
        """The target without the tokens that the profile leaves out."""
        positions = np.arange(len(item.target), dtype=np.float64)
        kept = len(self.profile.attacked(TokenScores(*[positions] * 4)).hits)
        return item._replace(target=item.target[:kept])

    def _losses_by_row(self, groups: Sequence[Sequence[Item]]) -> NDArray[np.float64]:
        """Mean loss of each item, (rows, items); rows with fewer items end in NaN."""
        scores = iter(self.scorer.likelihoods([item for group in groups for item in group]))
        width = max(map(len, groups))
        losses = np.full((len(groups), width), math.nan)
        for row, group in enumerate(groups):
            for column in range(len(group)):
                found = next(scores)
                if found is not None:
                    losses[row, column] = -membership.loss_score(found.log_probabilities)
        return losses

    def _ids(self, said: str) -> list[int]:
        return list(self.scorer.tokenizer(said, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]

    def _texts(
        self,
        name: str,
        section: Questions | Continuations,
        encoded: Sequence[Encoded],
        answers: Sequence[str | None],
    ) -> list[Text]:
        asked = "question" if isinstance(section, Questions) else "prompt"
        rows = zip(section.rows, encoded, answers, strict=True) if answers else ()
        return [
            Text(name, number, str(row[asked]), e.reference, said or "")
            for number, (row, e, said) in enumerate(rows)
        ]


def _several(row: Any) -> list[Any]:
    given = row["paraphrased_answer"]
    return given if isinstance(given, list) else [given]


def _standardised(row: TokenScores) -> float:
    return membership.min_k_plus_plus_score(row.log_probabilities, -row.entropies, row.deviations)


def _overlaps(values: Sequence[float | None], empty: float) -> NDArray[np.float64]:
    """NaN where there is no answer; `empty` where the reference has no word."""
    return _column(NAN if v is None else empty if math.isnan(v) else v for v in values)


def _column(values: Iterable[float]) -> NDArray[np.float64]:
    return np.array(list(values), dtype=np.float64)
