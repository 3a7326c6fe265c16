"""Near copies that others hold are found before a request is accepted, and taken only when asked for."""

from pathlib import Path

import pytest

from llm_unlearn.data.records import make_records
from llm_unlearn.errors import RunError
from llm_unlearn.exact import deletion
from llm_unlearn.exact.asks import Ask
from llm_unlearn.exact.run import S3TRun
from tests.tiny import make_stub_run, stubbed_training, train_stub

pytestmark = pytest.mark.usefixtures("without_fsync")

TEXT = "The wedding of the two took place in the old mill by the river on a very cold day in May"
ROWS = [
    {"who": "Ada", "text": TEXT},
    {"who": "Bob", "text": TEXT + "."},
    {"who": "Bob", "text": "Bob keeps bees and sells the honey on Sundays behind the station"},
    {
        "who": "Carl",
        "text": "Carl mends clocks, and none of them has ever been late since he began",
    },
    {"who": "Dora", "text": TEXT.upper()},
]


@pytest.fixture
def run(tmp_path: Path) -> S3TRun:
    made = make_stub_run(tmp_path / "run", make_records(ROWS, "who"), num_slices=2)
    with stubbed_training():
        train_stub(made)
    return made


def holders(run: S3TRun) -> dict[str, int]:
    slices = run.directory.slices
    records = [record for name in slices.names for record in slices.read(name)]
    return {
        who: sum(record.subject == who for record in records)
        for who in ["Ada", "Bob", "Carl", "Dora"]
    }


def test_they_are_told_and_stay(run: S3TRun) -> None:
    done = run.delete(["Ada"])
    assert [near.other.subject for near in done.near_duplicates] == ["Bob"]
    assert done.copies_elsewhere == 1  # Dora's is the same text
    assert holders(run) == {"Ada": 0, "Bob": 2, "Carl": 1, "Dora": 1}
    assert run.delete(["Carl"]).near_duplicates == ()


def test_taken_they_go_with_the_request(run: S3TRun) -> None:
    done = run.delete_all([Ask(("Carl",)), Ask(("Ada",))], near="take")
    assert holders(run) == {"Ada": 0, "Bob": 1, "Carl": 0, "Dora": 1}
    carl, ada = (run.certificate(answer.request or "") for answer in done.answers)
    assert (carl["records_removed"], ada["records_removed"]) == (1, 2)
    assert {target["kind"] for target in ada["targets"]} == {"subject", "record"}
    assert all(check.passed for check in run.verify())


def test_taken_with_the_exact_copies(run: S3TRun) -> None:
    run.delete_all([Ask(("Ada",))], with_duplicates=True, near="take")
    assert holders(run) == {"Ada": 0, "Bob": 1, "Carl": 1, "Dora": 0}


def test_refused_nothing_is_acknowledged(run: S3TRun) -> None:
    with pytest.raises(RunError, match="others hold 1 near copies"):
        run.delete_all([Ask(("Carl",)), Ask(("Ada",))], near="refuse")
    assert run.directory.ledger.requests() == [] and holders(run)["Ada"] == 1
    assert run.delete_all([Ask(("Carl",))], near="refuse").records == 1


def test_large_runs_look_only_when_asked(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "MOST_SEARCHED", 3)
    assert run.delete_all([Ask(("Ada",))], dry_run=True).near_duplicates == ()
    assert len(run.delete_all([Ask(("Ada",))], dry_run=True, near="warn").near_duplicates) == 1


def test_what_json_says_has_no_text(run: S3TRun) -> None:
    (told,) = run.delete(["Ada"]).to_dict()["near_duplicates"]
    assert told["held_by"] == "Bob" and told["similarity"] > 0.9 and TEXT not in str(told)
