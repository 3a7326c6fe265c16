"""Adapters in memory: few slots for many adapters must answer as if all were loaded."""

import copy
from pathlib import Path

import pytest
import torch

from llm_unlearn.data.partition import SliceName
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.library import Library
from llm_unlearn.exact.mixing import Mixing
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.selection import Rule
from tests.tiny import load_tiny, make_run

PROMPT = "Question: what does person 1 eat?"


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> S3TRun:
    """Four experts, learnt long enough to differ."""
    return make_run(
        tmp_path_factory.mktemp("library") / "run", tiny_base, exact_method="experts", num_shards=4,
        num_slices=1, num_sequences=1, max_steps=6, aggregate="select",
    )  # fmt: skip


def logits_of(library: Library, name: str, ids: torch.Tensor) -> torch.Tensor:
    slots = library.require([name])
    with torch.no_grad():
        return library.model(input_ids=ids, adapter_names=slots).logits


def test_swapped_adapters_compute_what_loaded_ones_do(run: S3TRun, tiny_base: Path) -> None:
    ids = torch.tensor([load_tiny(tiny_base)[1](PROMPT)["input_ids"]])
    everybody = Library(load_tiny(tiny_base)[0], run.directory.served, capacity=None)
    few = Library(load_tiny(tiny_base)[0], run.directory.served, capacity=2)
    expected = {name: logits_of(everybody, name, ids) for name in everybody.names}
    assert len({tuple(e.flatten().tolist()) for e in expected.values()}) == 4
    order = [0, 1, 2, 3, 1, 0, 0, 2, 3, 2, 1]
    for number in order:
        name = f"shard-{number}"
        assert torch.equal(logits_of(few, name, ids), expected[name])
        assert len(few.slots) == 2 and list(few.slots)[-1] == name


def test_a_batch_that_needs_more_than_there_is_room_for_has_them_all(
    run: S3TRun, tiny_base: Path
) -> None:
    library = Library(load_tiny(tiny_base)[0], run.directory.served, capacity=1)
    slots = library.require(library.names)
    assert len(set(slots)) == 4
    assert len(set(library.require(["shard-2", "__base__", "shard-2"]))) == 2


def test_adapters_of_other_shapes_are_loaded_anew(tiny_base: Path, tmp_path: Path) -> None:
    """After a deletion shards are served with different ranks."""
    run = make_run(tmp_path / "run", tiny_base, num_shards=2, num_slices=3, num_sequences=1)
    gone = next(
        record.subject
        for name in run.directory.slices.names
        if name.slice == 1
        for record in run.directory.slices.read(name)
    )
    run.delete([gone])
    ids = torch.tensor([load_tiny(tiny_base)[1](PROMPT)["input_ids"]])
    everybody = Library(load_tiny(tiny_base)[0], run.directory.served, capacity=None)
    one = Library(load_tiny(tiny_base)[0], run.directory.served, capacity=1)
    assert one._config("shard-0")["r"] != one._config("shard-1")["r"]
    for name in ("shard-0", "shard-1", "shard-0"):
        assert torch.equal(logits_of(one, name, ids), logits_of(everybody, name, ids))


@pytest.mark.parametrize("blocks", ["ranks", "layers"])
def test_mixed_rows_compute_what_peft_does(tiny_base: Path, tmp_path: Path, blocks: str) -> None:
    """Shards of different depths: other ranks, or other layers, and rows of the base between them."""
    run = make_run(
        tmp_path / "run", tiny_base, num_shards=2, num_slices=3, num_sequences=1, blocks=blocks
    )
    gone = next(r.subject for r in run.directory.slices.read(SliceName(0, 1)))
    run.delete([gone])
    tokenizer = load_tiny(tiny_base)[1]
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]] * 5)
    ids[:, 3] = torch.arange(20, 25)
    library = Library(load_tiny(tiny_base)[0], run.directory.served, capacity=None)
    for names in (
        ["shard-1", "__base__", "shard-0", "shard-1", "shard-0"],
        ["shard-0"] * 5,
        ["__base__"] * 5,
        ["shard-0", "__base__", "__base__", "shard-0", "__base__"],
    ):
        slots = library.require(names)
        with torch.no_grad():
            expected = library.model(input_ids=ids, adapter_names=slots).logits
            mixing = Mixing(library.model)
            with mixing.batch(slots, ids.device):
                got = library.model(input_ids=ids).logits
            again = library.model(input_ids=ids, adapter_names=slots).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(again, expected), "outside a batch of rows the layers are PEFT's"


def test_a_copy_of_an_ensemble_is_whole(run: S3TRun, tiny_base: Path) -> None:
    ids = torch.tensor([load_tiny(tiny_base)[1](PROMPT)["input_ids"]])
    ensemble = run.ensemble()
    with torch.no_grad():
        expected = ensemble(input_ids=ids).logits
        assert torch.equal(copy.deepcopy(ensemble)(input_ids=ids).logits, expected)


def test_merged_adapters_are_the_mean_of_their_updates(run: S3TRun, tiny_base: Path) -> None:
    ids = torch.tensor([load_tiny(tiny_base)[1](PROMPT)["input_ids"]])
    everybody = Library(load_tiny(tiny_base)[0], run.directory.served, capacity=None)
    modules = dict(everybody.model.named_modules())
    updates = {
        name.removeprefix("base_model.model."): sum(
            module.get_delta_weight(slot) for slot in everybody.slots.values()
        )
        / 4
        for name, module in modules.items()
        if hasattr(module, "get_delta_weight")
    }
    assert updates
    plain = load_tiny(tiny_base)[0]
    with torch.no_grad():
        for name, update in updates.items():
            plain.get_submodule(name).weight += update
        expected = torch.log_softmax(plain(input_ids=ids).logits, -1)
        merged = ShardEnsemble.from_run(
            load_tiny(tiny_base)[0], run.directory.served, Rule("merge")
        )
        got = merged(input_ids=ids).logits
    assert merged.adapters == ["merged"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_votes_count_adapters_and_the_mean_breaks_ties(run: S3TRun, tiny_base: Path) -> None:
    ids = torch.tensor([load_tiny(tiny_base)[1](PROMPT)["input_ids"]])
    library = Library(load_tiny(tiny_base)[0], run.directory.served, capacity=None)
    each = torch.cat([logits_of(library, name, ids) for name in library.names]).softmax(-1)
    votes = torch.nn.functional.one_hot(each.argmax(-1), each.shape[-1]).sum(0)
    expected = (votes + each.mean(0)) / 5
    with torch.no_grad():
        ensemble = ShardEnsemble.from_run(
            load_tiny(tiny_base)[0], run.directory.served, Rule("vote")
        )
        got = ensemble(input_ids=ids).logits[0].exp()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.sum(-1), torch.ones(ids.shape[1]), rtol=1e-4, atol=1e-4)
