"""Memorisation of one row: by hand, against a loop over the definition, and in the limit."""

import math
from typing import Any

import numpy as np
import pytest

from llm_unlearn.evaluation.tokens import (
    answer_probability,
    exact_memorization,
    exposure,
    extraction_strength,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("hits", "value", "floored"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 0, 1, 1], 0.5, 0.5),
        ([1, 1, 1, 0], 0.0, 0.25),
        ([0, 0, 0, 0], 0.0, 0.25),
        ([0], 0.0, 1.0),
        ([1], 1.0, 1.0),
    ],
)
def test_extraction_worked_out_by_hand(hits: list[int], value: float, floored: float) -> None:
    assert extraction_strength(hits) == value
    assert extraction_strength(hits, floor=True) == floored


def test_extraction_is_its_definition() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        hits = generator.random(int(generator.integers(1, 12))) < 0.7
        m = len(hits)
        k = next((k for k in range(m) if hits[k:].all()), m)
        assert extraction_strength(hits) == pytest.approx(1 - k / m)
        assert extraction_strength(hits, floor=True) == pytest.approx(1 - min(k, m - 1) / m)
        assert extraction_strength(hits) <= exact_memorization(hits) == hits.mean()


def test_probability_is_the_geometric_mean() -> None:
    assert answer_probability(np.log([0.5, 0.125])) == pytest.approx(0.25)
    assert answer_probability([0.0, 0.0]) == 1.0
    assert answer_probability([5e-5]) == 1.0  # rounding of a certain token
    assert answer_probability([-math.inf, -1.0]) == 0.0


def test_rows_that_cannot_be_scored() -> None:
    for row in ([], [NAN], [1.0, NAN]):
        assert math.isnan(extraction_strength(row)) and math.isnan(exact_memorization(row))
        assert math.isnan(answer_probability([-value for value in row]))
    for canary, candidates in ((NAN, [1.0]), (1.0, []), (1.0, [NAN])):
        result = exposure(canary, candidates)
        assert math.isnan(result.value) and math.isnan(result.rank)


def test_exposure_worked_out_by_hand() -> None:
    others = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert exposure(0.5, others) == (3.0, 1.0, 7, 0)
    assert exposure(1.5, others) == (2.0, 2.0, 7, 0)
    assert exposure(9.0, others) == (0.0, 8.0, 7, 0)
    assert exposure(2.0, [2.0, 2.0, 9.0]) == (1.0, 2.0, 3, 0)  # ranks 1 to 3 are shared
    assert exposure(1.5, [NAN, *others, NAN]) == (2.0, 2.0, 7, 2)


def test_a_canary_never_trained_on_has_an_exposure_of_log2_e() -> None:
    losses = np.random.default_rng(0).random((2000, 500))
    values = [exposure(row[0], row[1:]).value for row in losses]
    assert np.mean(values) == pytest.approx(math.log2(math.e), abs=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extraction_strength([[1, 0]]), r"shape \(1, 2\)"),
        (lambda: exact_memorization([0.5]), "true and false"),
        (lambda: answer_probability([1.0]), "log-probabilities <= 0"),
        (lambda: exposure(1.0, [[1.0]]), "one loss per candidate"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
