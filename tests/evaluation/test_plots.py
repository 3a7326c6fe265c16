"""Plots: drawn where there is something to draw, the same bytes twice, curves that are right."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_results import HOSTILE, all_nan, alone, fake_muse, fake_tofu
from sklearn.metrics import roc_auc_score

from llm_unlearn.evaluation import plots, tradeoff
from llm_unlearn.evaluation.plots import attack_curves, shorten, shorten_all
from llm_unlearn.evaluation.results import Value

DRAWN = (plots.metric_bars, plots.radar, plots.roc_curves, plots.curves_plot)


@pytest.mark.parametrize("draw", DRAWN)
def test_plots_are_svg_or_png_and_the_same_twice(draw) -> None:
    svg = draw(fake_muse())
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert draw(fake_muse()) == svg
    assert draw(fake_muse(), "png").startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("make", [fake_muse, fake_tofu])
def test_nothing_to_draw_is_none_not_an_error(draw, make) -> None:
    assert draw(all_nan(make())) is None
    empty = alone(make())
    empty.model.values, empty.model.records, empty.curves = {}, {}, {}
    assert draw(empty) is None


@pytest.mark.parametrize("make", [fake_muse, fake_tofu])
def test_a_model_alone_is_drawn_without_a_radar(make) -> None:
    assert plots.metric_bars(alone(make())) is not None
    assert plots.radar(alone(make())) is None  # there is nothing to be like
    assert plots.roc_curves(alone(make())) is not None


def test_some_missing_values_leave_the_rest_drawn() -> None:
    results = fake_muse()
    results.others["before"].values["forget_knowmem"] = Value(math.nan)
    del results.others["retrained"].values["forget_verbmem"]
    results.model.values["privleak"] = Value(-10.0)  # no interval
    results.model.values["retain_knowmem"] = Value(0.5, 0.6, 0.7)  # an interval beside its value
    assert plots.metric_bars(results) is not None
    assert plots.radar(results) is not None


def test_hostile_labels_are_drawn_literally() -> None:
    results = fake_muse(label=HOSTILE)
    results.curves[f"{HOSTILE}: {HOSTILE}"] = [Value(0.1, note=HOSTILE), Value(0.3, note=HOSTILE)]
    assert ElementTree.fromstring(plots.curves_plot(results)) is not None
    drawn = plots.tradeoff_plot(tradeoff.of_results(results))
    assert drawn is not None and ElementTree.fromstring(drawn) is not None
    assert b"<script" not in drawn


def test_roc_curves_enclose_the_area_that_others_compute() -> None:
    records = fake_muse().model.records
    records["privleak/forget"]["loss"][3] = math.nan
    for name, (wrong, found) in attack_curves(records).items():
        members, others = (records[f"privleak/{s}"][name] for s in ("forget", "holdout"))
        members = members[~np.isnan(members)]
        truth = [1] * len(members) + [0] * len(others)
        expected = roc_auc_score(truth, [*members, *others])
        assert np.trapezoid(found, wrong) == pytest.approx(expected, abs=1e-12)
        assert (wrong[0], found[0], wrong[-1], found[-1]) == (0, 0, 1, 1)
        assert (np.diff(wrong) >= 0).all() and (np.diff(found) >= 0).all()


def test_roc_curves_keep_ties_and_leave_out_what_is_not_there() -> None:
    same = {"loss": np.full(4, -1.0)}
    curve = attack_curves({"forget": same, "holdout": same})
    assert curve == {"loss": ([0, 1], [0, 1])}  # tied scores are one diagonal step
    assert attack_curves({"forget": same}) == {}
    assert attack_curves({"forget": same, "holdout": {"loss": np.array([math.nan])}}) == {}
    assert attack_curves({"forget": {"zlib": np.ones(2)}, "holdout": same}) == {}


def test_long_labels_are_shortened_and_stay_different() -> None:
    assert shorten("runs/npo") == "runs/npo"
    assert shorten("/data/a/very/long/path/to/models/checkpoint-1200", 28) == (
        "…/to/models/checkpoint-1200"
    )
    assert len(shorten("x" * 300, 28)) == 28
    twins = [f"/data/{name}/{'deep/' * 5}checkpoint" for name in ("one", "two")]
    assert len(set(shorten_all(twins))) == 2
    assert len(set(shorten_all(["same" * 20] * 2))) == 1
    assert len(set(shorten_all(["a" + "x" * 9000, "b" + "x" * 9000]))) == 2


def test_the_forget_axis_is_the_first_that_places_the_models() -> None:
    assert tradeoff.of_results(fake_tofu()).x_title.startswith("forget quality")
    muse = tradeoff.of_results(fake_muse())
    assert muse.x_title.startswith("forget knowledge") and not muse.logarithmic
    at = {point.role: (point.x, point.y) for point in muse.points}
    assert at["retrained"] == (0, 0.68)
    assert at["model"] == pytest.approx((0.06, 0.46))
    lone = tradeoff.of_results(alone(fake_muse()))  # no distance without a retrained model
    assert lone.x_title == "|PrivLeak|" and lone.points[0].x == pytest.approx(0.38)
    assert tradeoff.of_results(all_nan(fake_muse())).points == []
    assert plots.tradeoff_plot(tradeoff.of_results(all_nan(fake_muse()))) is None


def test_percent_and_shares_are_placed_alike() -> None:
    results = fake_muse()
    results.profile = "muse"
    for one in (results.model, *results.others.values()):
        for name in ("forget_knowmem", "retain_knowmem"):
            one.values[name] = Value(100 * one.values[name].value)
    for point, expected in zip(
        tradeoff.of_results(results).points, tradeoff.of_results(fake_muse()).points, strict=True
    ):
        assert (point.x, point.y) == pytest.approx((expected.x, expected.y))


def test_the_front_holds_what_no_other_model_beats() -> None:
    def candidate(label: str, quality: float, utility: float, role: str = "model"):
        values = {"forget_quality": Value(quality), "model_utility": Value(utility)}
        return tradeoff.Candidate(label, role, values, None, "default")

    plane = tradeoff.place(
        [
            candidate("a", 0.5, 0.3),
            candidate("b", 1e-9, 0.6),
            candidate("beaten", 1e-12, 0.5),
            candidate("twin of a", 0.5, 0.3),
            candidate("less useful than a", 0.5, 0.2),
            candidate("reference", 1.0, 0.9, "retrained"),
            candidate("unplaced", math.nan, 0.9),
        ]
    )
    assert {p.label for p in plane.points if p.on_front} == {"a", "b", "twin of a"}
    assert plane.unplaced == ["unplaced"]


def test_a_p_value_of_zero_is_drawn_at_the_edge() -> None:
    results = fake_tofu()
    results.model.values["forget_quality"] = Value(0.0)
    plane = tradeoff.of_results(results)
    assert plane.points[0].x == 1e-30
    assert plots.tradeoff_plot(plane) is not None
