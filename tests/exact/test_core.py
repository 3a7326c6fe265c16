"""The permanent core: under every node, in every answer, and out of reach of every deletion."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from llm_unlearn.data.partition import CORE
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import UserError
from llm_unlearn.exact import node_training, training
from llm_unlearn.exact.adapters import WEIGHTS_NAME, file_digest, load_tensors
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.models import subjects_in
from tests.tiny import (
    core_records,
    load_tiny,
    make_run,
    make_stub_run,
    make_trained_stub,
    node_bytes,
    served_bytes,
    stubbed_training,
    tiny_arguments,
    tiny_model_arguments,
    tiny_records,
    train_stub,
)

KINDS = ["ranks", "layers", "whole"]
BOTH, ONLY_CORE = "person 11", "resident 1"
PROMPTS = ["Question: what does person 1 eat?", "Question: what does person 7 eat on day 1?"]


def core_bytes(run: S3TRun) -> dict[str, bytes]:
    assert run.directory.core is not None
    return {
        name: data
        for name, data in node_bytes(run).items()
        if name.startswith(run.directory.core.key)
    }


def logits_of(model: Any, base: Path) -> torch.Tensor:
    tokenizer = load_tiny(base)[1]
    tokenizer.padding_side = "left"
    encoded = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**encoded).logits


def served_alone(run: S3TRun, base: Path, name: str) -> torch.Tensor:
    directory = str(run.directory.served / name)
    return logits_of(PeftModel.from_pretrained(load_tiny(base)[0], directory), base)


@pytest.mark.parametrize("blocks", KINDS)
def test_deletion_on_a_core_equals_never_having_seen_the_subject(
    tiny_base: Path, tmp_path: Path, blocks: str
) -> None:
    """And the core is trained once: no deletion and no rebuild touches a byte of it."""
    options: dict[str, Any] = {"core": core_records(), "blocks": blocks, "num_slices": 2}
    run = make_run(tmp_path / "run", tiny_base, **options)
    core = core_bytes(run)
    assert len(core) == 2
    gone = {"person 3", BOTH}
    run.delete(sorted(gone))
    assert core_bytes(run) == core
    rest = [record for record in tiny_records() if record.subject not in gone]
    never = make_run(tmp_path / "never", tiny_base, rest, **options)
    assert node_bytes(run).items() <= node_bytes(never).items()
    run.rebuild()
    assert node_bytes(run) == node_bytes(never)
    assert served_bytes(run) == served_bytes(never)
    assert core_bytes(run) == core
    trained = [event.payload["node"] for event in run.directory.ledger.events("trained")]
    assert run.directory.core is not None and trained.count(run.directory.core.key) == 1
    assert all(check.passed for check in run.verify(replay=9))


def test_every_node_depends_on_every_record_of_the_core(tmp_path: Path) -> None:
    cores = {"none": [], "all": core_records(), "fewer": core_records()[1:]}
    runs = {
        name: make_stub_run(tmp_path / name, tiny_records(), core) for name, core in cores.items()
    }
    keys = {name: set(run.directory.wanted()) for name, run in runs.items()}
    assert not keys["all"] & keys["fewer"] and not keys["all"] & keys["none"]
    assert len(keys["all"]) == len(keys["none"]) + 1
    first = runs["all"].directory.paths(0)[0]
    assert [node.is_core for node in first] == [True, False, False, False]
    assert first[1].parent == first[0].key and first[1].path == (0,)


@pytest.mark.parametrize("blocks", KINDS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_served_computes_what_was_trained_on_the_core(
    tiny_base: Path, tmp_path: Path, blocks: str, use_rslora: bool
) -> None:
    """The one served adapter against base + frozen core and blocks + last block."""
    lora = {"use_rslora": use_rslora, "lora_dropout": 0.0}
    run = make_run(
        tmp_path / "run", tiny_base, core=core_records(), blocks=blocks, num_slices=3,
        num_sequences=1, lora=lora,
    ).directory  # fmt: skip
    model, tokenizer = load_tiny(tiny_base)
    last = run.paths(0)[0][-1]
    task = training._load_task(run, tokenizer, last)
    assert task.parents[0] == run.core and (task.start is not None) == (blocks == "whole")
    node_task = node_training.NodeTask(last, task.parents, task.parts, [], None, task.start)
    trained = node_training.attach(model, node_task, run.config, run.shape)
    frozen = {name for name, p in trained.named_parameters() if not p.requires_grad}
    assert any(".frozen." in name for name in frozen)
    node_training._load(trained, run.nodes.load(last.key), node_training.TRAINED)
    ours = served_alone(S3TRun(run), tiny_base, "shard-0")
    torch.testing.assert_close(ours, logits_of(trained, tiny_base), rtol=1e-4, atol=1e-4)
    alone = served_alone(S3TRun(run), tiny_base, "core")
    assert not torch.allclose(ours, alone, atol=1e-2)
    assert not torch.allclose(alone, logits_of(load_tiny(tiny_base)[0], tiny_base), atol=1e-2)


def test_the_core_alone_is_what_is_left_of_a_shard(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, core=core_records(), num_slices=1, num_sequences=1)
    assert run.delete(["person 0"]).served == {0: 0}
    tensors = [
        load_tensors(run.directory.served / name / WEIGHTS_NAME) for name in ("shard-0", "core")
    ]
    assert run.directory.core is not None
    held = run.directory.nodes.load(run.directory.core.key)
    for served in tensors:
        assert served.keys() == held.keys()
        assert all(np.array_equal(served[name], held[name]) for name in held)
    assert "permanent core" in (run.directory.served / "shard-0" / "README.md").read_text()
    status = run.status().shards[0]
    assert (status.served_depth, status.surviving_depth, status.full_depth) == (0, 0, 1)
    assert (status.nodes, status.missing_nodes, run.status().core_records) == (0, 1, 4)
    assert run.ensemble().adapters == ["core"]


@pytest.mark.parametrize("num_shards", [1, 2])
def test_the_core_answers_what_is_nobodys(tiny_base: Path, tmp_path: Path, num_shards: int) -> None:
    run = make_run(
        tmp_path / "run", tiny_base, core=core_records(), num_shards=num_shards, num_slices=1,
        num_sequences=1, aggregate="select", select_margin=50.0,
    )  # fmt: skip
    core = torch.log_softmax(served_alone(run, tiny_base, "core"), -1)
    ensemble = run.ensemble()
    got = logits_of(ensemble, tiny_base)
    mask = load_tiny(tiny_base)[1](PROMPTS, padding=True, padding_side="left")["attention_mask"]
    real = torch.tensor(mask).bool()
    torch.testing.assert_close(got[real], core[real], rtol=1e-4, atol=1e-4)
    base = torch.log_softmax(logits_of(load_tiny(tiny_base)[0], tiny_base), -1)
    assert not torch.allclose(got[real], base[real], atol=1e-2)
    tokenizer = load_tiny(tiny_base)[1]
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = PeftModel.from_pretrained(
        load_tiny(tiny_base)[0], str(run.directory.served / "core")
    ).eval()
    assert torch.equal(
        ensemble.generate(input_ids=ids, **options), alone.generate(input_ids=ids, **options)
    )


def test_a_dead_shard_answers_with_the_core(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", tiny_base, core=core_records(), num_shards=2, num_slices=1,
        num_sequences=1,
    )  # fmt: skip
    slices = run.directory.slices
    run.delete([slices.read(slices.names[0])[0].subject])
    ensemble = run.ensemble()
    assert ensemble.adapters == ["core", "shard-1"]
    both = [served_alone(run, tiny_base, name) for name in ("core", "shard-1")]
    expected = torch.log_softmax(torch.stack(both), -1).exp().mean(0)
    got = logits_of(ensemble, tiny_base).exp()
    torch.testing.assert_close(got[0][-5:], expected[0][-5:], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("core") / "run"
    return make_trained_stub(path, core=core_records(), num_shards=2)


def test_nothing_is_deleted_from_the_core(run: S3TRun) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for asked in ([ONLY_CORE], ["person 1", ONLY_CORE]):
        with pytest.raises(UserError, match=f"'{ONLY_CORE}' is in the permanent core, which cann"):
            run.delete(asked)
    with pytest.raises(UserError, match="no such subject"):
        run.delete(["nobody"])
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("with_duplicates", [False, True])
def test_a_deletion_says_what_the_core_still_holds(run: S3TRun, with_duplicates: bool) -> None:
    records = (run.path / "records" / "core.jsonl").read_bytes()
    assert run.delete([BOTH], dry_run=True).core_records == 1
    both = run.delete([BOTH], with_duplicates)
    other = run.delete(["person 2"], with_duplicates)
    again = run.delete([BOTH], with_duplicates)
    assert (both.core_records, other.core_records, again.core_records) == (1, 0, 1)
    assert (both.records, again.request) == (2, None)
    for done, held in ((both, 1), (other, 0)):
        assert done.request is not None
        certificate = run.certificate(done.request)
        assert certificate["core"]["root"] == run.directory.core_root
        assert certificate["core"]["records_of_the_deleted"] == held
        assert any("permanent core" in line for line in certificate["out_of_reach"])
    assert (run.path / "records" / "core.jsonl").read_bytes() == records
    assert all(check.passed for check in run.verify())
    assert {BOTH, ONLY_CORE, "person 1"} <= subjects_in(run.path)
    assert "person 2" not in subjects_in(run.path)


def test_a_certificate_without_a_core_does_not_speak_of_one(tmp_path: Path) -> None:
    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records())
        train_stub(run)
    done = run.delete(["person 2"])
    assert done.request is not None and "core" not in run.certificate(done.request)
    assert "core" not in json.loads((run.path / "run.json").read_bytes())
    assert not (run.directory.served / "core").exists()


def test_such_a_run_warns_that_the_core_is_for_ever(tmp_path: Path) -> None:
    same_text = replace(tiny_records()[0], subject="resident 9", id="copy")
    core = [*core_records(), same_text]
    run = make_stub_run(tmp_path / "run", tiny_records(), core)
    first, second = run.warnings()[:2]
    assert "5 records: NOTHING in it can ever be deleted" in first
    assert second.startswith("1 subjects and 1 texts are in the permanent core and among")
    apart = make_stub_run(tmp_path / "apart", tiny_records(), core_records()[:1])
    assert not any("among the deletable" in line for line in apart.warnings())
    plain = make_stub_run(tmp_path / "plain", tiny_records())
    assert not any("core" in line for line in plain.warnings())


def test_a_core_is_chosen_when_the_run_is_made(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tiny_base)

    def create(name: str, **more: Any) -> S3TRun:
        arguments, adapter = tiny_arguments(blocks="layers"), tiny_model_arguments(tiny_base)
        path, records = tmp_path / name, tiny_records()
        return S3TRun.create(path, records, arguments, model, tokenizer, adapter, **more)

    create("plain")
    for more in ({"core": core_records()}, {"source": {"core_path": "core.jsonl"}}):
        with pytest.raises(UserError, match="made without a permanent core: choose another"):
            create("plain", **more)
    made = create("core", core=core_records())
    assert create("core").directory.core == made.directory.core is not None
    node = made.directory.paths(0)[0][1]
    assert min(node.block.layers) > 0 and not training._is_replayed(made.directory, node)
    plain = S3TRun.open(tmp_path / "plain").directory
    assert training._is_replayed(plain, plain.paths(0)[0][0])


def core_node_directory(run: S3TRun) -> Path:
    assert run.directory.core is not None
    return run.path / "nodes" / run.directory.core.key


def edit_tensors(path: Path) -> None:
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    next(iter(tensors.values())).__iadd__(1)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def edit_core_record(run: S3TRun) -> None:
    path = run.directory.slices.path(CORE)
    path.write_bytes(path.read_bytes().replace(b"dish", b"fish", 1))


def another_core(run: S3TRun) -> None:
    """Records, header and digests agree with each other."""
    run.directory.slices.write_core(core_records()[1:])


def another_core_in_run_json(run: S3TRun) -> None:
    another_core(run)
    edit_json(run.path / "run.json", core=run.directory.slices.header(CORE).root)


def garble_core_node(run: S3TRun) -> None:
    edit_tensors(core_node_directory(run) / WEIGHTS_NAME)


def retrain_core_by_hand(run: S3TRun) -> None:
    node = core_node_directory(run)
    edit_tensors(node / WEIGHTS_NAME)
    edit_json(node / "manifest.json", weights=file_digest(node / WEIGHTS_NAME))


def served(run: S3TRun, name: str) -> Path:
    return run.directory.served.resolve() / name


def swap_core_and_shard(run: S3TRun) -> None:
    served(run, "core").rename(served(run, "aside"))
    served(run, "shard-0").rename(served(run, "core"))
    served(run, "aside").rename(served(run, "shard-0"))


def serve_a_shard_as_the_core(run: S3TRun) -> None:
    shutil.rmtree(served(run, "core"))
    shutil.copytree(served(run, "shard-0"), served(run, "core"))


GARBLED: dict[str, tuple[Callable[[S3TRun], object], str, str]] = {
    "a record edited": (edit_core_record, "records", "permanent core: they are not the ones"),
    "other records": (another_core, "records", "permanent core: they are not those of run.json"),
    "other records and run.json": (another_core_in_run_json, "records", "than the ledger"),
    "records removed": (
        lambda run: run.directory.slices.path(CORE).unlink(), "records", "cannot be checked",
    ),
    "no core in run.json": (
        lambda run: edit_json(run.path / "run.json", core=None), "records", "than the ledger",
    ),
    "its weights": (garble_core_node, "nodes", "weights or words are not those of its manifest"),
    "its weights and manifest": (retrain_core_by_hand, "nodes", "that the ledger logged"),
    "what is served of it": (
        lambda run: edit_tensors(served(run, "core") / WEIGHTS_NAME), "served", "core: a tensor diff",
    ),
    "its band in a shard": (
        lambda run: edit_tensors(served(run, "shard-1") / WEIGHTS_NAME), "served", "shard 1: a tens",
    ),
    "its lineage": (
        lambda run: edit_json(served(run, "core") / "lineage.json", nodes=[]), "served", "core: it ho",
    ),
    "not served": (lambda run: shutil.rmtree(served(run, "core")), "served", "core: lineage.json"),
    "served as a shard": (swap_core_and_shard, "served", "core: .*depends on deleted or unknown"),
    "a shard served as it": (serve_a_shard_as_the_core, "served", "core: .*deleted or unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", GARBLED)
def test_a_garbled_core_is_caught(run: S3TRun, case: str) -> None:
    assert all(check.passed for check in run.verify())
    garble, check, message = GARBLED[case]
    garble(run)
    problems = {c.name: c.problems for c in S3TRun.open(run.path).verify() if not c.passed}
    assert check in problems
    assert any(re.search(message, problem) for problem in problems[check]), problems


def test_a_damaged_core_is_trained_again_and_holds_up_no_deletion(
    run: S3TRun,
) -> None:
    whole = node_bytes(run)
    garble_core_node(run)
    hit = run.directory.slices.place("person 3").shard
    # It is under every node of that shard; the other one's served adapter is as it was.
    assert run.delete(["person 3"]).served == {hit: 0, 1 - hit: 3}
    with stubbed_training():
        train_stub(run)
    assert run.directory.core is not None
    key = run.directory.core.key
    assert core_bytes(run) == {name: data for name, data in whole.items() if name.startswith(key)}
    assert all(check.passed for check in run.verify())


def test_records_without_a_subject_column_can_be_a_core(tmp_path: Path) -> None:
    core: list[Record] = make_records([{"text": "public"}])
    run = make_stub_run(tmp_path / "run", make_records([{"text": "mine"}, {"text": "yours"}]), core)
    with pytest.raises(UserError, match="permanent core"):
        run.delete([core[0].subject])
