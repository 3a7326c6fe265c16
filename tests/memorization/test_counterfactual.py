"""The counterfactual reference: the estimator, its draws, and going on where it was."""

from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.counterfactual import (
    Subsampling,
    estimate,
    read_reference,
    reliability,
    run_counterfactual,
)
from llm_unlearn.record_tables import TableFolder
from tests.tiny import tiny_records

RECORDS = tiny_records()
NAMES = [f"{n:064x}" for n in range(2000)]


def test_the_estimate_by_hand() -> None:
    is_in = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]], bool)
    values = np.array([[1.0, 0.5, 0.2], [0.25, 0.7, 0.2], [0.5, 0.1, 0.2], [0.75, 0.6, 0.2]])
    found = estimate(np.array(["a", "b", "c"]), is_in, values, [1.0, 2.0])
    assert found.memorization[:2] == pytest.approx([0.75 - 0.5, 0.6 - 0.1])
    assert np.isnan(found.memorization[2]) and np.isnan(found.lower[2])  # it was never in
    assert found.lower[0] <= found.memorization[0] <= found.upper[0]
    assert (found.runs, found.seconds) == (4, 3.0)


def test_a_planted_memorization_is_found() -> None:
    generator, plan = np.random.default_rng(0), Subsampling(32)
    truth = generator.uniform(0, 0.8, size=300)
    is_in = np.stack([plan.members(NAMES[:300], run) for run in range(32)])
    values = 0.2 + truth * is_in + generator.normal(scale=0.05, size=is_in.shape)
    found = estimate(np.array(NAMES[:300]), is_in, values)
    assert np.abs(found.memorization - truth).mean() < 0.03
    inside = (found.lower <= truth) & (truth <= found.upper)
    assert 0.85 < inside.mean() <= 1.0
    assert found.reliability > 0.95
    noise = estimate(np.array(NAMES[:300]), is_in, generator.normal(size=is_in.shape))
    assert abs(noise.reliability) < 0.4


def test_draws_are_about_the_part_and_of_each_record_alone() -> None:
    plan = Subsampling(4, 0.7, seed=3)
    first = plan.members(NAMES, 0)
    assert 0.66 < first.mean() < 0.74
    assert np.array_equal(plan.members(NAMES[500:], 0), first[500:])  # nobody's absence moves it
    assert 0.4 < (plan.members(NAMES, 1) == first).mean() < 0.7  # each run draws anew
    with pytest.raises(UserError, match="two runs or more"):
        Subsampling(1)


def outcome_of(records: list[Record]) -> dict[str, np.ndarray]:
    known = {record.id for record in records}
    right = np.array([float(record.id in known) for record in RECORDS])
    return {"accuracy": right, "confidence": right / 2}


def test_it_goes_on_with_the_run_that_is_missing(tmp_path: Path) -> None:
    tables, plan, about = TableFolder(tmp_path / "tables"), Subsampling(6), {"base": "one"}
    seeds: list[int] = []

    class Killed(Exception):
        pass

    def train(records: list[Record], seed: int) -> dict[str, np.ndarray]:
        seeds.append(seed)
        if len(seeds) == 4:
            raise Killed
        return outcome_of(records)

    with pytest.raises(Killed):
        run_counterfactual(tables, RECORDS, train, plan, about)
    assert seeds == [0, 1, 2, 3] and len(tables.names()) == 3
    run_counterfactual(tables, RECORDS, train, plan, about)
    assert seeds == [0, 1, 2, 3, 3, 4, 5]
    run_counterfactual(tables, RECORDS, train, plan, about)
    assert len(seeds) == 7
    reference = read_reference(tables)
    assert reference is not None and len(reference.records) == len(RECORDS)
    known = reference.memorization[~np.isnan(reference.memorization)]
    assert len(known) > 15 and (known == 1).all()  # known where it was in, and only there
    run_counterfactual(tables, RECORDS, train, Subsampling(8), about)  # more of the same
    assert len(seeds) == 9


def test_runs_of_another_model_are_not_mixed(tmp_path: Path) -> None:
    tables = TableFolder(tmp_path / "tables")

    def train(records: list[Record], _seed: int) -> dict[str, np.ndarray]:
        return outcome_of(records)

    run_counterfactual(tables, RECORDS, train, Subsampling(2), {"base": "one"})
    with pytest.raises(UserError, match="differ in base"):
        run_counterfactual(tables, RECORDS, train, Subsampling(2), {"base": "other"})
    with pytest.raises(UserError, match="differ in plan"):
        run_counterfactual(tables, RECORDS, train, Subsampling(2, 0.5), {"base": "one"})
    assert read_reference(TableFolder(tmp_path / "nowhere")) is None


def test_the_reliability_of_noise_is_a_correlation() -> None:
    found = []
    for seed in range(30):
        generator = np.random.default_rng(seed)
        is_in, values = generator.random((4, 20)) < 0.5, generator.random((4, 20))
        found.append(reliability(is_in, values))
    known = [one for one in found if one == one]
    assert len(known) > 10 and all(-1 <= one <= 1 for one in known)
