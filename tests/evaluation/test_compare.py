"""Comparisons: what is side by side was asked the same way; tables can be read back."""

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
from fake_results import HOSTILE, LONG_LABEL, SECRET, all_nan, alone, fake_muse, fake_tofu

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.compare import compare, compare_command
from llm_unlearn.evaluation.results import Results, Value
from llm_unlearn.evaluation.statistics import across_seeds


def with_value(results: Results, name: str, value: float) -> Results:
    results.model.values[name] = Value(value)
    return results


def test_the_table_has_models_then_the_reference() -> None:
    found = compare([fake_tofu("one"), fake_tofu("two")])
    assert [column.label for column in found.columns] == ["one", "two", "retrained"]
    assert found.header == ["metric", "", "one", "two", "retrained"]
    assert found.metrics[0] == "forget_quality"
    row = found.to_rows()[found.metrics.index("model_utility")]
    assert row == ["Model utility", "↑", *["0.570 [0.530, 0.610]"] * 2, "0.610 [0.570, 0.650]"]
    assert found.notes == []


def test_metrics_are_what_any_has() -> None:
    first, second = fake_tofu("one"), fake_tofu("two")
    del first.model.values["mia_min_k"], first.others["retrained"]
    second.model.values["of the second alone"] = Value(0.5)
    found = compare([first, second])
    assert {"mia_min_k", "of the second alone"} <= set(found.metrics)
    row = found.to_rows()[found.metrics.index("of the second alone")]
    assert row[2:] == ["–", "0.500", "–"]
    assert found.columns[-1].role == "retrained"  # taken from the one that has it


@pytest.mark.parametrize(
    "change", [{"suite": "other"}, {"profile": "muse"}, {"digests": {"data": "other"}}]
)
def test_different_suites_profiles_or_data_are_refused_unless_mixed(change) -> None:
    results = [fake_tofu("one"), dataclasses.replace(fake_tofu("two"), **change)]
    with pytest.raises(UserError, match="--mixed"):
        compare(results)
    found = compare(results, mixed=True)
    assert len(found.columns) == 3 and "not comparable" in found.notes[0]


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        compare([])
    with pytest.raises(ValueError, match="label"):
        compare([fake_tofu()], labels=["a", "b"])


def test_equal_labels_are_told_apart() -> None:
    names = ["a", "a", "a (2)", "retrained"]
    found = compare([fake_tofu(name) for name in names])
    labels = [column.label for column in found.columns]
    assert len(set(labels)) == 5
    assert labels == ["a", "a (2)", "a (2) (2)", "retrained (2)", "retrained"]


def test_different_retrained_models_and_configurations_are_noted() -> None:
    one, two = fake_tofu("one"), fake_tofu("two")
    two.others["retrained"].digest = "another"
    two.digests["configuration"] = "another"
    notes = " ".join(compare([one, two]).notes)
    assert "different retrained models" in notes and "different configurations" in notes


def test_csv_can_be_read_back() -> None:
    results = [fake_tofu('odd, "label"\nof two lines'), all_nan(fake_tofu("nan"))]
    found = compare(results)
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["metric"] for row in rows] == found.metrics
    for row in rows:
        value = results[0].model.values[row["metric"]]
        label = results[0].model.label
        assert float(row[label]) == value.value and int(row[f"{label} n"]) == value.n
        lower = row[f"{label} lower"]
        assert lower == "" if math.isnan(value.lower) else float(lower) == value.lower
        assert row["nan"] == ""  # what is not scored is empty, never 0


def test_latex_is_escaped_and_the_best_model_is_bold() -> None:
    label = r"a_b & 50% $x^2$ {c} \d #1 ~"
    found = compare(
        [
            with_value(fake_tofu(label), "model_utility", 0.5),
            with_value(fake_tofu("better"), "model_utility", 0.55),
        ]
    )
    text = found.to_latex()
    assert r"a\_b \& 50\% \$x\textasciicircum{}2\$ \{c\} \textbackslash{}d \#1" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    line = next(line for line in text.splitlines() if line.startswith("Model utility"))
    # The retrained model's 0.610 is higher, and no competitor.
    assert re.findall(r"\\textbf\{([^}]*)\}", line) == ["0.550"]
    forget = next(line for line in text.splitlines() if line.startswith("Probability, forget"))
    assert "textbf" not in forget  # best is to equal the retrained model
    bare = re.sub(r"\\[&%$#_{}]", "", text)
    columns = {line.count("&") for line in bare.splitlines() if line.endswith(r"\\")}
    assert columns == {4}
    assert text.isascii()


def test_no_single_model_is_best() -> None:
    assert "textbf" not in compare([fake_tofu()]).to_latex()
    two = [with_value(fake_tofu(name), "model_utility", 0.5) for name in ("a", "b")]
    assert compare(two).best("model_utility") == {0, 1}  # a tie
    mixed = [fake_tofu("a"), dataclasses.replace(fake_tofu("b"), profile="muse")]
    assert compare(mixed, mixed=True).best("model_utility") == set()


def test_seeds_are_taken_together() -> None:
    runs = [fake_muse("npo", seed) for seed in (1, 2, 3)]
    found = compare([*runs, fake_muse("other", 9)], across_seeds=True)
    assert found.header[2:] == ["npo (3 seeds)", "other", "retrained"]
    values = [run.model.values["retain_knowmem"].value for run in runs]
    expected, got = across_seeds(values), found.columns[0].values["retain_knowmem"]
    assert (got.value, got.lower, got.upper, got.n) == pytest.approx(expected[:4])
    by_method = [fake_muse(f"out/{seed}", seed, method="npo") for seed in (1, 2)]
    assert compare(by_method, across_seeds=True).header[2:] == ["npo (2 seeds)", "retrained"]
    assert len(compare(by_method).columns) == 3


def test_seeds_without_a_value_are_counted() -> None:
    runs = [fake_muse("npo", 1), fake_muse("npo", 2), all_nan(fake_muse("npo", 3))]
    value = compare(runs, across_seeds=True).columns[0].values["retain_knowmem"]
    assert (value.n, value.n_unscorable) == (2, 1) and math.isfinite(value.value)
    with pytest.raises(UserError, match="given twice"):
        compare([fake_muse("npo", 1), fake_muse("npo", 1)], across_seeds=True)


def test_p_values_are_averaged_on_their_log_scale() -> None:
    runs = [
        with_value(fake_tofu("npo", seed), "forget_quality", p)
        for seed, p in ((1, 1e-8), (2, 1e-2))
    ]
    value = compare(runs, across_seeds=True).columns[0].values["forget_quality"]
    assert value.value == pytest.approx(1e-5)
    assert 0 < value.lower < value.value < value.upper <= 1


@pytest.mark.parametrize("make", [fake_muse, fake_tofu])
def test_nan_everywhere_and_no_references(make, tmp_path: Path) -> None:
    for results in ([all_nan(make("a")), all_nan(make("b"))], [alone(make())]):
        found = compare(results)
        found.to_html(tmp_path / "compare.html")
        assert found.to_latex() and found.to_csv()
        json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(UserError, match="no trade-off"):
        compare([all_nan(make())]).to_png(tmp_path / "plot.png")


def test_the_page_escapes_and_shows_no_text(tmp_path: Path) -> None:
    found = compare([fake_muse(HOSTILE), fake_muse(LONG_LABEL, 1)])
    found.to_html(tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and SECRET not in text
    assert text.count("<img") == 1 and "On the Pareto front" in text


def test_the_command_reads_and_writes_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        fake_tofu(name).write(tmp_path / name / "results.json")
    outs = [tmp_path / "one", tmp_path / "two" / "results.json"]
    paths = {name: tmp_path / f"out.{name}" for name in ("csv", "latex", "html", "plot")}
    found = compare_command(outs, **paths)
    assert paths["csv"].read_text() == found.to_csv()
    assert paths["latex"].read_text() == found.to_latex()
    assert paths["html"].read_text().startswith("<!DOCTYPE html>")
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no directory"):
        compare_command(outs, csv=tmp_path / "nowhere" / "a.csv")
    with pytest.raises(UserError, match="cannot read"):
        compare_command([tmp_path / "three"])
