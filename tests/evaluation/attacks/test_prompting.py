"""Few-shot prompts, and the worst case over prompts with its control."""

import numpy as np
import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.prompting import (
    compare_variants,
    draw_shots,
    few_shot_prompts,
    worst_case,
)
from llm_unlearn.evaluation.prompts import Prompting
from tests.evaluation.attacks.demonstration import PUBLIC, base, know, pairs

SHOTS = [(f"What is {i} plus {i}?", str(2 * i)) for i in range(6)]


def test_the_question_comes_last_after_answered_ones() -> None:
    (prompt,) = few_shot_prompts(["What is nine?"], SHOTS, count=2)
    lines = prompt.split("\n")
    assert lines[-1] == "What is nine?" and len(lines) == 3
    assert all(line in {f"{q} {a}" for q, a in SHOTS} for line in lines[:2])
    assert lines[0] != lines[1]
    (tagged,) = few_shot_prompts(["Why?"], SHOTS, count=1, prompting=Prompting("question"))
    assert tagged.count("Question: ") == 2 and tagged.endswith("Question: Why?\nAnswer:")


def test_no_shot_tells_the_answer() -> None:
    questions = [prompt for prompt, _ in SHOTS[:4]]
    drawn = draw_shots(questions, SHOTS, count=2, seed=3)
    assert {shot.question for shots in drawn for shot in shots} == {q for q, _ in SHOTS[4:]}
    with pytest.raises(UserError, match="but 2 retained rows"):
        draw_shots(questions, SHOTS, count=3)


def test_draws_are_seeded() -> None:
    questions = [f"Who is {i}?" for i in range(5)]
    assert draw_shots(questions, SHOTS, 2, seed=1) == draw_shots(questions, SHOTS, 2, seed=1)
    assert draw_shots(questions, SHOTS, 2, seed=1) != draw_shots(questions, SHOTS, 2, seed=2)


def test_the_worst_case_ignores_what_cannot_be_scored() -> None:
    found = worst_case({"own": [0.1, np.nan, np.nan], "other": [0.5, 0.2, np.nan]})
    np.testing.assert_array_equal(found, [0.5, 0.2, np.nan])
    with pytest.raises(ValueError, match="same rows"):
        worst_case({"own": [0.1], "other": [0.1, 0.2]})


def test_luck_over_many_variants_is_not_taken_for_knowledge() -> None:
    generator = np.random.default_rng(0)

    def guessing() -> dict[str, np.ndarray]:
        return {str(i): (generator.random(1000) < 0.1).astype(float) for i in range(5)}

    result = compare_variants(guessing(), guessing())
    assert result.gain.lower > 0.2  # the maximum alone would look like a leak
    assert abs(result.differences["worst"].mean) < 0.05
    knowing = {**guessing(), "4": np.ones(1000)}
    assert compare_variants(knowing, guessing()).differences["worst"].lower > 0.4


def test_shots_still_let_the_demonstration_answer() -> None:
    """The positive control: few-shot prompts do not break a model that knows."""
    rows = pairs(PUBLIC[:2])
    prompts = few_shot_prompts([p for p, _ in rows], pairs(PUBLIC[2:6]), count=1)
    shown = [(prompt, said) for prompt, (_, said) in zip(prompts, rows, strict=True)]
    assert know(base(), shown) > 0.3  # by luck: 1 in 144
