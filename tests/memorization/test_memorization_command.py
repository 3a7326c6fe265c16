"""`llm-unlearn memorization` as a person and a machine see it."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.exact.record_scores import RunTables
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.record_tables import make_table
from tests.saying import Say, in_json, one_line
from tests.tiny import load_tiny, make_rows, make_run

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
