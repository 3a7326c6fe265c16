"""What is in memory follows the ledger at its edges: nothing left, half carried out, changed meanwhile."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn.data.partition import SliceName
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import RunError
from llm_unlearn.exact import library as library_module
from llm_unlearn.exact.adapters import merged_name
from llm_unlearn.exact.asks import Correction
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.library import Library
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.engine.memory import Memory
from llm_unlearn.serving.policy import make_policy
from tests.serving.engines import (
    NAMES,
    PROMPTS,
    acknowledge_only,
    ask,
    ask_all,
    generated,
    records_of_names,
    serving,
)
from tests.tiny import load_tiny, make_run

OWN = {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1}


def made(
    path: Path, base: Path, aggregate: str, records: list[Record] | None = None, **shape: Any
) -> S3TRun:
    records = records or records_of_names()
    return make_run(path, base, records, aggregate=aggregate, max_steps=1, **shape)


def subjects_in(run: S3TRun, shard: int, part: int) -> list[str]:
    return sorted(run.directory.slices.subjects(SliceName(shard, part)))


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, before: Callable[[], Any]) -> None:
    """Something happens before the next call of a function, and only then."""
    original = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        before()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


def said_by_the_base(base: Path, prompt: str, tokens: int) -> str:
    model, tokenizer = load_tiny(base)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        said = model.eval().generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("aggregate", ["average", "vote", "merge", "select", "mixture"])
def test_where_nobody_is_left_the_base_model_answers(
    tiny_base: Path, tmp_path: Path, aggregate: str
) -> None:
    run = made(tmp_path / "run", tiny_base, aggregate, **OWN)
    expected = said_by_the_base(tiny_base, PROMPTS[0], 8)
    with serving(run) as engine:
        assert ask(engine, PROMPTS[0], max_tokens=8).wait().served == "certified"
        run.delete(NAMES)
        assert not run.directory.shards
        answer = ask(engine, PROMPTS[0], max_tokens=8).wait()
        assert (answer.text, answer.served) == (expected, "certified")
        voted = ask(engine, PROMPTS[0], "vote", labels=("dish", "fish")).wait()
        assert voted.text in ("dish", "fish") and sum(voted.tally) == 1
        assert engine.state().loaded == () and engine.state().residents == ()


def test_a_merge_of_nobody_is_not_certain_while_somebody_may_come_back(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard is empty for good; the second is withdrawn, and a part of it will answer again."""
    run = made(tmp_path / "run", tiny_base, "merge", num_shards=2, num_slices=2, num_sequences=1)
    run.delete(subjects_in(run, 0, 0) + subjects_in(run, 0, 1))
    with serving(run) as engine:
        request = acknowledge_only(run, subjects_in(run, 1, 1)[0], monkeypatch)
        assert {target.shard for target in request.targets} == {1}
        answer = ask(engine, PROMPTS[0], max_tokens=4).wait()
        assert engine.state().affected == (1,)
        assert (answer.served, answer.certified_tokens) == ("clean", 0)
        run.settle()
        assert ask(engine, PROMPTS[0], max_tokens=4).wait().served == "certified"


def moving(run: S3TRun, records: list[Record]) -> Correction:
    """A correction whose record, which is its own subject, goes to another shard."""
    for record in records:
        row = {"prompt": "Question: what does Balthazar Quill eat? Answer:", "completion": " plums"}
        (new,) = make_records([row])
        if (
            run.directory.slices.place(new.subject).shard
            != run.directory.slices.place(record.subject).shard
        ):
            return Correction((record.subject,), record=record.id, row=row)
    raise AssertionError("all records are in one shard")


@pytest.mark.parametrize(
    "aggregate, shape",
    [
        ("select", OWN),
        ("average", OWN),
        ("average", {"num_shards": 3, "num_slices": 1, "num_sequences": 1}),
    ],
)
def test_where_a_correction_brings_its_record_is_affected_too(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    aggregate: str,
    shape: dict[str, Any],
) -> None:
    records = make_records([record.content for record in records_of_names()])
    run = made(tmp_path / "run", tiny_base, aggregate, records, **shape)
    policy = make_policy("threshold-clean", target="retrained")
    with serving(run, policy) as engine:
        request = acknowledge_only(run, moving(run, records), monkeypatch)
        (old,), (new,) = ({t.shard for t in ts} for ts in (request.targets, request.inserted))
        assert old != new
        asked = ask_all(
            engine, [PROMPTS[0], "Question: what does Balthazar Quill eat? Answer:"], max_tokens=4
        )
        assert set(engine.state().affected) == {old, new}
        assert asked[1].served == "clean", "a rebuild trains who knows about this"
        if shape is not OWN:  # its nodes go as those of the other do
            assert engine.memory.withdrawn == {old, new}
        run.settle()
        engine.notice()
        ask(engine, PROMPTS[0], max_tokens=4).wait()
        assert new in engine.state().affected
    deactivated = ShardEnsemble.from_run(
        load_tiny(tiny_base)[0], run.directory.served, run.directory.config.rule, load_tiny(tiny_base)[1]
    )  # fmt: skip
    assert asked[0].text == generated(deactivated, load_tiny(tiny_base)[1], [PROMPTS[0]], 4)[0] or (
        asked[0].served == "clean"
    )


def test_the_words_of_shards_outlive_a_change_while_they_are_read(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion takes a file of them away; without words every adapter would read every prompt from then on."""
    run = made(tmp_path / "run", tiny_base, "select", **OWN | {"num_shards": 3})
    home = run.directory.slices.place(NAMES[3]).shard
    tokenizer = load_tiny(tiny_base)[1]
    with serving(run) as engine:
        library = engine.memory.library

        def delete() -> None:
            del library._indexes[f"shard-{home} {library._digest(f'shard-{home}')}"]
            run.delete([NAMES[3]])

        once(monkeypatch, Library, "words", delete)
        engine.memory.is_stale = True
        engine.notice()
        texts = [answer.text for answer in ask_all(engine, PROMPTS, max_tokens=6)]
        assert run.directory.ledger.requests(), "it came in between"
        assert engine.memory.ensemble.words is not None
    assert texts == generated(run.ensemble(), tokenizer, PROMPTS, 6)


def few(run: S3TRun, base: Path) -> ShardEnsemble:
    """With room for one adapter, so that others are loaded when they are asked for."""
    model, tokenizer = load_tiny(base)
    return ShardEnsemble.from_run(
        model, run.directory.served, run.directory.config.rule, tokenizer, capacity=1
    )


def asleep(run: S3TRun, library: Library) -> tuple[str, str]:
    """A subject whose adapter is not in memory, and a prompt about it."""
    return next(
        (name, prompt)
        for name, prompt in zip(NAMES, PROMPTS, strict=False)
        if f"shard-{run.directory.slices.place(name).shard}" not in library.slots
    )


@pytest.mark.parametrize("shape", [OWN, OWN | {"num_shards": 3}])
@pytest.mark.parametrize("name", ["_load", "_swap_into", "_ensure_same"])
def test_an_adapter_that_goes_while_it_is_loaded(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, Any],
    name: str,
) -> None:
    """Its directory may be gone: no answer is lost, and nothing of it stays in memory."""
    run = made(tmp_path / "run", tiny_base, "select", **shape)
    tokenizer = load_tiny(tiny_base)[1]
    with serving(run, ensemble=few(run, tiny_base)) as engine:
        ask(engine, PROMPTS[1], max_tokens=2).wait()
        library = engine.memory.library
        subject, prompt = asleep(run, library)
        once(monkeypatch, Library, name, lambda: run.delete([subject]))
        answer = ask(engine, prompt, max_tokens=6).wait()
        assert answer.text == generated(run.ensemble(), tokenizer, [prompt], 6)[0]
        assert answer.epoch == run.directory.ledger.epoch(), "the deletion came in between"
        for slot in library.spare:
            for layer in library._layers(slot):
                assert not layer.lora_A[slot].weight.any() and not layer.lora_B[slot].weight.any()
        slots = {*library.slots.values(), *library.spare}
        assert set(library.model.peft_config) == slots, "no slot is forgotten"


def test_serve_anyway_goes_on_where_its_adapters_cannot_be_had_any_more(
    tiny_base: Path, tmp_path: Path
) -> None:
    """What is not in memory is changed on disk: then the new one answers."""
    run = made(tmp_path / "run", tiny_base, "select", **OWN | {"num_shards": 3})
    tokenizer = load_tiny(tiny_base)[1]
    with serving(run, "serve-anyway", ensemble=few(run, tiny_base)) as engine:
        ask(engine, PROMPTS[1], max_tokens=2).wait()
        subject, prompt = asleep(run, engine.memory.library)
        run.delete([subject])
        answer = ask(engine, prompt, max_tokens=6).wait()
        assert answer.served == "unsafe"
    assert answer.text == generated(run.ensemble(), tokenizer, [prompt], 6)[0]


def memory_of(run: S3TRun) -> Memory:
    return Memory(run.directory, run.ensemble())


def test_what_is_to_be_forgotten_is_known_after_a_failure(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger is away in the middle of a change: answers in the queue still hold words of what is gone."""
    run = made(tmp_path / "run", tiny_base, "average", num_shards=2, num_slices=1, num_sequences=1)
    memory = memory_of(run)
    old = {adapter.name for adapter in memory.adapters.values()}
    ledger = run.directory.ledger
    run.delete([NAMES[3]])

    def fail() -> None:
        raise RunError("the ledger cannot be reached")

    once(monkeypatch, ledger, "requests", lambda: once(monkeypatch, ledger, "requests", fail))
    with pytest.raises(RunError):
        memory.refresh()
    memory.is_stale = True
    change = memory.refresh()
    assert change is not None and len(change.tainted & old) == 1 and not change.replaced


def test_what_is_served_is_looked_at_as_one(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another generation is published, and this one removed, between two files of it."""
    run = made(tmp_path / "run", tiny_base, "average", num_shards=2, num_slices=1, num_sequences=1)
    memory = memory_of(run)
    original = library_module.read_lineage

    def read(directory: Path) -> Any:
        if run.directory.ledger.requests():
            return original(directory)
        run.delete([NAMES[3]])
        return None

    monkeypatch.setattr(library_module, "read_lineage", read)
    memory.library.update()
    assert None not in memory.library.lineages.values()
    found = {name: lineage["digest"] for name, lineage in memory.library.lineages.items()}
    assert found == {
        path.name: original(path)["digest"] for path in memory.library.directories.values()
    }


def test_a_merged_server_tells_of_an_adapter_that_it_loaded_alone(
    tiny_base: Path, tmp_path: Path
) -> None:
    run = made(tmp_path / "run", tiny_base, "merge", num_shards=2, num_slices=1, num_sequences=1)
    with serving(run) as engine:
        (merged,) = engine.digests_in_memory()
        residents = engine.state().residents
        assert merged == merged_name((r.name, r.state == "withdrawn") for r in residents)
        alone = engine.state().residents[0].name
        ask(engine, PROMPTS[0], adapter=alone, max_tokens=2).wait()
        assert set(engine.digests_in_memory()) == {merged, alone}
        run.delete([subjects_in(run, 0, 0)[0]])
        ask(engine, PROMPTS[0], max_tokens=2).wait()
        assert alone not in engine.digests_in_memory()
