"""An ensemble in memory that follows what a run serves is the one that would be loaded now."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn.exact.adapters import WEIGHTS_NAME, file_digest, tensors_digest
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.library import MERGED, Library, ServedChangedError
from llm_unlearn.exact.mixing import PARTS
from llm_unlearn.exact.run import S3TRun
from tests.tiny import (
    core_records,
    make_stub_run,
    make_tiny_model,
    make_tiny_tokenizer,
    stubbed_training,
    tiny_records,
    train_stub,
)

PROMPTS = [f"Question: what does person {i} eat on day 1? Answer:" for i in range(6)]
DELETED = ["person 1", "person 4", "person 2"]
SHAPES: dict[str, dict[str, Any]] = {
    "ranks": {"blocks": "ranks", "num_shards": 3},
    "layers": {"blocks": "layers", "num_shards": 3},
    "own shards": {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1},
}
RULES = [("average", None), ("merge", None), ("select", 1), ("mixture", 64)]


def make(path: Path, shape: str = "ranks", aggregate: str = "average", **options: Any) -> S3TRun:
    with stubbed_training():
        run = make_stub_run(
            path, tiny_records(), aggregate=aggregate, **{**SHAPES[shape], **options}
        )
        train_stub(run)
    return run


def loaded(run: S3TRun, capacity: int | None = 64) -> ShardEnsemble:
    directory = run.directory
    return ShardEnsemble.from_run(
        make_tiny_model(), directory.served, directory.config.rule, make_tiny_tokenizer(), capacity or 64
    )  # fmt: skip


def library_of(ensemble: ShardEnsemble) -> Library:
    assert ensemble.library is not None
    return ensemble.library


def logits(ensemble: ShardEnsemble) -> torch.Tensor:
    """What all say; where prompts decide who answers, what each shard says alone, one after the other."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.padding_side = "left"
    told = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    ids, mask = told["input_ids"], told["attention_mask"]
    with torch.no_grad():
        if not ensemble.routes_prompts:
            return ensemble(input_ids=ids, attention_mask=mask).logits
        said = []
        for name in ensemble.adapters:
            with ensemble.mixing.batch(ensemble.slots_of([name]) * len(ids), ids.device):
                said.append(ensemble.model(input_ids=ids, attention_mask=mask).logits)
        return torch.stack(said)


def zeros(library: Library, slot: str) -> bool:
    weights = [
        getattr(layer, part)[slot].weight for layer in library._layers(slot) for part in PARTS
    ]
    assert weights
    return not any(bool(weight.any()) for weight in weights)


def check(ensemble: ShardEnsemble, run: S3TRun, capacity: int | None) -> torch.Tensor:
    """It computes what a fresh one computes, and holds what is in the files and nothing else."""
    now = logits(ensemble)
    assert torch.equal(now, logits(loaded(run, capacity)))
    library = library_of(ensemble)
    for member in library.slots:
        file = run.directory.served / member / WEIGHTS_NAME
        assert tensors_digest(library.tensors(member)) == file_digest(file)
    assert all(zeros(library, slot) for slot in library.spare)
    held = {*library.slots.values(), *library.spare, library.nobody, MERGED}
    config = library.model.peft_config
    assert set(config) <= held, "no adapter is left that nobody knows of"
    return now


@pytest.mark.parametrize(
    "shape, aggregate, capacity",
    [
        ("ranks", "average", None), ("layers", "vote", None), ("layers", "merge", None), ("ranks", "select", 1),
        ("layers", "select", 2), ("own shards", "mixture", 64), ("own shards", "select", 1),
        ("own shards", "merge", None),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("without_fsync")
def test_following_is_loading_anew(
    tmp_path: Path, shape: str, aggregate: str, capacity: int | None
) -> None:
    """Through deletions and rebuilds, after which shards have other ranks, other layers, or are gone."""
    run = make(tmp_path / "run", shape, aggregate)
    ensemble = loaded(run, capacity)
    seen = [check(ensemble, run, capacity)]
    for number, subject in enumerate(DELETED):
        run.delete([subject])
        ensemble.update()
        seen.append(check(ensemble, run, capacity))
        if number % 2 and shape != "own shards":
            with stubbed_training():
                train_stub(run)
            ensemble.update()
            seen.append(check(ensemble, run, capacity))
    changes = [a.shape != b.shape or not torch.equal(a, b) for a, b in pairwise(seen)]
    assert sum(changes) > 1  # where an earlier slice is gone, a later one is not served anyway


@pytest.mark.parametrize("aggregate", ["average", "select", "merge"])
@pytest.mark.usefixtures("without_fsync")
def test_following_on_a_core(tmp_path: Path, aggregate: str) -> None:
    with stubbed_training():
        run = make_stub_run(
            tmp_path / "run", tiny_records(), core_records(), aggregate=aggregate, num_shards=2,
            num_slices=1, num_sequences=1,
        )  # fmt: skip
        train_stub(run)
    ensemble = loaded(run)
    check(ensemble, run, 64)
    names = {shard: [] for shard in run.directory.shards}
    for name in run.directory.slices.names:
        if name.shard in names:
            names[name.shard] += run.directory.slices.read(name)
    run.delete(sorted({record.subject for record in names[0]}))
    ensemble.update()  # only the core is left of the first
    assert library_of(ensemble).names == ["core", "shard-1"]
    check(ensemble, run, 64)


@pytest.mark.parametrize("aggregate, capacity", RULES)
@pytest.mark.usefixtures("without_fsync")
def test_withdrawn_is_gone_from_memory(
    tmp_path: Path, aggregate: str, capacity: int | None
) -> None:
    """Though it is still served; and it is back when nobody withdraws it any more."""
    run = make(tmp_path / "run", "ranks", aggregate)
    ensemble = loaded(run, capacity)
    library = library_of(ensemble)
    before = logits(ensemble)
    slots = dict(library.slots)
    ensemble.update({"shard-1"})
    assert "shard-1" not in library.slots and library.names[1] == library.nobody
    if "shard-1" in slots:
        assert zeros(library, slots["shard-1"])
    assert not torch.equal(logits(ensemble), before)
    ensemble.update()
    assert torch.equal(check(ensemble, run, capacity), before)
    ensemble.update({"shard-0", "shard-1", "shard-2"})
    assert all(zeros(library, slot) for slot in library.spare) and not library.slots
    told = make_tiny_tokenizer()(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = make_tiny_model()(input_ids=told).logits.log_softmax(-1)
        said = ensemble(input_ids=told).logits
    assert torch.allclose(said, expected, atol=1e-5), "the base model answers for nobody"


def test_copies_side_by_side_are_overwritten(tmp_path: Path) -> None:
    """What the shards' factors were put together into for a generation."""
    run = make(tmp_path / "run", "ranks", "average")
    ensemble = loaded(run)
    with ensemble.mixing.generation():
        logits(ensemble)
        assert ensemble.mixing._kept is not None
        copies = list(ensemble.mixing._kept.factors.values())
        assert copies and all(bool(c.down.any()) and bool(c.up.any()) for c in copies)
        ensemble.update({"shard-1"})
        assert not any(bool(c.down.any()) or bool(c.up.any()) for c in copies)
        assert ensemble.mixing._kept is None


@pytest.mark.parametrize("capacity", [1, 2])
def test_what_changes_while_it_is_loaded_is_not_used(tmp_path: Path, capacity: int) -> None:
    run = make(tmp_path / "run", "ranks", "select")
    library = Library(make_tiny_model(), run.directory.served, capacity)
    everybody = [f"shard-{shard}" for shard in run.directory.shards]
    absent = next(name for name in everybody if name not in library.slots)
    subject = next(
        record.subject
        for name in run.directory.slices.names
        if f"shard-{name.shard}" == absent
        for record in run.directory.slices.read(name)
    )
    run.delete([subject])
    with pytest.raises(ServedChangedError, match=absent):
        library.require([absent])
    assert absent not in library.slots and absent not in library.contents
    assert all(zeros(library, slot) for slot in library.spare)
    library.update()
    library.require([absent])
    file = run.directory.served / absent / WEIGHTS_NAME
    assert tensors_digest(library.tensors(absent)) == file_digest(file)


def test_taking_the_merged_adapter_apart(tmp_path: Path) -> None:
    """It is zeros at once, and can be made again, the same."""
    run = make(tmp_path / "run", "ranks", "merge")
    library = Library(make_tiny_model(), run.directory.served, None)
    library.merge()
    first = tensors_digest(library.tensors(MERGED))
    weights = [
        getattr(layer, part)[MERGED].weight for layer in library._layers(MERGED) for part in PARTS
    ]
    assert all(bool(weight.any()) for weight in weights)
    library.unmerge()
    assert not any(bool(weight.any()) for weight in weights)
    library.merge()
    assert tensors_digest(library.tensors(MERGED)) == first


@pytest.mark.usefixtures("without_fsync")
def test_the_first_shard_goes_away(tmp_path: Path) -> None:
    """With its directory, of which the merged adapter was begun."""
    run = make(tmp_path / "run", "own shards", "merge")
    ensemble = loaded(run)
    for _ in range(2):
        first = next(iter(library_of(ensemble).directories))
        (name,) = [n for n in run.directory.slices.names if f"shard-{n.shard}" == first]
        (subject,) = {record.subject for record in run.directory.slices.read(name)}
        run.delete([subject])
        assert not (run.directory.served / first).exists()
        ensemble.update()
        check(ensemble, run, None)
