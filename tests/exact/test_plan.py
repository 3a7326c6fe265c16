"""Plans: cost, storage and capacity against numbers worked out by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llm_unlearn.exact.plan import count_nodes, make_plan, plan_table, plot_plan, training_cost
from llm_unlearn.exact.sequences import select_sequences


def test_the_plan_of_five_shards_four_slices_four_sequences() -> None:
    plan = make_plan(5, 4, 4, num_records=10_000, adapter_bytes=1_000_001)
    assert plan.deletions_until_retraining == pytest.approx(71.95, abs=0.01)
    assert plan.sisa_deletions_until_retraining == pytest.approx(45.67, abs=0.01)
    for estimate, expected in (
        (plan.simulated_deletions, 71.95),
        (plan.deletions_until_first_shard_dead, 19.35),
        (plan.deletions_until_half_depth, 14.05),
    ):
        assert abs(estimate.mean - expected) < 4 * estimate.standard_error + 0.05
        assert 0 < estimate.standard_error < 1
    assert (plan.aimed_deletions_first_shard, plan.aimed_deletions_all_shards) == (4, 20)
    assert plan.training_cost == pytest.approx(17.5 / 2)
    # 1.22 units per served request, the unit being half a fine-tune of one of five shards.
    assert plan.training_cost_per_deletion == pytest.approx(1.22 / 10, abs=5e-4)
    assert plan.num_nodes == 5 * 16
    assert plan.storage_bytes == 20 * 1_000_001
    assert plan.records_per_slice == 500
    assert (plan.forward_passes_per_token, plan.kv_caches) == (5, 5)


@pytest.mark.parametrize(
    ("slice_data", "blocks", "units"),
    [
        ("cumulative", "layers", 0.25 * 1.25 + 0.5 * 1.5 + 0.75 * 1.75 + 1 * 2),
        ("cumulative", "ranks", (0.25 + 0.5 + 0.75 + 1) * 2),
        ("disjoint", "layers", 0.25 * (1.25 + 1.5 + 1.75 + 2)),
        ("disjoint", "ranks", 2.0),
    ],
)
def test_cost_of_one_sequence(slice_data: str, blocks: str, units: float) -> None:
    assert training_cost([(0, 1, 2, 3)], slice_data, blocks) == pytest.approx(units / 2)
    # Sequences that share no prefix multiply the cost.
    cost = training_cost(select_sequences(4, 3), slice_data, blocks)
    assert cost == pytest.approx(3 * units / 2)


def test_shared_prefixes_are_trained_once() -> None:
    everything = select_sequences(4, 24)
    assert count_nodes(everything) == [4, 12, 24, 24]
    units = 4 * 0.25 * 1.25 + 12 * 0.5 * 1.5 + 24 * 0.75 * 1.75 + 24 * 1 * 2
    assert training_cost(everything) == pytest.approx(units / 2)
    assert count_nodes(select_sequences(6, 6)) == [6] * 6


def test_random_sequences_count_their_different_first_slices() -> None:
    plans = [make_plan(1, 4, 3, method="random", runs=2000, seed=seed) for seed in range(6)]
    assert min(plan.aimed_deletions_first_shard for plan in plans) < 3
    for plan in plans:
        error = plan.simulated_deletions.standard_error
        assert abs(plan.simulated_deletions.mean - plan.deletions_until_retraining) < 4 * error


def test_more_sequences_buy_availability_not_compute() -> None:
    plans = [make_plan(5, 4, budget, runs=500) for budget in (1, 2, 4)]
    deletions = [plan.deletions_until_retraining for plan in plans]
    costs = [plan.training_cost_per_deletion for plan in plans]
    assert deletions == sorted(deletions)
    assert costs == sorted(costs)


def test_storage_is_rounded_up_and_optional() -> None:
    assert make_plan(1, 3, 1, adapter_bytes=10, runs=2).storage_bytes == 10
    assert make_plan(1, 3, 2, adapter_bytes=10, runs=2).storage_bytes == 20
    # 64 nodes of a quarter adapter, 7 bytes each.
    assert make_plan(1, 4, 24, adapter_bytes=7, runs=2).storage_bytes == 112
    assert make_plan(1, 3, 1, adapter_bytes=7, runs=2).storage_bytes == 7
    assert make_plan(1, 3, 4, adapter_bytes=10, runs=2).storage_bytes == 37  # 11 nodes, 36.7
    plain = make_plan(1, 4, 2, runs=2)
    assert plain.storage_bytes is None
    assert plain.records_per_slice is None


def test_a_plan_is_json_and_reproducible() -> None:
    plan = make_plan(3, 4, 2, num_records=100, adapter_bytes=1000, runs=50, seed=3)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["num_shards"] == 3
    assert set(values["simulated_deletions"]) == {"mean", "standard_error"}
    assert plan == make_plan(3, 4, 2, num_records=100, adapter_bytes=1000, runs=50, seed=3)
    with pytest.raises(AttributeError):
        plan.num_shards = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_one_run_has_no_standard_error() -> None:
    assert math.isnan(make_plan(1, 2, 1, runs=1).simulated_deletions.standard_error)


def test_table_has_a_value_for_every_label() -> None:
    full = make_plan(5, 4, 4, num_records=1000, adapter_bytes=10**8, runs=50)
    rows = dict(plan_table(full))
    assert rows["deletions until retraining, expected"] == "72.0"
    assert rows["storage of the nodes"] == "2,000.0 MB"
    assert rows["nodes to train and store"] == "80"
    assert all(label and value for label, value in rows.items())
    short = plan_table(replace(full, storage_bytes=None, records_per_slice=None))
    assert len(short) == len(rows) - 2


@pytest.mark.parametrize(("num_slices", "num_sequences"), [(1, 1), (4, 4), (4, 24), (20, 7)])
def test_plot_is_a_png(num_slices: int, num_sequences: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    plot_plan(make_plan(5, num_slices, num_sequences, runs=100), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shards": 0}, "num_shards is 0, expected at least 1"),
        ({"num_slices": 0}, "num_slices is 0, expected at least 1"),
        ({"num_sequences": 0}, "num_sequences is 0, expected at least 1"),
        ({"num_sequences": 25}, "num_sequences is 25, expected at most 24"),
        ({"method": "bms"}, "method is 'bms', expected one of cyclic, random"),
        ({"slice_data": "all"}, "slice_data is 'all', expected one of cumulative, disjoint"),
        ({"blocks": "heads"}, "blocks is 'heads', expected one of layers, ranks"),
        ({"num_records": 0}, "num_records is 0, expected at least 1"),
        ({"adapter_bytes": -1}, "adapter_bytes is -1, expected at least 1"),
        ({"runs": 0}, "runs is 0, expected at least 1"),
    ],
)
def test_bad_inputs(changes: dict, message: str) -> None:
    arguments = {"num_shards": 2, "num_slices": 4, "num_sequences": 2, "runs": 2}
    with pytest.raises(ValueError, match=message):
        make_plan(**{**arguments, **changes})
