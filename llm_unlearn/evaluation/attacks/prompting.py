"""Prompting: the same question in other words, or after a few answered ones.

What it shows: a model that refuses the benchmark's prompt but answers a paraphrase, or answers once
some examples have set the tone, has unlearnt a prompt and not a fact.

Formula: knowledge of a row under the worst case over prompts is the maximum of its scores over the
variants. Range: that of the scores; higher = knows more.

Source: in-context attacks and paraphrases as in Lynch et al., Eight Methods to Evaluate Robust
Unlearning in LLMs (arXiv 2402.16835); soft prompts are left out on purpose, since they elicit any
string from any model (arXiv 2502.15836).

Control: the maximum over several tries rises by luck alone, so it counts only against the retrained
model's maximum over the same variants (`compare_variants`).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.prompts import Prompting, Shot
from llm_unlearn.evaluation.statistics import Interval, mean_interval, paired_difference

Floats = NDArray[np.float64]
WORST = "worst"


@dataclass(frozen=True)
class PromptingResult:
    """Knowledge by variant and under the worst of them.

    Attributes:
        variants: mean over rows by variant, and `worst`.
        gain: the worst case less the first variant (the benchmark's own), paired.
        differences: by variant and for `worst`, less the retrained model, paired; empty without.
    """

    variants: dict[str, Interval]
    gain: Interval
    differences: dict[str, Interval]


def few_shot_prompts(
    questions: Sequence[str],
    shots: Sequence[tuple[str, str]],
    count: int = 4,
    seed: int = 0,
    prompting: Prompting | None = None,
) -> list[str]:
    """Prompts that begin with a few answered questions from retained rows, up to the answer.

    Args:
        shots: question and answer of retained rows.
        prompting: how questions are put; by default each is a line of its own, untagged.

    Raises:
        UserError: fewer shots than asked for, or a chat template (use `draw_shots` and
            `Prompting.chat`, which needs a tokenizer).
    """
    prompting = prompting or Prompting("plain")
    if prompting.template == "chat":
        raise UserError("few-shot prompts of a chat need a tokenizer: draw the shots alone")
    drawn = draw_shots(questions, shots, count, seed)
    return [prompting.stem(question, own) for question, own in zip(questions, drawn, strict=True)]


def draw_shots(
    questions: Sequence[str], shots: Sequence[tuple[str, str]], count: int = 4, seed: int = 0
) -> list[list[Shot]]:
    """Some answered questions for each question, a seeded draw of its own, so that no shot decides all.

    A shot that asks one of the questions is never drawn: it would tell the answer.

    Raises:
        UserError: fewer usable shots than asked for.
    """
    asked = {question.strip() for question in questions}
    usable = [Shot(*shot) for shot in shots if shot[0].strip() not in asked]
    if not 0 < count <= len(usable):
        raise UserError(
            f"{count} shots were asked for, but {len(usable)} retained rows can serve: ask for "
            "fewer, at least one"
        )
    generator = random.Random(seed)
    return [generator.sample(usable, count) for _ in questions]


def worst_case(scores: Mapping[str, ArrayLike]) -> Floats:
    """Maximum over variants of each row's scores; NaN only where no variant could be scored.

    Raises:
        ValueError: no variant, or variants of different rows.
    """
    tables = [np.asarray(values, dtype=np.float64) for values in scores.values()]
    if not tables or any(table.ndim != 1 or table.shape != tables[0].shape for table in tables):
        raise ValueError("expected at least one variant, each with one score for the same rows")
    return np.fmax.reduce(tables)


def compare_variants(
    scores: Mapping[str, ArrayLike], retrained: Mapping[str, ArrayLike] | None = None
) -> PromptingResult:
    """Means by variant, their worst case, and both against the retrained model.

    Args:
        scores: variant -> one score per row; the first is the benchmark's own prompt.
        retrained: the same variants of the retrained model.

    Raises:
        ValueError: other variants, or other rows.
    """
    if retrained is not None and set(retrained) != set(scores):
        raise ValueError(f"expected the same variants, got {sorted(scores)}, {sorted(retrained)}")
    table = {**scores, WORST: worst_case(scores)}
    control = {**retrained, WORST: worst_case(retrained)} if retrained is not None else {}
    return PromptingResult(
        variants={name: mean_interval(values) for name, values in table.items()},
        gain=paired_difference(table[WORST], next(iter(scores.values()))),
        differences={name: paired_difference(table[name], control[name]) for name in control},
    )
