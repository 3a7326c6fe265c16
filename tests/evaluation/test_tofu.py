"""TOFU's metrics: by hand, in the limit, on logs that lack something, and as published."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import hmean

from llm_unlearn.evaluation.tofu import (
    FIELDS,
    FORGET,
    REAL_AUTHORS,
    RETAIN,
    WORLD_FACTS,
    aggregate_truth_ratios,
    forget_quality,
    model_utility,
    probability,
    score_logs,
    truth_ratio,
)

NAN, INF = math.nan, math.inf
LOGS = Path(__file__).parents[2] / "../shared/data/tofu_logs"
FULL, RETAIN90 = LOGS / "llama2-7b_full.json", LOGS / "llama2-7b_retain90.json"
published = pytest.mark.skipif(
    not (FULL.exists() and RETAIN90.exists()), reason=f"no published logs in {LOGS}"
)


def test_truth_ratio_worked_out_by_hand() -> None:
    """Right answer 1/2; wrong ones 1/4 and 1/16: geometric mean 1/8, arithmetic 5/32."""
    right, wrong = [math.log(2)], [[math.log(4), math.log(16)]]
    assert truth_ratio(right, wrong) == pytest.approx([1 / 4])
    assert truth_ratio(right, wrong, mean="arithmetic") == pytest.approx([5 / 16])
    assert truth_ratio([1.0, 2.0], [[1.0], [1.0]]) == pytest.approx([1.0, math.e])


def test_truth_ratio_limits_and_invariances() -> None:
    generator = np.random.default_rng(0)
    right, wrong = generator.random(20) * 5, generator.random((20, 5)) * 5
    ratios = truth_ratio(right, wrong)
    assert np.allclose(truth_ratio(right, wrong[:, ::-1]), ratios)
    assert np.allclose(truth_ratio(right + 3, wrong + 3), ratios)
    assert (truth_ratio(right, wrong, "arithmetic") >= ratios).all()
    alike = np.repeat(wrong[:, :1], 5, axis=1)
    assert np.allclose(truth_ratio(right, alike, "arithmetic"), truth_ratio(right, alike))
    assert truth_ratio([0.0, INF], [[INF], [0.0]]) == pytest.approx([0.0, INF])
    # A ruined model: no probability is left in floating point, the ratio still is.
    for mean in ("geometric", "arithmetic"):
        assert truth_ratio([1001.0], [[1000.0, 1000.0]], mean) == pytest.approx([math.e])


def test_probability_worked_out_by_hand() -> None:
    assert probability([0.0, math.log(2), INF, -1e-6]) == pytest.approx([1, 0.5, 0, 1])
    among = probability([math.log(2), 2000.0], [[math.log(4), math.log(4)], [2000.0, 2000.0]])
    assert among == pytest.approx([0.5, 1 / 3])


def test_losses_that_are_missing_stay_missing() -> None:
    assert np.isnan(probability([1.0, NAN])).tolist() == [False, True]
    for scores in (
        truth_ratio([1.0, NAN, 1.0], [[2.0, 1.0], [2.0, 1.0], [NAN, 1.0]]),
        truth_ratio([1.0, NAN, 1.0], [[2.0, 1.0], [2.0, 1.0], [NAN, 1.0]], "arithmetic"),
        probability([1.0, NAN, 1.0], [[2.0, 1.0], [2.0, 1.0], [NAN, 1.0]]),
    ):
        assert np.isnan(scores).tolist() == [False, True, True]


def test_aggregates_worked_out_by_hand() -> None:
    ratios = [0.5, 4.0, NAN, 1.0]
    assert aggregate_truth_ratios(ratios, forgotten=True) == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert aggregate_truth_ratios(ratios, forgotten=False) == pytest.approx(0.5 / 3)
    inverse = 1 / np.array(ratios)
    assert aggregate_truth_ratios(inverse, True) == aggregate_truth_ratios(ratios, True)
    assert [aggregate_truth_ratios([0.0, INF], kind) for kind in (True, False)] == [0.0, 0.5]
    assert all(math.isnan(aggregate_truth_ratios(x, True)) for x in ([], [NAN]))


def test_forget_quality_worked_out_by_hand() -> None:
    """Complete separation of 3 and 3: 2 of the 20 orders are as extreme."""
    assert forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx((0.1, 1.0, 3, 3, 0))
    assert forget_quality([1, 2, 3], [3, 2, 1]) == pytest.approx((1.0, 0.0, 3, 3, 0))
    left_out = forget_quality([NAN, 1, 2, 3], [4, NAN, NAN, 5, 6])
    assert left_out == pytest.approx((0.1, 1.0, 3, 3, 3))
    nothing = forget_quality([NAN], [1.0])
    assert math.isnan(nothing.p_value) and math.isnan(nothing.statistic)
    assert nothing[2:] == (0, 1, 1)


def test_forget_quality_ignores_order_and_direction() -> None:
    one, other = (np.random.default_rng(seed).lognormal(seed / 4, 1, 90) for seed in (1, 2))
    quality = forget_quality(one, other)
    assert 0 < quality.p_value < 0.5
    for same in (
        forget_quality(1 / one, 1 / other),
        forget_quality(np.sort(one), other[::-1]),
        forget_quality(other, one),
    ):
        assert same == pytest.approx(quality)


def section(rows: int = 2, **changes: Any) -> dict[str, dict[str, Any]]:
    """Right answers at 1/2, wrong ones at 1/4: probability 1/2 alone, 1/2 among three; R = 1/2."""
    values = {
        "avg_gt_loss": math.log(2),
        "average_perturb_loss": [math.log(4), math.log(4)],
        "avg_paraphrased_loss": math.log(2),
        "rougeL_recall": 0.25,
    }
    return {name: {str(i): value for i in range(rows)} for name, value in values.items()} | changes


def log(**changes: Any) -> dict[str, Any]:
    sections = {"retain": RETAIN, "forget": FORGET, "authors": REAL_AUTHORS, "facts": WORLD_FACTS}
    return {file: changes.get(name, section()) for name, file in sections.items()}


def test_utility_worked_out_by_hand() -> None:
    utility = model_utility(log())
    assert list(utility.terms.values()) == pytest.approx([0.5, 0.25, 0.5] * 3)
    assert utility.value == pytest.approx(9 / (3 * (2 + 4 + 2)))
    assert list(utility.terms)[:2] == ["retain probability", "retain ROUGE-L"]
    assert list(utility.terms)[-1] == "world facts truth ratio"


def test_forget_set_plays_no_part_in_utility_and_row_order_none_at_all() -> None:
    assert model_utility(log(forget=section(7))) == model_utility(log())
    losses = {"avg_gt_loss": {"0": 1.0, "1": 2.0}}
    options = {"0": [1.0, 1.0], "1": [9.0, 9.0]}
    one = model_utility(log(facts=section(**losses, average_perturb_loss=options)))
    turned = dict(reversed(options.items()))
    assert one == model_utility(log(facts=section(**losses, average_perturb_loss=turned)))
    assert one.world_facts.probability == pytest.approx((1 / 3 + 1 / (1 + 2 * math.exp(-7))) / 2)


def test_one_term_at_zero_and_one_that_is_missing() -> None:
    zero = section(rougeL_recall={"0": 0.0, "1": 0.0})
    assert model_utility(log(facts=zero)).value == 0
    missing = section(rougeL_recall={"0": None, "1": None})
    utility = model_utility(log(facts=missing))
    assert math.isnan(utility.value) and math.isnan(utility.world_facts.rouge_recall)
    assert utility.world_facts.n_unscorable == 2 and utility.retain.n_unscorable == 0


def test_rows_without_a_score_are_left_out_and_counted() -> None:
    """null and NaN, in different rows of different fields; the mean is over the others."""
    holes = section(
        3,
        rougeL_recall={"0": None, "1": 0.5, "2": 0.7},
        average_perturb_loss={"0": [1.0, 1.0], "1": [1.0, NAN], "2": [0.0, math.log(4)]},
    )
    scores = model_utility(log(retain=holes)).retain
    assert scores[:2] == pytest.approx((0.5, 0.6))
    assert scores.truth_ratio == pytest.approx((1 - 2 / math.e + 0) / 2)
    assert (scores.n, scores.n_unscorable) == (3, 2)
    quality = score_logs(log(forget=holes), log(forget=section(3))).forget_quality
    assert quality[2:] == (2, 3, 1)


def test_a_model_against_itself(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(log()))
    scores = score_logs(path, str(path))
    assert scores == score_logs(log(), log())
    assert scores.utility == scores.reference_utility and scores.forget == scores.reference_forget
    assert scores.forget_quality[:2] == (1.0, 0.0)


LOSSES: list[tuple[Callable[[], Any], str]] = [
    (lambda: truth_ratio([-0.7], [[1.0]]), "losses >= 0"),
    (lambda: probability([-0.7]), "lowest -0.7"),
    (lambda: probability(0.7), "1 axes"),
    (lambda: truth_ratio([1.0], [1.0]), "2 axes"),
    (lambda: truth_ratio([1.0, 2.0], [[1.0]]), "each of 2 rows"),
    (lambda: truth_ratio([1.0], [[]]), "each of 1 rows"),
    (lambda: truth_ratio([1.0, 1.0], [[1.0, 2.0], [1.0]]), "inhomogeneous"),
    (lambda: truth_ratio([1.0], [[1.0]], mean="harmonic"), "'harmonic'"),  # type: ignore[arg-type]
    (lambda: forget_quality([-1.0], [1.0]), "ratio >= 0"),
    (lambda: forget_quality([[1.0]], [1.0]), "per row"),
]


@pytest.mark.parametrize(("call", "message"), LOSSES)
def test_bad_losses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, f"{FORGET}: expected values by row for {', '.join(FIELDS)}"),
        (log(forget=section(rougeL_recall=[0.5, 0.5])), "values by row for rougeL_recall"),
        (log(facts=section(rougeL_recall={"0": 0.5})), f"{WORLD_FACTS}: expected the same rows"),
        (log(authors=section(0)), f"{REAL_AUTHORS}: expected the same rows"),
        (log(forget=section(3)), "1 are in one log only"),
    ],
)
def test_bad_logs(broken: dict[str, Any], message: str) -> None:
    for pair in ((broken, log()), (log(), broken)):
        with pytest.raises(ValueError, match=message):
            score_logs(*pair)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]"])
def test_files_that_are_not_logs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"log\.json: expected an evaluation log"):
        model_utility(path)


@published
def test_published_scores() -> None:
    scores = score_logs(FULL, RETAIN90)
    assert f"{scores.utility.value:.4f}" == "0.6227"
    assert f"{scores.reference_utility.value:.4f}" == "0.6137"
    assert f"{scores.forget_quality.p_value:.3e}" == "1.834e-21"
    assert f"{scores.forget_quality.statistic:.4f}" == "0.3967"
    assert scores.forget_quality[2:] == (300, 300, 0)
    means = [f"{term:.4f}" for term in scores.utility.terms.values()]
    assert means[:3] == ["0.9895", "0.9857", "0.4747"]
    assert means[3:6] == ["0.4555", "0.9330", "0.5962"]
    assert means[6:] == ["0.4186", "0.8825", "0.5390"]
    assert [f"{x.truth_ratio:.3f}" for x in (scores.forget, scores.reference_forget)] == [
        "0.516",
        "0.674",
    ]
    assert [x.n for x in scores.utility[1:]] == [300, 100, 117]
    assert f"{scores.forget.probability:.4f}" == "0.9909"  # alone, not among the options


@published
@pytest.mark.parametrize(("path", "utility"), [(FULL, "0.5859"), (RETAIN90, "0.5752")])
def test_published_ratios_and_the_papers_mean(path: Path, utility: str) -> None:
    """The logs hold R with the geometric mean; the arithmetic one gives the other utility."""
    content, terms = json.loads(path.read_text()), []
    scores = model_utility(content)
    for file, known in zip((RETAIN, REAL_AUTHORS, WORLD_FACTS), scores[1:], strict=True):
        held = content[file]
        losses = [list(held[f].values()) for f in ("avg_paraphrased_loss", "average_perturb_loss")]
        assert truth_ratio(*losses) == pytest.approx(list(held["truth_ratio"].values()), rel=1e-5)
        papers = aggregate_truth_ratios(truth_ratio(*losses, "arithmetic"), forgotten=False)
        terms += [known.probability, known.rouge_recall, papers]
    assert f"{hmean(terms):.4f}" == utility
