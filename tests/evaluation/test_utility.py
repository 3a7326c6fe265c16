"""Tug of War: by hand, at its ends, and that it goes wrong as loudly as it should."""

import math

import pytest

from llm_unlearn.evaluation.utility import tug_of_war, tug_of_war_attack

RETRAINED = {"forget": 0.1, "retain": 0.9, "test": 0.8}


def test_worked_out_by_hand() -> None:
    model = {"forget": 0.6, "retain": 0.7, "test": 0.9}
    assert tug_of_war(model, RETRAINED) == pytest.approx(0.5 * 0.8 * 0.9)
    assert tug_of_war(RETRAINED, model) == tug_of_war(model, RETRAINED)
    assert tug_of_war_attack(model, RETRAINED, 0.75, 0.5) == pytest.approx(0.75 * 0.8 * 0.9)


def test_retraining_is_the_best_and_the_opposite_the_worst() -> None:
    assert tug_of_war(RETRAINED, RETRAINED) == 1.0
    assert tug_of_war({"forget": 1.0}, {"forget": 0.0}) == 0.0
    too_much, too_little = ({**RETRAINED, "forget": forget} for forget in (0.0, 0.2))
    assert tug_of_war(too_much, RETRAINED) == pytest.approx(tug_of_war(too_little, RETRAINED))


def test_a_set_without_a_score_leaves_no_value() -> None:
    assert math.isnan(tug_of_war({**RETRAINED, "test": math.nan}, RETRAINED))
    assert math.isnan(tug_of_war_attack(RETRAINED, RETRAINED, math.nan, 0.5))
    unknown = {**RETRAINED, "forget": math.nan}
    assert tug_of_war_attack(unknown, unknown, 0.5, 0.5) == 1.0


def test_bad_input() -> None:
    for model, message in (
        ({"forget": 0.1}, "same sets for both models"),
        ({**RETRAINED, "retain": 55.0}, r"\[0, 1\] for retain, got 55.0"),
    ):
        with pytest.raises(ValueError, match=message):
            tug_of_war(model, RETRAINED)
    with pytest.raises(ValueError, match="same sets"):
        tug_of_war({}, {})
