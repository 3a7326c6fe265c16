"""The report: complete, escaped, redacted, self-contained, and made of NaN just as well."""

import base64
import dataclasses
import html
import json
import math
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_results import HOSTILE, LONG_LABEL, SECRET, all_nan, alone, fake_muse, fake_tofu

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation import catalogue
from llm_unlearn.evaluation.catalogue import (
    METRICS,
    as_share,
    closeness,
    describe,
    format_number,
    in_percent,
)
from llm_unlearn.evaluation.report import examples, metric_row, redact, write_report
from llm_unlearn.evaluation.results import Check, Results, Value

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Tags in order, and whether every element was closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(results: Results, folder: Path, show_text: bool = False) -> str:
    write_report(results, folder / "report.html", show_text)
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("make", [fake_muse, fake_tofu])
def test_the_page_is_whole_and_holds_everything(make, tmp_path: Path) -> None:
    results = make()
    text = written(results, tmp_path)
    page = Page(text)
    assert page.open == []
    for check in results.checks:
        assert check.verdict in page.text and check.reason in page.text
    for name in results.model.values:
        assert describe(name).title in page.text
    wanted = [results.verdict, results.suite, results.profile, results.model.label, "81"]
    wanted += [results.model.digest, *results.digests.values(), *results.versions]
    wanted += ["min_k", "2.33 GiB", "120,000"]
    assert [each for each in wanted if each not in page.text] == []
    assert text.index("Verdict:") < text.index("<h2>Metrics") < text.index("<img")
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == (5 if make is fake_muse else 4)
    for source in images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o600


def test_the_page_needs_no_script_and_no_network(tmp_path: Path) -> None:
    page = Page(written(fake_muse(), tmp_path, show_text=True))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert value.startswith("data:image/svg+xml;")
    assert not re.search(r"url\(|@import", written(fake_muse(), tmp_path))


@pytest.mark.parametrize("show_text", [False, True])
def test_what_a_model_or_a_path_says_is_never_markup(show_text: bool, tmp_path: Path) -> None:
    results = fake_muse(label=HOSTILE)
    results.verdict = results.suite = HOSTILE
    results.checks.append(Check(HOSTILE, HOSTILE, HOSTILE))
    results.model.values[HOSTILE] = Value(0.5, note=HOSTILE, detail={HOSTILE: 1.0})
    results.others[HOSTILE] = dataclasses.replace(results.others["before"], role=HOSTILE)
    results.curves[HOSTILE] = [Value(0.1, note=HOSTILE), Value(0.2, note=HOSTILE)]
    results.configuration[HOSTILE] = HOSTILE
    results.digests[HOSTILE] = results.versions[HOSTILE] = HOSTILE
    text = written(results, tmp_path, show_text)
    assert "<script" not in text and "49" not in Page(text).text.split("Configuration")[0][:200]
    assert html.escape(HOSTILE, quote=False).split(" ")[0].split("'")[0] in text
    assert Page(text).open == []
    assert HOSTILE in Page(text).text  # shown as it is, not evaluated


def test_personal_text_is_redacted_unless_asked_for(tmp_path: Path) -> None:
    text = written(fake_muse(), tmp_path)
    assert SECRET not in text and "Zebulon" not in text and "Where?" not in text
    assert f"redacted ({len(SECRET.split())} words)" in text
    shown = written(fake_muse(), tmp_path, show_text=True)
    assert SECRET in shown and "Where?" in shown  # the control
    assert "redacted" not in shown
    assert redact("") == "redacted (0 words)" and redact(" one ") == "redacted (1 word)"


def test_personal_text_is_not_inside_the_plots_either(tmp_path: Path) -> None:
    for data in re.findall(r"base64,([^\"]+)", written(fake_muse(), tmp_path, show_text=True)):
        assert b"Zebulon" not in base64.b64decode(data)


def test_examples_are_few_and_the_largest_change_comes_first() -> None:
    results = fake_muse()
    columns = results.model.records["knowmem/forget_qa"]
    columns["rougeL_f1"] = np.zeros(20)
    before = np.linspace(0, 0.5, 20)
    before[3], before[7] = 1.0, math.nan
    results.others["before"].records["knowmem/forget_qa"]["rougeL_f1"] = before
    found = examples(results, show_text=False)
    assert [each.row for each in found[:3]] == [3, 19, 18]
    assert len(found) == 12 and 7 not in [each.row for each in found]
    assert [role for role, _, _ in found[0].answers] == ["before", "model", "retrained"]
    assert [number for _, number, _ in found[0].answers][:2] == ["1", "0"]
    assert found == examples(results, show_text=False)


def test_examples_without_scores_or_references_stay_in_order() -> None:
    results = alone(fake_muse())
    results.model.records = {}
    found = examples(results, show_text=True)
    assert [each.row for each in found] == list(range(12))
    assert [role for role, _, _ in found[0].answers] == ["model"]
    results.model.texts = []
    assert examples(results, show_text=True) == []


@pytest.mark.parametrize("make", [fake_muse, fake_tofu])
def test_nothing_scored_is_a_dash_never_a_zero(make, tmp_path: Path) -> None:
    results = all_nan(make())
    page = Page(written(results, tmp_path))
    assert page.open == [] and "too long" in page.text
    row = metric_row(results, next(iter(results.model.values)), ["retrained", "before"])
    assert (row.value.split()[0], row.interval, row.difference) == ("–", "", "")
    assert row.others == ["–", "–"] and row.unscorable == 9


def test_a_model_without_references_or_anything_else(tmp_path: Path) -> None:
    results = alone(fake_tofu())
    assert Page(written(results, tmp_path)).open == []
    empty = dataclasses.replace(
        results,
        model=dataclasses.replace(results.model, values={}, records={}, texts=[], cost={}),
        checks=[], curves={}, configuration={}, digests={}, versions={}, verdict="",
    )  # fmt: skip
    text = Page(written(empty, tmp_path)).text
    assert "No checks were made" in text and "No texts were kept" in text


def test_a_row_shows_value_interval_and_paired_difference() -> None:
    row = metric_row(fake_muse(), "forget_knowmem", ["retrained", "before"])
    assert (row.value, row.interval, row.n, row.unscorable) == ("0.220", "[0.180, 0.260]", 100, 2)
    assert row.others == ["0.280", "0.590"]
    assert row.difference == "-0.060 [-0.110, -0.010]"
    assert row.arrow == "≈" and "D = 0.25" in row.note
    assert metric_row(fake_muse(), "privleak", []).value == "-38.0 %"


def test_results_read_back_from_disk_report_the_same(tmp_path: Path) -> None:
    results = fake_muse(texts=False)
    results.model.cost["peak_memory_bytes"] = math.nan
    again = Results.from_dict(json.loads(json.dumps(results.to_dict())))
    assert written(again, tmp_path) == written(results, tmp_path)


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    results = fake_muse(label="half \ud83d")
    assert "half ?" in written(results, tmp_path)


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory"):
        write_report(fake_tofu(), tmp_path / "nowhere" / "report.html")


def test_every_metric_is_described() -> None:
    for name, info in METRICS.items():
        assert info.title and info.formula and info.source, name
        assert info.low < info.high, name
        assert info.direction in catalogue.ARROWS
        if name.startswith(("forget_", "mia_")) and name != "forget_quality":
            assert info.direction == "retrained", name
        if name.startswith(("retain_", "real_authors_", "world_facts_", "model_utility")):
            assert info.direction == "higher", name
    assert describe("forget_something").direction == "retrained"
    assert describe("something_new").title == "Something new"
    assert describe("").title == ""


def test_every_metric_of_the_suites_is_in_the_catalogue() -> None:
    from llm_unlearn.evaluation.suites import muse, tofu

    assert set(muse.METRICS) | set(tofu.METRICS) <= set(METRICS)


def test_numbers_and_scales() -> None:
    assert format_number("forget_quality", 1.83e-21) == "1.8e-21"
    assert format_number("forget_knowmem", 0.4123) == "0.412"
    assert format_number("forget_knowmem", 41.23, "muse") == "41.2"
    assert format_number("privleak", -0.01) == "0.0"
    assert format_number("privleak", math.nan) == "–"
    assert format_number("privleak", -math.inf) == "-∞"
    assert not in_percent("mia_min_k", "muse") and not in_percent("model_utility", "muse")
    assert as_share("forget_knowmem", 41.0, "muse") == pytest.approx(0.41)
    assert as_share("privleak", -38.0, "default") == pytest.approx(-0.38)


def test_closeness_to_the_retrained_model() -> None:
    assert closeness("forget_knowmem", 0.28, 0.28, "default") == 1
    # Below the retrained model is as far as above it.
    below, above = (closeness("forget_knowmem", v, 0.3, "default") for v in (0.1, 0.5))
    assert below == pytest.approx(above) == pytest.approx(0.8)
    assert closeness("forget_knowmem", 10, 30, "muse") == pytest.approx(0.8)
    assert closeness("privleak", -38, 0, "default") == pytest.approx(0.62)
    assert closeness("privleak", 109, 0, "default") == 0
    assert closeness("retain_knowmem", 0.34, 0.68, "default") == pytest.approx(0.5)
    assert closeness("retain_knowmem", 0.9, 0.68, "default") == 1
    assert math.isnan(closeness("retain_knowmem", 0.9, 0.0, "default"))
    assert math.isnan(closeness("forget_knowmem", math.nan, 0.3, "default"))


def test_a_long_label_is_shown_whole_in_the_text(tmp_path: Path) -> None:
    assert LONG_LABEL in Page(written(fake_muse(), tmp_path)).text
