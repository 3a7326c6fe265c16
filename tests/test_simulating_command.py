"""`llm-unlearn simulate-serving` as a person and a machine see it."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.policy import POLICIES
from llm_unlearn.serving.simulation.facts import read_run
from tests.saying import Say
from tests.tiny import make_stub_run, stubbed_training, tiny_records, train_stub

EXPERTS = {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1}
SHORT = ("--hours", "0.2", "--rate", "1")


@pytest.fixture
def say(say: Say) -> Say:
    return lambda *arguments: say("simulate-serving", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve subjects in three shards; every node took a second per slice that it has seen."""
    path = tmp_path_factory.mktemp("simulated") / "run"
    with stubbed_training():
        made = make_stub_run(path, tiny_records(), num_shards=3)
        train_stub(made)
    directory = RunDirectory.open(path)
    nodes = [e.payload for e in directory.ledger.events("trained")]
    wanted = directory.wanted()
    told = [n | {"seconds": float(len(wanted[n["node"]].path))} for n in nodes]
    directory.ledger.append("trained", *told)  # the last entry about a node counts
    return path


def test_a_table_for_each_target_and_what_is_saved(say: Say) -> None:
    code, text, _ = say(*SHORT)
    assert code == 0
    for name in POLICIES:
        assert text.count(name) >= 2, name
    assert text.count("against inference-oblivious serving: ") == 2
    assert text.count("the paper reports up to 99 % and 31 %") == 2
    assert "UNSAFE" in text and "…" not in text  # nothing is cut off


def test_json_has_every_number(say: Say) -> None:
    code, text, _ = say(*SHORT, "--json", "--seed", 3)
    told = json.loads(text)
    assert code == 0 and len(told["outcomes"]) == 2 * len(POLICIES)
    assert told["setting"]["seed"] == 3 and set(told["headlines"]) == {"deactivated", "retrained"}
    first = told["outcomes"][0]
    assert first["latency"].keys() == {"mean", "p50", "p99"}
    assert say(*SHORT, "--json", "--seed", 3)[1] == text


def test_one_policy_and_one_target(say: Say) -> None:
    told = json.loads(
        say(*SHORT, "--policy", "deadline-clean", "--target", "retrained", "--json")[1]
    )
    assert [o["policy"] for o in told["outcomes"]] == ["deadline-clean", "oblivious"]


def test_a_plot(say: Say, tmp_path: Path) -> None:
    code, text, _ = say(*SHORT, "--plot", tmp_path / "plot.png")
    assert code == 0 and text.endswith(f"plot: {tmp_path / 'plot.png'}\n")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "eraser"], "--policy is 'eraser'"),
        (["--target", "none"], "--target is 'none'"),
        (["--policy", "deadline-clean", "--threshold", "3"], "--threshold has no effect"),
        (["--threshold", "21"], "more than the 20 shards"),
        (["--deadline-hours", "-1"], "--deadline-hours"),
        (["--rate", "0"], "--rate"),
        (["--accuracy", "2"], "accuracy"),
        (["--seconds-per-shard", "0"], "seconds_per_shard"),
        (["--trace", "nowhere.jsonl"], "cannot read"),
        (["--run", "nowhere"], "nowhere"),
        (["--trace", "x", "--hours", "3"], "leave out --hours"),
        (["--hours", "0.1", "--plot", "/nowhere/plot.png"], "cannot write the plot"),
        (["--hours", "0.1", "--plot", "plot.exe"], "cannot write the plot"),
    ],
)
def test_mistakes_are_one_line(say: Say, arguments: list[str], says: str) -> None:
    code, _, error = say(*arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert says in error


def write_trace(path: Path, *rows: dict[str, Any]) -> Path:
    file = path / "trace.jsonl"
    queries = [{"time": moment, "kind": "query"} for moment in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*queries, *rows]))
    return file


def test_a_run_gives_its_shards_and_its_seconds(say: Say, run: Path) -> None:
    told = json.loads(say(*SHORT, "--run", run, "--json")[1])
    assert told["shards"] == 3
    # Two cyclic orders of three slices: a deletion takes 6, 5 or 5 seconds of nodes in each shard
    # (the slice is first, second or third in each), weighted by who lives where.
    assert 3 < told["setting"]["seconds_per_shard"] < 9
    assert told["setting"]["seconds_per_shard"] == pytest.approx(by_hand(run))
    assert "'average'" in told["notes"][0]
    assert json.loads(say(*SHORT, "--run", run, "--seconds-per-shard", 4, "--json")[1])["setting"][
        "seconds_per_shard"
    ] == 4  # fmt: skip


def by_hand(run: Path) -> float:
    """Mean over subjects of the seconds of all nodes that saw their slice."""
    directory = RunDirectory.open(run)
    seconds = []
    for person in range(12):
        home = directory.slices.place(f"person {person}")
        nodes = {node.key: node for path in directory.paths(home.shard) for node in path}
        seconds.append(sum(len(n.path) for n in nodes.values() if home.slice in n.path))
    return sum(seconds) / len(seconds)


def test_subjects_are_found_in_the_run_and_named_nowhere(
    say: Say, run: Path, tmp_path: Path
) -> None:
    rows = [{"time": 5, "kind": "delete", "subject": f"person {n}"} for n in (1, 1, 2, 7)]
    code, text, error = say("--run", run, "--trace", write_trace(tmp_path, *rows), "--json")
    told = json.loads(text)
    assert code == 0 and told["deletions"] == 3  # who asks twice is deleted once
    hit = {RunDirectory.open(run).slices.place(f"person {n}").shard for n in (1, 2, 7)}
    oblivious = next(o for o in told["outcomes"] if o["policy"] == "oblivious")
    assert oblivious["retrains"] == len(hit)
    assert "person" not in text + error


def test_nobody_who_is_unknown_is_named(say: Say, run: Path, tmp_path: Path) -> None:
    trace = write_trace(tmp_path, {"time": 5, "kind": "delete", "subject": "Grace Hopper"})
    code, text, error = say("--run", run, "--trace", trace)
    assert code == 2 and "line 61: the run holds no such subject" in error
    assert "Grace" not in text + error


def test_a_shard_that_the_run_does_not_have(say: Say, run: Path, tmp_path: Path) -> None:
    trace = write_trace(tmp_path, {"time": 5, "kind": "delete", "shard": 3})
    code, _, error = say("--run", run, "--trace", trace)
    assert code == 2 and "line 61: there is no such shard" in error


def test_a_run_and_shards_contradict_each_other(say: Say, run: Path) -> None:
    code, _, error = say("--run", run, "--shards", 3)
    assert code == 2 and "leave out --shards" in error


def test_a_run_that_was_never_trained_knows_no_seconds(say: Say, tmp_path: Path) -> None:
    make_stub_run(tmp_path / "run", tiny_records(), num_shards=3)
    assert read_run(tmp_path / "run").seconds_per_shard is None
    code, _, error = say("--run", tmp_path / "run")
    assert code == 2 and "give --seconds-per-shard" in error
    assert say(*SHORT, "--run", tmp_path / "run", "--seconds-per-shard", 4)[0] == 0


def test_a_run_with_a_shard_for_each_subject_rebuilds_nothing(say: Say, tmp_path: Path) -> None:
    make_stub_run(tmp_path / "run", tiny_records(), **EXPERTS)
    code, _, error = say("--run", tmp_path / "run")
    assert code == 2 and "nothing to simulate" in error
