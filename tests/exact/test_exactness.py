"""The claim of the whole project: after a deletion, everything is as if the record had never been.

Bits are compared, not scores. The runs here are really trained, on tiny models; the broad random
histories are in `test_histories.py`.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM

from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import RunError
from llm_unlearn.exact import adapters, node_training, training
from llm_unlearn.exact.node_training import IsolationError
from tests.tiny import load_tiny, make_rows, make_run, node_bytes, served_bytes, tiny_records

KINDS = [
    ("ranks", "cumulative"),
    ("ranks", "disjoint"),
    ("layers", "cumulative"),
    ("layers", "disjoint"),
    ("whole", "cumulative"),
    ("whole", "disjoint"),
]


def without(records: list[Record], subjects: set[str]) -> list[Record]:
    return [record for record in records if record.subject not in subjects]


@pytest.mark.parametrize(("blocks", "slice_data"), KINDS)
def test_deletion_equals_never_having_seen_the_subject(
    tiny_base: Path, tmp_path: Path, blocks: str, slice_data: str
) -> None:
    options = {"blocks": blocks, "slice_data": slice_data, "num_shards": 1 + (blocks == "ranks")}
    run = make_run(tmp_path / "run", tiny_base, **options)
    gone = {"person 3", "person 8"}
    run.delete(sorted(gone))
    surviving = node_bytes(run)
    never = make_run(tmp_path / "never", tiny_base, without(tiny_records(), gone), **options)
    fresh = node_bytes(never)
    assert surviving.items() <= fresh.items()
    assert len(surviving) < len(fresh)
    run.rebuild()
    assert node_bytes(run) == fresh
    assert served_bytes(run) == served_bytes(never)


def test_a_node_moves_when_its_own_data_does(tiny_base: Path, tmp_path: Path) -> None:
    """Positive control of the tests here: bits do depend on every record of the slice."""
    run = make_run(tmp_path / "run", tiny_base, num_sequences=1)
    before = node_bytes(run)
    run.delete(["person 3"])
    run.rebuild()
    assert len(before) == len(node_bytes(run)) == 9
    home = run.directory.slices.place("person 3").slice
    kept = before.keys() & node_bytes(run).keys()
    assert len(kept) == 3 * home  # three files a node, the nodes before the hit slice


@pytest.mark.parametrize("blocks", ["ranks", "layers", "whole"])
def test_garbage_in_a_slice_reaches_only_the_nodes_that_depend_on_it(
    tiny_base: Path, tmp_path: Path, blocks: str
) -> None:
    run = make_run(tmp_path / "run", tiny_base, blocks=blocks)
    home = run.directory.slices.names[-1]
    noisy = []
    for record in tiny_records():
        if run.directory.slices.place(record.subject) == home:
            # Longer, other tokens, more rows: what a leak through padding, packing, a schedule or
            # a shared generator would carry over.
            noisy += make_records(
                [
                    {
                        "subject": record.subject,
                        "prompt": "zzz " * 9 + record.id[:6],
                        "completion": " qq" * (3 + row),
                    }
                    for row in range(3)
                ],
                subject_column="subject",
            )
        else:
            noisy.append(record)
    other = make_run(tmp_path / "other", tiny_base, noisy, blocks=blocks)
    ours, theirs = node_bytes(run), node_bytes(other)
    clean = {node.key for node in run.directory.wanted().values() if home.slice not in node.path}
    assert clean
    for key in clean:
        for name in ("manifest.json", "adapter_model.safetensors"):
            assert ours[f"{key}/{name}"] == theirs[f"{key}/{name}"]
    assert {name.split("/")[0] for name in ours.keys() & theirs.keys()} == clean


def test_adding_a_shard_member_does_not_move_the_others(tiny_base: Path, tmp_path: Path) -> None:
    records = tiny_records()
    few = make_run(tmp_path / "few", tiny_base, records, train=False)
    more = make_run(
        tmp_path / "more",
        tiny_base,
        [*records, *make_records(make_rows(5, 1, "guest"), "subject")],
        train=False,
    )
    for name in few.directory.slices.names:
        ours = {record.subject for record in few.directory.slices.read(name)}
        theirs = {record.subject for record in more.directory.slices.read(name)}
        assert ours == {subject for subject in theirs if subject.startswith("person")}


@pytest.mark.parametrize("blocks", ["ranks", "layers", "whole"])
def test_nothing_outside_the_block_changes_while_it_is_trained(
    tiny_base: Path, tmp_path: Path, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_base, blocks=blocks, num_sequences=1, train=False)
    model, tokenizer = load_tiny(tiny_base)
    pristine = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[int] = []
    attach = node_training.attach

    def watched(*arguments: object) -> PeftModel:
        attached = attach(*arguments)  # pyright: ignore[reportArgumentType]
        trainable = {
            name for name, parameter in attached.named_parameters() if parameter.requires_grad
        }
        frozen = {
            name: t.detach().clone()
            for name, t in attached.state_dict().items()
            if name not in trainable
        }
        started = {
            name: p.detach().clone() for name, p in attached.named_parameters() if name in trainable
        }

        def check(step: int, _total: int) -> None:
            now = attached.state_dict()
            assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
            assert any(not torch.equal(now[name], tensor) for name, tensor in started.items())
            seen.append(step)

        progress.check = check
        return attached

    class Spy:
        check = None

        def node(self, *_: object) -> None: ...
        def warn(self, *_: object) -> None: ...
        def step(self, step: int, total: int) -> None:
            assert self.check is not None
            self.check(step, total)

    progress = Spy()
    monkeypatch.setattr(node_training, "attach", watched)
    run.train(model, tokenizer, progress)  # pyright: ignore[reportArgumentType]
    assert seen == [1, 2] * 3
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in pristine.items())
    assert model.state_dict().keys() == pristine.keys()


def test_a_change_outside_the_block_is_caught_and_publishes_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_base, train=False)
    model, tokenizer = load_tiny(tiny_base)
    fit = node_training._fit

    def leaking(peft_model: PeftModelForCausalLM, *arguments: object) -> None:
        fit(peft_model, *arguments)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            next(peft_model.get_base_model().parameters()).view(-1)[0] += 1e-3

    monkeypatch.setattr(node_training, "_fit", leaking)
    with pytest.raises(IsolationError, match="outside the block"):
        run.train(model, tokenizer)
    assert node_bytes(run) == {}


def test_divergence_is_caught(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", tiny_base, train=False, learning_rate=1e30, max_steps=4, max_grad_norm=0.0
    )
    with pytest.raises(RunError, match="diverged"):
        run.train(*load_tiny(tiny_base))
    assert node_bytes(run) == {}


@pytest.mark.parametrize("blocks", ["ranks", "layers", "whole"])
def test_the_served_adapter_computes_what_its_nodes_do(
    tiny_base: Path, tmp_path: Path, blocks: str
) -> None:
    """The assembled adapter against base + frozen prefix + last block, as it was in training."""
    run = make_run(tmp_path / "run", tiny_base, blocks=blocks, num_sequences=1)
    directory = run.directory
    path = directory.paths(0)[0]
    last = directory.nodes.load(path[-1].key)
    model, tokenizer = load_tiny(tiny_base)
    ids = tokenizer("Question: what does person 1 eat?", return_tensors="pt")["input_ids"]
    served = PeftModel.from_pretrained(
        load_tiny(tiny_base)[0], str(directory.served / "shard-0")
    ).eval()
    known = training._load_task(directory, tokenizer, path[-1])
    task = node_training.NodeTask(path[-1], known.parents, known.parts, [], None, known.start)
    trained = node_training.attach(model, task, directory.config, directory.shape).eval()
    node_training._load(trained, last, node_training.TRAINED)
    with torch.no_grad():
        ours, theirs, plain = (
            served(ids).logits,
            trained(ids).logits,
            load_tiny(tiny_base)[0](ids).logits,
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_whole_block_continues_from_the_one_before_it(
    tiny_base: Path, tmp_path: Path, num_shards: int
) -> None:
    """The second stage starts from the first one's tensors, and is what is served of both."""
    options = {"blocks": "whole", "num_shards": num_shards, "num_slices": 2}
    run = make_run(tmp_path / "run", tiny_base, **options).directory
    model, tokenizer = load_tiny(tiny_base)
    first, second = run.paths(0)[0]
    task = training._load_task(run, tokenizer, second)
    held = run.nodes.load(first.key)
    assert task.parents == [] and task.start is not None
    assert all(np.array_equal(task.start[name], tensor) for name, tensor in held.items())

    def train(start: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        examples = [example for _, example in task.examples]
        node_task = node_training.NodeTask(second, [], [], examples, None, start)
        out = str(tmp_path / "out")
        return node_training.train_node(model, tokenizer, node_task, run.config, run.shape, out)

    continued, anew = train(task.start), train(None)
    kept = run.nodes.load(second.key)
    assert all(np.array_equal(kept[name], continued[name]) for name in kept)
    assert not any(np.array_equal(kept[name], anew[name]) for name in kept)
    served = adapters.load_tensors(run.served / "shard-0" / adapters.WEIGHTS_NAME)
    assert served.keys() == kept.keys()
    assert all(np.array_equal(served[name], kept[name]) for name in kept)


def test_sisa_goes_back_to_the_checkpoint_before_the_slice(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, blocks="whole")
    directory = run.directory
    first, second, _ = directory.paths(0)[0]
    checkpoints = [directory.nodes.load(node.key) for node in (first, second)]
    name = next(n for n in directory.slices.names if n.slice == 2)
    done = run.delete([directory.slices.read(name)[0].subject])
    assert done.served == {0: 2} and done.nodes_removed == 1
    served = adapters.load_tensors(directory.served / "shard-0" / adapters.WEIGHTS_NAME)
    assert adapters.to_bytes(served) == adapters.to_bytes(checkpoints[1])
    name = next(n for n in directory.slices.names if n.slice == 1)
    assert run.delete([directory.slices.read(name)[0].subject]).served == {0: 1}
    served = adapters.load_tensors(directory.served / "shard-0" / adapters.WEIGHTS_NAME)
    assert adapters.to_bytes(served) == adapters.to_bytes(checkpoints[0])


def test_a_shard_with_nothing_left_is_the_base_model_bit_for_bit(
    tiny_base: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_base, num_slices=1, num_sequences=1)
    run.delete(["person 0"])
    served = run.directory.served / "shard-0"
    assert "this is the base model" in (served / "README.md").read_text()
    model, tokenizer = load_tiny(tiny_base)
    ids = tokenizer("Question: what does person 1 eat?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = load_tiny(tiny_base)[0](ids).logits
        got = PeftModel.from_pretrained(model, str(served)).eval()(ids).logits
    assert np.array_equal(expected.numpy().view(np.uint8), got.numpy().view(np.uint8))
    assert run.status().shards[0].served_depth == 0


def test_deleting_everybody_leaves_an_empty_run_that_verifies(
    tiny_base: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    run.delete([f"person {number}" for number in range(12)])
    assert node_bytes(run) == {}
    assert run.status().shards[0].records == 0
    assert all(check.passed for check in run.verify())
    assert run.rebuild().trained == 0


def test_replayed_states_train_the_same_block_up_to_rounding(
    tiny_base: Path, tmp_path: Path
) -> None:
    run = make_run(
        tmp_path / "run", tiny_base, blocks="layers", num_sequences=1, train=False
    ).directory
    model, tokenizer = load_tiny(tiny_base)
    node = run.paths(0)[0][0]
    task = training._load_task(run, tokenizer, node)
    assert training._cache_states(run, model, task)
    replayed = training._compute(run, model, tokenizer, task, None)
    plain_task = node_training.NodeTask(
        node, [], [], [example for _, example in task.examples], states=None
    )
    plain = node_training.train_node(
        model, tokenizer, plain_task, run.config, run.shape, str(tmp_path / "out")
    )
    start = node_training.initial_block(node, run.shape)
    for name in plain:
        np.testing.assert_allclose(replayed[name], plain[name], rtol=1e-3, atol=1e-5)
    assert any(not np.array_equal(plain[name], start[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_histories_of_real_training(tiny_base: Path, tmp_path: Path, seed: int) -> None:
    """What `test_histories.py` shows for hundreds of histories, here with nothing replaced."""
    chance = random.Random(seed)
    slices = chance.randint(2, 3)
    blocks = ["ranks", "layers", "whole"][seed % 3]
    options = {
        "num_shards": chance.randint(1, 2),
        "num_slices": slices,
        "num_sequences": chance.randint(1, slices) if blocks != "whole" else 1,
        "blocks": blocks,
        "slice_data": chance.choice(["cumulative", "disjoint"]),
    }
    run = make_run(tmp_path / "run", tiny_base, **options)
    gone: set[str] = set()
    for _ in range(3):
        asked = {f"person {chance.randrange(12)}" for _ in range(chance.randint(1, 2))}
        run.delete(sorted(asked))
        gone |= asked
        if chance.random() < 0.5:
            run.train(*load_tiny(tiny_base))
    never = make_run(tmp_path / "never", tiny_base, without(tiny_records(), gone), **options)
    assert node_bytes(run).items() <= node_bytes(never).items()
    run.train(*load_tiny(tiny_base))
    assert node_bytes(run) == node_bytes(never)
    assert served_bytes(run) == served_bytes(never)
    assert all(check.passed for check in run.verify(replay=1))
