"""`llm-unlearn memorization` as a person and a machine see it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.exact.record_scores import RunTables
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.memorizing.findings import Findings, findings_of, plot_histograms
from llm_unlearn.memorizing.scoring import Scored
from llm_unlearn.memorizing.targets import LoadedTarget
from llm_unlearn.record_tables import TableFolder, make_table
from tests.saying import Say, in_json, one_line
from tests.tiny import load_tiny, make_rows, make_run, tiny_records

LEARNT = ["confidence", "entropy", "accuracy", "strict_accuracy", "el2n"]


@pytest.fixture(scope="module")
def tracked(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memorization") / "run"
    run = make_run(path, tiny_base, train=False, num_slices=2, num_sequences=1, max_steps=12)
    run.train(*load_tiny(tiny_base), track=Observations)
    return path


def test_a_table_a_histogram_and_nobody_named(say: Say, tracked: Path) -> None:
    code, text, error = say("memorization", tracked, "--most", 4)
    assert (code, error) == (0, "") or "Loading" in error
    assert "24 records, higher = more memorized" in text
    assert all(name in text for name in LEARNT) and "█" in text
    assert "person" not in text and "dish" not in text and "--show_text" in text
    shown = say("memorization", tracked, "--most", 4, "--show_text")[1]
    assert "person" in shown


def test_machines_get_the_same_without_texts(say: Say, tracked: Path) -> None:
    told = in_json(say("memorization", tracked, "--json"))
    assert [line["name"] for line in told["scores"]] == LEARNT
    assert told["records"] == 24 and sum(told["histogram"]["counts"]) == 24
    values = [row["confidence"] for row in told["most_memorized"]]
    assert len(values) == 10 and values == sorted(values, reverse=True)
    assert "person" not in json.dumps(told)
    shown = in_json(say("memorization", tracked, "--json", "--show_text"))
    assert shown["most_memorized"][0]["subject"].startswith("person")


def test_agreement_with_the_reference(say: Say, tracked: Path) -> None:
    run = S3TRun.open(tracked)
    directory, tables = run.directory, RunTables(run.directory)
    records = [r for name in directory.slices.names for r in directory.slices.read(name)]
    generator = np.random.default_rng(0)
    with directory.changing("testing"):
        for number in range(6):
            is_in = generator.random(len(records)) < 0.7
            value = np.where(is_in, 0.9, generator.random(len(records)))
            columns = {"is_in": is_in, "accuracy": value, "confidence": value}
            about = {"kind": "counterfactual", "seconds": 1.5}
            made = make_table(directory.key, records, columns, about)
            tables.write(f"counterfactual-{number:03d}", made)
    told = in_json(say("memorization", tracked, "--json"))
    (line,) = [one for one in told["scores"] if one["name"] == "confidence"]
    assert line["agreement"]["lower"] <= line["agreement"]["rho"] <= line["agreement"]["upper"]
    assert told["reference"]["runs"] == 6 and told["reference"]["seconds"] == 9.0
    assert "reference: 6 runs, 9 s" in say("memorization", tracked)[1]
    for path in tables.path.glob("counterfactual-*"):
        path.unlink()


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
def test_measured_afterwards_kept_and_gone_with_a_deletion(
    encrypt: bool, say: Say, tiny_base: Path, tmp_path: Path
) -> None:
    path, held = tmp_path / "run", tmp_path / "held.jsonl"
    make_run(path, tiny_base, num_shards=2, num_slices=1, num_sequences=1, encrypt=encrypt)
    held.write_text("".join(json.dumps(row) + "\n" for row in make_rows(4, 2, "stranger")))
    asked = ("memorization", path, "--scores", "holdout", "--scores", "gain", "--scores", "curvature",
             "--holdout", held, "--json")  # fmt: skip
    told = in_json(say(*asked, "--plot", tmp_path / "plot.png"))
    assert [line["name"] for line in told["scores"]] == ["holdout", "gain", "curvature"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    run = S3TRun.open(path)
    assert len(RunTables(run.directory).read("scores")) == 24
    in_json(say("memorization", path, "--scores", "confidence", "--json"))  # written again
    assert all(check.passed for check in run.verify())
    run.delete(["person 3"])
    assert len(RunTables(run.directory).read("scores")) == 22
    assert all(check.passed for check in run.verify())
    assert in_json(say(*asked))["records"] == 22


def test_the_reference_of_a_run_is_trained_with_its_own_flags(
    say: Say, tiny_base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    run = make_run(path, tiny_base, train=False, num_slices=1, num_sequences=1, max_steps=3)
    run.train(*load_tiny(tiny_base), track=Observations)
    told = in_json(say("memorization", path, "--counterfactual", 3, "--json"))
    assert told["reference"]["runs"] == 3
    assert len(list((path / "memorization").glob("counterfactual-*.parquet"))) == 3
    assert not (path / "trainer" / "counterfactual").exists()
    assert all(check.passed for check in run.verify())
    run.delete(["person 3"])
    assert "on other records than there are now" not in say("memorization", path, "--json")[2]


def test_mistakes_are_one_line(say: Say, tracked: Path, tmp_path: Path, tiny_base: Path) -> None:
    nowhere = one_line(say("memorization", tmp_path / "nothing"), 2)
    assert "is no run and no model's directory" in nowhere
    assert "Give --records" in one_line(say("memorization", tiny_base), 2)
    unknown = one_line(say("memorization", tracked, "--scores", "loss"), 2)
    assert "unknown score 'loss'" in unknown
    both = one_line(say("memorization", tracked, "--records", "x.jsonl"), 2)
    assert "x.jsonl" in both or "leave --records out" in both
    assert "no counterfactual runs" in one_line(
        say("memorization", tracked, "--scores", "counterfactual"), 2
    )
    few = one_line(say("memorization", tracked, "--counterfactual", 1), 2)
    assert "two runs or more" in few
    part = one_line(say("memorization", tracked / "served" / "shard-0"), 2)
    assert "is a part of the run" in part and not list((tracked / "served").rglob("*.parquet"))
    held = ("memorization", tracked, "--scores", "holdout")
    assert "give --holdout" in one_line(say(*held), 2)
    nowhere = say("memorization", tracked, "--plot", tmp_path / "nowhere" / "plot.png")
    assert "cannot write --plot" in one_line(nowhere, 2)


@pytest.mark.parametrize("name", ["scores", "counterfactual-000", "node"])
@pytest.mark.parametrize("is_garbage", [True, False], ids=["garbage", "other columns"])
def test_a_spoilt_table_is_one_line(
    name: str, is_garbage: bool, say: Say, tracked: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(tracked, path, symlinks=True)
    run = S3TRun.open(path)
    tables, records = RunTables(run.directory), tiny_records()
    name = next(iter(run.directory.nodes.keys())) if name == "node" else name
    tables.write(name, make_table(run.directory.key, records, {}, {}))
    if is_garbage:
        (path / "memorization" / f"{name}.parquet").write_bytes(b"garbage")
    said = one_line(say("memorization", path, "--scores", "confidence", "--scores", "gain"), 1)
    assert f"{name}.parquet cannot be read" in said and "measure again" in said


def test_a_model_and_its_records(say: Say, tiny_base: Path, tmp_path: Path) -> None:
    model, records = tmp_path / "model", tmp_path / "records.jsonl"
    shutil.copytree(tiny_base, model)
    records.write_text(json.dumps({"text": "A single record"}))
    code, text, error = say("memorization", model, "--records", records)
    assert code == 0 and "nan" not in text and "1 records" in text and "of the finished" in error
    told = in_json(say("memorization", model, "--records", records, "--json"))
    assert told["records"] == 1 and told["scores"][0]["middle"] is None
    shutil.rmtree(model / "memorization")
    (model / "memorization").write_text("in the way")
    one_line(say("memorization", model, "--records", records), 1)


def test_values_that_differ_by_a_rounding_have_a_histogram(tmp_path: Path) -> None:
    values = np.array([-1.0, -1.0 + 2e-16, -1.0])
    records = tiny_records()[:3]
    target = LoadedTarget(None, None, records)
    target.tables = TableFolder(tmp_path / "memorization")
    found = findings_of(target, Scored({"accuracy": values}, np.ones(3)))
    assert sum(found.histogram()[0]) == 3 and len(found.bars()) == 12
    plot_histograms(found, tmp_path / "plot.png")


def test_close_values_have_labels_of_their_own() -> None:
    values = np.linspace(0.99900, 0.99901, 24)
    found = Findings("run", [], [], Scored({"gain": values}, values), [], "gain", values, None)
    labels = [bar.split("  ")[0] for bar in found.bars()]
    assert len(set(labels)) == 12


def test_two_runs_tell_little_and_the_named_score_sorts(
    say: Say, tracked: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(tracked, path, symlinks=True)
    directory = S3TRun.open(path).directory
    records, tables = tiny_records(), RunTables(directory)

    def write(is_in: list[bool]) -> None:
        for number, one in enumerate(is_in):
            value = np.linspace(0, 1, len(records)) if one else np.zeros(len(records))
            columns = {"is_in": np.full(len(records), one), "accuracy": value}
            made = make_table(directory.key, records, columns, {"seconds": 1.0})
            tables.write(f"counterfactual-{number:03d}", made)

    write([True, True])
    code, text, error = say("memorization", path)
    assert code == 0 and "in all runs or in none" in error and "nan" not in text
    write([True, False])
    told = in_json(say("memorization", path, "--scores", "counterfactual", "--json"))
    assert told["sorted_by"] == "counterfactual"
    assert told["most_memorized"][0]["counterfactual"] == 1.0
    assert "nan" not in say("memorization", path)[1]
