"""LegoNet: records placed by public keys, learnt and answered by their nearest shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import UserError
from llm_unlearn.exact.keys import Keys, asked_by, encode, public_keys
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.selection import BASE_MODEL
from llm_unlearn.exact.store import KEYS_NAME
from tests.tiny import load_tiny, node_bytes, tiny_arguments, tiny_model_arguments, tiny_records

PUBLIC = [
    f"Question: what does guest {number} {verb}?"
    for number in range(9)
    for verb in ("eat", "do", "say")
]
GONE = "person 3"


def make_lego(
    path: Path, base: Path, records: list[Record] | None = None, **options: Any
) -> S3TRun:
    model, tokenizer = load_tiny(base)
    flags = {
        "exact_method": "lego", "num_shards": 5, "num_slices": 1, "num_sequences": 1, "copies": 2,
        "aggregate": "nearest", **options,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    key = path.parent / "secret.key"
    key.write_bytes(PartitionKey.from_phrase("lego").secret)
    arguments = tiny_arguments(**flags, key_path=str(key))
    run = S3TRun.create(
        path, records or tiny_records(), arguments, model, tokenizer, tiny_model_arguments(base),
        public_texts=PUBLIC,
    )  # fmt: skip
    run.train(model, tokenizer)
    return run


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> S3TRun:
    return make_lego(tmp_path_factory.mktemp("lego") / "run", tiny_base)


def places(run: S3TRun) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for name in run.directory.slices.names:
        for record in run.directory.slices.read(name):
            found.setdefault(record.id, set()).add(name.shard)
    return found


def test_every_record_is_in_the_shards_of_its_nearest_keys(run: S3TRun, tiny_base: Path) -> None:
    model, tokenizer = load_tiny(tiny_base)
    keys = Keys.load((run.path / KEYS_NAME).read_bytes())
    found = places(run)
    assert len({frozenset(shards) for shards in found.values()}) > 1
    for record in tiny_records():
        vector = encode(model, tokenizer, [asked_by(record)], 64)[0]
        nearest = np.argsort(-(keys.vectors @ vector))[:2]
        assert found[record.id] == set(nearest.tolist())
    assert all(check.passed for check in run.verify())


def test_a_place_depends_on_the_record_and_public_texts_alone(
    run: S3TRun, tiny_base: Path, tmp_path: Path
) -> None:
    few = make_lego(tmp_path / "run", tiny_base, tiny_records()[:7])
    assert places(few).items() <= places(run).items()
    assert (few.path / KEYS_NAME).read_bytes() == (run.path / KEYS_NAME).read_bytes()


def test_a_deletion_leaves_what_a_run_without_the_subject_has(
    tiny_base: Path, tmp_path: Path
) -> None:
    deleted = make_lego(tmp_path / "one" / "run", tiny_base)
    hit = {name.shard for name in deleted.directory.slices.homes([GONE])}
    done = deleted.delete([GONE])
    assert done.subjects == 1 and done.nodes_removed == len(hit)
    assert {shard for shard, depth in done.served.items() if depth == 0} >= hit
    assert all(check.passed for check in deleted.verify())
    assert deleted.status().deleted_subjects == 1
    kept = [record for record in tiny_records() if record.subject != GONE]
    never = make_lego(tmp_path / "two" / "run", tiny_base, kept)
    assert node_bytes(deleted).items() <= node_bytes(never).items()
    deleted.rebuild()
    assert node_bytes(deleted) == node_bytes(never)
    ids = torch.tensor([load_tiny(tiny_base)[1]("Question: what does person 4 eat?")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(*(r.ensemble()(input_ids=ids).logits for r in (deleted, never)))
    with pytest.raises(UserError, match="no such subject"):
        deleted.delete(["nobody"])
    assert deleted.delete([GONE]).already_deleted == 1


def test_a_prompt_is_answered_by_the_mean_of_its_shards(run: S3TRun, tiny_base: Path) -> None:
    tokenizer = load_tiny(tiny_base)[1]
    ensemble = run.ensemble()
    for record in tiny_records()[:6]:
        ids = torch.tensor([tokenizer(asked_by(record))["input_ids"]])
        chosen = ensemble.choose(ids)[0]
        assert {choice.adapter for choice in chosen} == places(run)[record.id]
        assert [choice.weight for choice in chosen] == [0.5, 0.5]
    ensemble.adapters = ["__base__"] * 5
    assert ensemble.choose(ids)[0][0].adapter == BASE_MODEL


def test_a_lost_copy_or_other_keys_are_reported(
    run: S3TRun, tiny_base: Path, tmp_path: Path
) -> None:
    other = make_lego(tmp_path / "run", tiny_base)
    name = next(n for n in other.directory.slices.names if other.directory.slices.read(n))
    subject = other.directory.slices.read(name)[0].subject
    other.directory.slices.rewrite(name, {other.directory.key.pseudonym("subject", subject)})
    (other.path / KEYS_NAME).write_bytes(Keys(np.eye(5, 24, dtype=np.float32), 2).to_bytes())
    problems = [problem for check in other.verify() for problem in check.problems]
    assert any("are not held 2 times" in problem for problem in problems)
    assert any("keys that the run was made with" in problem for problem in problems)


def test_copies_held_by_others_are_counted_once(tiny_base: Path, tmp_path: Path) -> None:
    twice = make_records(
        [{"subject": s, "prompt": "Same?", "completion": " Yes."} for s in ("a", "b")], "subject"
    )
    run = make_lego(tmp_path / "run", tiny_base, [*tiny_records(), *twice])
    assert run.delete(["a"], dry_run=True).copies_elsewhere == 1
    assert run.delete(["a"], with_duplicates=True).records == 4
    assert not any(
        r.subject == "b" for n in run.directory.slices.names for r in run.directory.slices.read(n)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregate": "select"}, "lego finds shards by its keys"),
        ({"copies": 9}, "--copies must be 1 to --num_shards"),
        ({"num_slices": 2}, "--num_shards says how many"),
        ({"exact_method": "experts"}, "needs the keys of --exact_method lego"),
    ],
)
def test_impossible_choices_are_one_line(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_lego(tmp_path / "run", tiny_base, **options)


def test_keys_need_public_texts(tiny_base: Path, tmp_path: Path) -> None:
    vectors = encode(*load_tiny(tiny_base), PUBLIC, 64)
    with pytest.raises(UserError, match="as many different public texts"):
        public_keys(vectors, len(PUBLIC) + 1)
    model, tokenizer = load_tiny(tiny_base)
    arguments = tiny_arguments(
        exact_method="lego", num_shards=5, num_slices=1, num_sequences=1, aggregate="nearest"
    )
    with pytest.raises(UserError, match="--public_path"):
        S3TRun.create(tmp_path / "run", tiny_records(), arguments, model, tokenizer)
