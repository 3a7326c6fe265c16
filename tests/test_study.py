"""The study: its table, its aims, its page from made-up numbers, and a tiny one from end to end."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_unlearn.console import study_progress
from llm_unlearn.data.records import make_records
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.statistics import Interval
from llm_unlearn.exact.arguments import AGGREGATES, PRESETS
from llm_unlearn.study import configurations, measuring, running
from llm_unlearn.study.aims import AIMS, is_judged
from llm_unlearn.study.configurations import CONFIGURATIONS, SERVED, TRAINING, epochs, flags_of
from llm_unlearn.study.measuring import sections_of
from llm_unlearn.study.page import Table, headline, summary, write_study
from llm_unlearn.study.plan import Study
from llm_unlearn.study.results import Key, Results, read_measurements, summarise
from llm_unlearn.study.running import run_study
from llm_unlearn.study.worlds import World, demonstration_world, load_world, model_for, tofu_world
from tests.test_recipes import TOFU, load_recipe
from tests.tiny import make_rows

ABOUT = {
    "world": "demonstration", "model": "m", "subjects": 6, "score": "exact", "public": ["public people"],
}  # fmt: skip


def test_every_row_of_the_table_can_be_trained_and_served() -> None:
    names = [one.name for one in CONFIGURATIONS]
    assert len(set(names)) == len({one.slug for one in CONFIGURATIONS}) == len(names)
    for one in CONFIGURATIONS:
        assert one.flags.get("exact_method", "s3t") in PRESETS
        assert {SERVED[served]["aggregate"] for served in one.served} <= set(AGGREGATES)
        for world in TRAINING:
            flags, lora = flags_of(one, world, 48, {})
            assert flags["num_train_epochs"] > 0 and lora["lora_alpha"] == 2 * lora["lora_r"]


def test_budgets_are_equal_and_flags_win() -> None:
    assert epochs(60, 1) == 60
    # Four stages on 1/4, 2/4, 3/4 and 4/4 of the data.
    assert sum(epochs(60, 4) * part / 4 for part in (1, 2, 3, 4)) == pytest.approx(60)
    experts = next(one for one in CONFIGURATIONS if one.name == "experts")
    flags, lora = flags_of(experts, "demonstration", 48, {"passes": 5, "learning_rate": 1.0})
    assert (flags["num_shards"], flags["num_train_epochs"], flags["learning_rate"]) == (12, 5, 1.0)
    assert lora["lora_r"] == 8


def test_references_come_with_whatever_is_chosen() -> None:
    chosen = [one.name for one in configurations.select(["experts"], small=True)]
    assert chosen == ["base model", "experts"]
    small = configurations.select([], small=True)
    assert len(small) < len(configurations.select([], small=False)) == len(CONFIGURATIONS)
    with pytest.raises(UserError, match="one of base model, plain LoRA"):
        configurations.select(["nothing"], small=False)


def made_up(**cells: dict[str, float]) -> Results:
    """Results from `<configuration>/<served>/<deletions>` to numbers without intervals."""
    found = {}
    for place, numbers in cells.items():
        configuration, served, deletions = place.split("/")
        found[Key(configuration, served, int(deletions))] = {
            name: Interval(value, math.nan, math.nan, 1, 0) for name, value in numbers.items()
        }
    return Results(ABOUT, found)


MADE_UP = made_up(
    **{
        "plain LoRA/average/0": {"retained named exact": 1.0},
        "plain LoRA/select/0": {"retained named exact": 0.9},
        "experts/select/0": {
            "retained named exact": 0.9, "stayed exact": 0.8, "inference_ratio": 1.5, "shift": 0.25,
        },
        "experts/select/5": {"stayed exact": 0.796, "deletion_seconds": 0.5},
        "S3T/average/0": {"retained named exact": 0.89, "stayed exact": 1.0},
    }
)  # fmt: skip


def test_aims_are_lines_and_what_is_missing_is_not_judged() -> None:
    experts, s3t, plain = ("experts", "select"), ("S3T", "average"), ("plain LoRA", "select")
    verdicts = {name: aim.verdict(MADE_UP, experts) for name, aim in AIMS.items()}
    # Exactly the gate's 0.9; 0.796 / 0.8; half a second; 1.5 is not below 1.5.
    assert verdicts == {"before": True, "kept": True, "deletion": True, "inference": False}
    assert {name: aim.verdict(MADE_UP, s3t) for name, aim in AIMS.items()} == {
        "before": False, "kept": None, "deletion": None, "inference": None,
    }  # fmt: skip
    assert is_judged(experts) and not is_judged(plain) and not is_judged(("gone", "average"))


def test_the_headline_marks_aims_and_shows_dashes() -> None:
    table = headline(MADE_UP)
    by_name = {row[0].text: [cell.text for cell in row] for row in table.rows}
    row = dict(zip(table.columns, by_name["experts: select"], strict=True))
    assert (row["0 deleted"], row["5 deleted"]) == ("90 ✓", "–")
    assert (row["kept, %"], row["deletion, s"], row["inference"]) == ("99.5 ✓", "0.5 ✓", "1.5 ✗")
    assert (row["loss there"], row["MB"]) == ("+0.25", "–")
    assert by_name["S3T: average"][1] == "89 ✗"
    assert by_name["plain LoRA: average"][1] == "100"
    styles = {cell.style for line in table.rows for cell in line}
    assert styles == {"", "good", "bad"}


def test_intervals_are_shown_where_there_are_several_seeds() -> None:
    cell = {"retained named exact": Interval(0.9, 0.85, 0.95, 3, 0)}
    results = Results(ABOUT, {Key("S3T", "average", 0): cell})
    assert headline(results).rows[0][1].text == "90 ± 5"


def test_markdown_has_as_many_cells_as_columns() -> None:
    text = summary(MADE_UP)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(MADE_UP.rows)
    assert Table("", "", ("a", "b"), ()).to_markdown() == "| a | b |\n|---|---:|"


@pytest.mark.parametrize("results", [MADE_UP, Results(ABOUT, {})], ids=["some", "nothing"])
def test_the_page_is_written_from_whatever_is_there(results: Results, tmp_path: Path) -> None:
    paths = write_study(results, tmp_path, "accelerate launch <script>")
    page = paths[1].read_text()
    assert "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")
    assert ("experts: select" in page) == bool(results.cells)
    assert json.loads(paths[0].read_bytes())["study"]["world"] == "demonstration"


def test_the_demonstration_asks_about_everybody_in_three_wordings() -> None:
    world = demonstration_world(6)
    gone = world.subjects[:2]
    sections = sections_of(world, set(gone))
    sizes = {name: len(section.rows) for name, section in sections.items()}
    assert sizes == {
        **{f"retained/{wording}": 24 for wording in ("named", "paraphrased", "name_free")},
        **{f"orphans/{wording}": 12 for wording in ("named", "paraphrased", "name_free")},
        "public/public people": 288, "holdout": 288, "truth": 12,
    }  # fmt: skip
    assert not any(gone[0] in row["question"] for row in sections["orphans/name_free"].rows)
    assert not {row["subject"] for row in sections["retained/named"].rows} & set(gone)
    assert "truth" not in sections_of(world, set())
    assert world.facts({gone[0]}) == [row["answer"] for row in world.about({gone[0]})]


@pytest.mark.skipif(not TOFU.exists(), reason="the TOFU files are not beside the project")
def test_tofu_asks_in_other_words_where_the_benchmark_does() -> None:
    world = tofu_world(TOFU.parent, 22)
    assert len(world.subjects) == 22 and len(world.records) == 440
    assert "Jaime Vasquez" in world.names(set(world.subjects))
    sections = sections_of(world, {world.subjects[0], world.subjects[21]})
    assert len(sections["retained/named"].rows) == 20 * 10
    assert len(sections["orphans/named"].rows) == 40  # all rows of whom is forgotten
    assert len(sections["truth"].rows) == 20  # the 22nd author has no wrong answers
    assert set(world.public) == {"real authors", "world facts", "other authors"}
    with pytest.raises(UserError, match="cannot be private"):
        tofu_world(TOFU.parent, 201)


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tofu_base\.py"):
        model_for("tofu", None)
    with pytest.raises(UserError, match="no such dataset file"):
        load_world("tofu", 5, tmp_path)


def tiny_world() -> World:
    rows = make_rows(6, 2)
    questions = [
        {
            "subject": row["subject"],
            "name": row["subject"],
            "question": row["prompt"],
            "answer": row["completion"].strip(),
            "paraphrased_question": "So " + row["prompt"],
            "paraphrased_answer": "it is " + row["completion"].strip(),
            "perturbed_answer": ["dish nine", "dish ten"],
        }
        for row in rows
    ]
    strangers = [
        {"question": row["prompt"], "answer": row["completion"].strip()}
        for row in make_rows(3, 1, prefix="stranger")
    ]
    return World(
        name="demonstration", records=make_records(rows, subject_column="subject"), rows=questions,
        public={"strangers": strangers}, holdout=strangers, template="plain", new_tokens=2, stemmer=False,
        score="probability",
    )  # fmt: skip


FEW_WAYS = {
    "base model": ("average",), "plain LoRA": ("average", "select"), "retrained plain LoRA": ("average",),
    "experts": ("average", "mixture"), "experts, rebuilt": ("mixture",),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A whole study of three configurations."""
    study = Study(
        output=tmp_path_factory.mktemp("study"), world=tiny_world(), model=str(tiny_base),
        configurations=[
            dataclasses.replace(one, served=FEW_WAYS[one.name])
            for one in CONFIGURATIONS
            if one.name in FEW_WAYS
        ],
        seeds=1, deletions=[0, 3], overrides={"passes": 1, "learning_rate": 1e-2},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, study_progress(enabled=False) as progress:
        patch.setattr(measuring, "REPETITIONS", 1)
        assert run_study(study, progress) == []
    return study


def test_everything_is_measured_with_the_same_people_deleted(finished: Study) -> None:
    found = read_measurements(finished.output)
    assert len(found) == 2 + 2 * 2 + 1 + 2 * 2 + 1  # nothing is retrained or rebuilt before
    assert len({tuple(m.content["deleted"]) for (key, _), m in found.items() if key[2]}) == 1
    experts = found[Key("experts", "average", 0), 0]
    assert experts.content["costs"]["alone_seconds"] > 0
    assert experts.mean("retained/named", "by_own") == pytest.approx(0.5)  # of two shards
    assert not list(finished.output.glob("runs/*/*/*after-*"))  # copies are not kept


def test_what_lost_everything_answers_as_the_base(finished: Study) -> None:
    results = summarise(finished.output)
    plain, base = ("plain LoRA", "average"), ("base model", "average")
    for name in ("retained named probability", "orphans paraphrased rouge", "public probability"):
        one, other = (results.get(row, 3, name).mean for row in (plain, base))
        assert one == pytest.approx(other)
    assert results.get(plain, 3, "orphans kl base").mean == pytest.approx(0.0, abs=1e-6)
    assert results.get(plain, 3, "bystanders").mean == 3  # one slice is everybody's
    assert results.get(plain, 0, "shift").mean != 0
    retrained = ("retrained plain LoRA", "average")
    assert results.get(retrained, 3, "deletion_seconds").mean > 0
    assert 0 <= results.get(plain, 3, "forget quality").mean <= 1
    assert math.isfinite(results.get(plain, 3, "privleak").mean)
    assert results.get(retrained, 3, "orphans kl retrained").mean == 0


def test_a_rebuild_brings_the_bystanders_back_and_costs_time(finished: Study) -> None:
    results = summarise(finished.output)
    lost, rebuilt = ("experts", "average"), ("experts, rebuilt", "mixture")
    assert results.get(rebuilt, 3, "kept_bytes").mean > results.get(lost, 3, "kept_bytes").mean
    assert (
        results.get(rebuilt, 3, "deletion_seconds").mean
        > results.get(lost, 3, "deletion_seconds").mean
    )
    before = results.get(("experts", "mixture"), 0, "retained named probability").mean
    assert results.get(rebuilt, 0, "retained named probability").mean == before
    assert math.isfinite(results.get(("experts", "mixture"), 3, "orphans kl rebuilt").mean)


def test_a_second_call_trains_and_measures_nothing(
    finished: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(p for p in finished.output.rglob("*") if p.is_file())
    before = {path: path.stat().st_mtime_ns for path in paths if path.suffix != ".lock"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done before")

    for name in ("measure", "load_base"):
        monkeypatch.setattr(running, name, refuse)
    with study_progress(enabled=False) as progress:
        run_study(finished, progress)
    changed = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {finished.output / "study.json"}


def test_another_rule_is_measured_again_without_training(
    finished: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    kept = running.measure
    monkeypatch.setattr(running, "measure", lambda *a: asked.append("once") or kept(*a))
    monkeypatch.setitem(SERVED, "mixture", {"aggregate": "mixture", "margin": 0.1})
    nodes = {p: p.read_bytes() for p in finished.output.glob("runs/*/*/trained/nodes/*/*")}
    with study_progress(enabled=False) as progress:
        run_study(finished, progress)
    assert len(asked) == 3  # 0 and 3 deletions, and the rebuilt
    assert {p: p.read_bytes() for p in nodes} == nodes


def test_another_study_and_impossible_numbers_are_refused(finished: Study) -> None:
    with pytest.raises(UserError, match="holds another study"):
        dataclasses.replace(finished, overrides={"passes": 2}).claim()
    for deletions in ([], [6], [-1]):
        with pytest.raises(UserError, match="numbers from 0 to 5"):
            dataclasses.replace(finished, deletions=deletions).check()


def test_what_another_process_is_at_is_left_to_it(finished: Study) -> None:
    from filelock import FileLock

    with (
        FileLock(finished.output / "runs" / "experts" / "seed-0.lock"),
        study_progress(enabled=False) as progress,
    ):
        assert run_study(finished, progress) == ["experts, seed 0"]


def test_the_recipe_writes_the_page_again(
    finished: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("exact_study")
    recipe(["--report_only", "--output_dir", str(finished.output)])
    page = (finished.output / "study.html").read_text()
    assert "experts: mixture" in page and page.count("data:image/svg") == 2
    assert "6 subjects" in page and "exact_study.py --output_dir" in page
    assert "Does exact unlearning cost quality?" in capsys.readouterr().out
    numbers = json.loads((finished.output / "results.json").read_bytes())["cells"]
    named = [cell["values"]["retained named probability"]["mean"] for cell in numbers]
    assert np.isfinite(named).all()
    with pytest.raises(UserError, match="holds no study yet"):
        recipe(["--report_only", "--output_dir", str(tmp_path)])
