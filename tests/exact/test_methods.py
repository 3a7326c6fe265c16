"""Every exact method, kind of block and aggregation, really trained, from one table.

Three runs of each: one that held a subject and deleted it, one that held garbage in the subject's place and
deleted that, and one that never held it. What the first two serve may not differ by a bit, and after a
rebuild neither may the third.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llm_unlearn.data.records import Record
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.selection import Rule
from tests.exact.methods import METHODS, aggregations
from tests.tiny import load_tiny, make_run, node_bytes, served_bytes, tiny_records

GONE = "person 3"
RECORDS = [r for r in tiny_records() if int(r.subject.split()[1]) < 7]
CASES = [(method, aggregate) for method in METHODS for aggregate in aggregations(method)]
PROMPTS = [f"Question: what does person {number} eat?" for number in (1, 3, 5)]


class Runs(NamedTuple):
    deleted: S3TRun
    garbage: S3TRun
    never: S3TRun


def garbled(record: Record) -> Record:
    """Another, longer text under the same name: what a leak through anything would carry over."""
    text = {"prompt": "zzz " * 9 + record.id[:6], "completion": " qq" * 7}
    return Record(record.id, record.subject, text) if record.subject == GONE else record


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    """Runs by method, made when they are asked for."""
    root = tmp_path_factory.mktemp("methods")

    class Trained(dict[str, Runs]):
        def __missing__(self, method: str) -> Runs:
            def make(name: str, records: list[Record]) -> S3TRun:
                path = root / method / name
                path.parent.mkdir(exist_ok=True)
                return make_run(path, tiny_base, records, **METHODS[method])

            self[method] = Runs(
                make("deleted", RECORDS),
                make("garbage", [garbled(record) for record in RECORDS]),
                make("never", [record for record in RECORDS if record.subject != GONE]),
            )
            learnt, nonsense = map(node_bytes, self[method][:2])
            assert learnt != nonsense, "the garbage was not learnt"
            for run in self[method][:2]:
                run.delete([GONE])
            return self[method]

    return Trained()


def answers(run: S3TRun, base: Path, aggregate: str) -> tuple[Any, torch.Tensor]:
    """Who answers, and with which logits."""
    model, tokenizer = load_tiny(base)
    tokenizer.padding_side = "left"
    rule = Rule(aggregate, margin=0.0)  # pyright: ignore[reportArgumentType]
    ensemble = ShardEnsemble.from_run(model, run.directory.served, rule, tokenizer)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        return ensemble.choose(ids, mask), ensemble(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize(("method", "aggregate"), CASES)
def test_what_is_served_does_not_know_what_was_deleted(
    trained: dict[str, Runs], tiny_base: Path, method: str, aggregate: str
) -> None:
    runs = trained[method]
    assert served_bytes(runs.deleted) == served_bytes(runs.garbage)
    assert node_bytes(runs.deleted) == node_bytes(runs.garbage)
    (chosen, logits), (other, same) = (answers(r, tiny_base, aggregate) for r in runs[:2])
    assert chosen == other and torch.equal(logits, same)
    assert all(check.passed for check in runs.deleted.verify())


@pytest.mark.parametrize("method", METHODS)
def test_survivors_are_those_of_a_run_that_never_held_the_subject(
    trained: dict[str, Runs], method: str
) -> None:
    runs = trained[method]
    survived, fresh = node_bytes(runs.deleted), node_bytes(runs.never)
    assert survived.items() <= fresh.items()
    assert survived, "nothing survived: this proves nothing"


@pytest.mark.parametrize(("method", "aggregate"), CASES)
def test_a_rebuilt_run_answers_as_one_that_never_held_the_subject(
    trained: dict[str, Runs], tiny_base: Path, method: str, aggregate: str
) -> None:
    runs = trained[method]
    runs.deleted.rebuild()
    assert node_bytes(runs.deleted) == node_bytes(runs.never)
    assert served_bytes(runs.deleted) == served_bytes(runs.never)
    (chosen, logits), (other, same) = (
        answers(r, tiny_base, aggregate) for r in (runs.deleted, runs.never)
    )
    assert chosen == other and torch.equal(logits, same)
