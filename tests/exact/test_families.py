"""The model families that PEFT supports: the same run on each, and replayed states bit for bit."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from llm_unlearn.decoder import find_decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.exact.modules import find_linear_modules
from llm_unlearn.exact.replay import capture, replay, returns_tuple
from tests.tiny import (
    FAMILIES,
    load_tiny,
    make_run,
    make_tiny_model,
    make_tiny_tokenizer,
    node_bytes,
)

ALL = [*FAMILIES, "gpt2"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for family in ALL:
        make_tiny_model(family).save_pretrained(root / family)
        make_tiny_tokenizer().save_pretrained(root / family)
    return {family: root / family for family in ALL}


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("blocks", ["layers", "ranks"])
def test_every_family_trains_deletes_and_loads(
    bases: dict[str, Path], tmp_path: Path, family: str, blocks: str
) -> None:
    base = bases[family]
    run = make_run(
        tmp_path / "run", base, blocks=blocks, num_slices=2, num_sequences=2, max_steps=1
    )
    full = node_bytes(run)
    done = run.delete(["person 3"])
    assert done.served == {0: 1}
    assert node_bytes(run).items() < full.items()
    assert all(check.passed for check in run.verify())
    model, tokenizer = load_tiny(base)
    ids = tokenizer("Question: what does person 1 eat?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = model(ids).logits
        served = (
            PeftModel.from_pretrained(model, str(run.directory.served / "shard-0"))
            .eval()(ids)
            .logits
        )
    assert not torch.equal(plain, served)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("boundary", [1, 3])
def test_replay_equals_the_whole_forward_pass_bit_for_bit(family: str, boundary: int) -> None:
    model = make_tiny_model(family)
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    states = capture(model, boundary, ids)
    assert states.shape == (9, 32)
    _, layers = find_decoder_layers(model)
    layers[boundary].requires_grad_(True)

    def gradients(use_replay: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        if use_replay:
            as_tuple = returns_tuple(model, ids)
            with replay(model, boundary, states[None], as_tuple):
                logits = model(input_ids=ids).logits
        else:
            logits = model(input_ids=ids).logits
        logits.square().sum().backward()
        grads = [p.grad for p in layers[boundary].parameters() if p.grad is not None]
        return logits.detach(), [grad.clone() for grad in grads]

    (whole, whole_gradients), (cut, cut_gradients) = gradients(False), gradients(True)
    assert torch.equal(whole, cut)
    assert whole_gradients
    assert all(torch.equal(a, b) for a, b in zip(whole_gradients, cut_gradients, strict=True))
    assert all("forward" not in vars(layer) for layer in layers)


def test_replay_skips_the_layers_below() -> None:
    model = make_tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    states = capture(model, 2, ids)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        find_decoder_layers(model)[1][0].mlp.up_proj.weight.zero_()
        assert not torch.equal(model(input_ids=ids).logits, expected)
        with replay(model, 2, states[None], as_tuple=False):
            assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_record_is_captured_without_regard_to_others() -> None:
    model = make_tiny_model()
    alone = capture(model, 2, torch.tensor([[5, 6, 7]]))
    capture(model, 2, torch.tensor([[9] * 40]))
    assert torch.equal(capture(model, 2, torch.tensor([[5, 6, 7]])), alone)


def test_layers_are_matched_by_index_and_not_by_substring() -> None:
    modules = find_linear_modules(make_tiny_model(layers=12), None)
    assert {module.layer for module in modules if module.name.startswith("model.layers.1.")} == {1}
    assert {module.layer for module in modules} == set(range(12))


def test_unknown_targets_and_families_are_one_clear_line() -> None:
    with pytest.raises(
        UserError, match=r"'nothing' is not in the decoder layers; they have \['down_proj'"
    ):
        find_linear_modules(make_tiny_model(), ["q_proj", "nothing"])
    model = make_tiny_model()
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="expected one list of 3 decoder layers"):
        find_decoder_layers(model)
