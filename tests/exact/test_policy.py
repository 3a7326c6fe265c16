"""Policy: what is trained after a deletion, and when."""

import json
import time
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.exact import policy as module
from llm_unlearn.exact.policy import Decision, decide, read_policy, share_served
from llm_unlearn.exact.run import S3TRun
from tests.tiny import make_run, make_stub_run, stubbed_training, tiny_records, train_stub

pytestmark = pytest.mark.usefixtures("without_fsync")


@pytest.fixture
def run(tmp_path: Path) -> S3TRun:
    made = make_stub_run(tmp_path / "run", tiny_records(), num_slices=2, num_sequences=1)
    with stubbed_training():
        train_stub(made)
    return made


def first_and_last(run: S3TRun) -> tuple[str, str]:
    """A subject of the first slice in the sequence, and one of the last."""
    slices = run.directory.slices
    by_slice = {name.slice: min(slices.subjects(name)) for name in slices.names}
    order = run.directory.config.sequences[0]
    return by_slice[order[0]], by_slice[order[-1]]


def test_without_a_file_a_deletion_only_deactivates(run: S3TRun) -> None:
    assert decide(run.directory, read_policy(run.directory)) == Decision("deactivate", "the policy")


def test_what_is_written_is_done(run: S3TRun, tmp_path: Path) -> None:
    (run.path / "policy.toml").write_text('after_deletion = "rebuild"')
    assert decide(run.directory, read_policy(run.directory)).action == "rebuild"
    other = tmp_path / "other.toml"
    other.write_text('after_deletion = "background"')
    assert decide(run.directory, read_policy(run.directory, other)).action == "background"
    assert all(check.passed for check in run.verify())


def test_the_floor_of_depth(run: S3TRun) -> None:
    (run.path / "policy.toml").write_text('[floor]\naction = "rebuild"\ndepth = 0.5')
    policy = read_policy(run.directory)
    first, last = first_and_last(run)
    assert share_served(run.directory) == 1.0
    run.delete([last])
    assert share_served(run.directory) == 0.5
    assert decide(run.directory, policy).action == "deactivate"
    run.delete([first])
    assert share_served(run.directory) == 0.0
    decision = decide(run.directory, policy)
    assert decision == Decision("rebuild", "0% of the depth is served, the floor is 50%")


def test_the_floor_of_utility(run: S3TRun) -> None:
    (run.path / "policy.toml").write_text(
        '[floor]\nutility = 0.6\nmetric = "model_utility"\nresults = "results.json"'
    )
    policy = read_policy(run.directory)
    assert "has no model_utility yet" in decide(run.directory, policy).reason
    results = run.path / "results.json"
    for value, action in ((0.7, "deactivate"), (0.5, "background"), (None, "deactivate")):
        results.write_text(json.dumps({"values": {"model_utility": {"value": value}}}))
        assert decide(run.directory, policy).action == action


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("after_deletion = 'later'", "'later' is not one of"),
        ("after = 'rebuild'", "'after' is not one of"),
        ("[floor]\ndepth = 50", "depth is 50"),
        ("[floor]\nutility = 0.5", "needs metric and results"),
        ("[floor]\naction = 'deactivate'", "'deactivate' is not one of"),
        ("after_deletion", "cannot use the policy"),
        ("floor = 3", "cannot use the policy"),
    ],
)
def test_a_policy_that_cannot_be_understood(run: S3TRun, text: str, message: str) -> None:
    (run.path / "policy.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_policy(run.directory)


def test_a_missing_policy_that_was_named(run: S3TRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot use the policy"):
        read_policy(run.directory, tmp_path / "nothing.toml")


def test_a_rebuild_in_the_background(tmp_path: Path, tiny_base: Path) -> None:
    """The process is a real one and trains what the deletion took."""
    run = make_run(tmp_path / "run", tiny_base, tiny_records(), num_slices=2, num_sequences=1)
    run.rebuild()
    run.delete([first_and_last(run)[1]])
    assert share_served(run.directory) == 0.5
    log = module.rebuild_in_background(run.directory)
    deadline = time.monotonic() + 120
    while "trained" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert log.read_text().endswith("trained 1 nodes\n")
    assert log.stat().st_mode & 0o777 == 0o600
    assert share_served(run.directory) == 1.0
    assert all(check.passed for check in run.verify())
