"""With its gradients and changes projected, a model answers retain inputs as before; without, not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llm_unlearn.approximate.grams import input_grams
from llm_unlearn.approximate.retain_projection import (
    Projected,
    RetainProjection,
    kept_directions,
)
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.encoding import Example
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import UserError
from tests.approximate.known import arguments, forget_and_retain
from tests.tiny import make_tiny_model, make_tiny_tokenizer

ALL = 1 - 1e-9  # of the variance
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def few_retain() -> list[Record]:
    """Fewer tokens than a layer is wide, so that their inputs span a part of its space only."""
    return make_records([{"text": "dish number 3"}])


def model_of(family: str) -> Any:
    return make_tiny_model(family, layers=2, width=64)


def answers(model: Any, record: Record) -> torch.Tensor:
    ids = make_tiny_tokenizer()(record.content["text"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


def train(model: Any, output: Path, variance: float | None, full: bool, name: str = "ga") -> Any:
    forget, _ = forget_and_retain()
    config = arguments(
        output, name, full=full, retain_projection=variance, num_train_epochs=3, weight_decay=0.1
    )
    unlearn(
        model,
        make_tiny_tokenizer(),
        forget,
        few_retain(),
        config,
        make_method(name),
        copy.copy(LORA),
    )
    return config


def read(output: Path, before: Any, full: bool) -> Any:
    if full:
        return type(before).from_pretrained(output, dtype=torch.float32)
    return PeftModel.from_pretrained(copy.deepcopy(before), str(output))


def test_kept_directions_are_the_fewest_that_hold_the_variance() -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[
        0
    ]
    gram = turn @ torch.diag(torch.tensor([6.0, 3.0, 1.0]).double()) @ turn.T
    for variance, count in ((0.5, 1), (0.6001, 2), (0.9, 2), (0.95, 3)):
        span = kept_directions(gram, variance)
        assert span.shape == (3, count)
        assert torch.allclose((span.T @ turn[:, :count]).abs(), torch.eye(count).double())


@pytest.mark.parametrize("turned", [False, True])
def test_a_gradient_loses_its_part_on_the_span(turned: bool) -> None:
    span = torch.tensor([[0.6], [0.8]])
    weight = Projected(span, torch.zeros(1, 1), turned)
    gradient = torch.tensor([[1.0, 2.0]])
    # (1, 2) less its part 2.2 along (0.6, 0.8)
    expected = torch.tensor([[1.0 - 1.32, 2.0 - 1.76]])
    got = weight.off_the_span(gradient.T if turned else gradient)
    assert torch.allclose(got, expected.T if turned else expected)


def test_what_a_weight_does_to_the_span_is_put_back_and_the_rest_left() -> None:
    weight = Projected(torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0]]), turned=False)
    parameter = torch.tensor([[1.0, 2.0]])
    weight.put_back(parameter)
    assert parameter.tolist() == [[5.0, 2.0]]


def test_what_is_neither_projected_nor_free_is_not_stepped_on() -> None:
    parameters = {"norm": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    for parameter in parameters.values():
        parameter.grad = torch.ones(2)
    RetainProjection({}, {"b"}).apply(parameters)
    torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.5).step()
    assert parameters["norm"].tolist() == [1.0, 1.0]
    assert parameters["b"].tolist() != [1.0, 1.0]


def test_grams_are_those_of_every_token_and_of_no_padding() -> None:
    model, rows = model_of("llama"), [[5, 6, 7], [8, 9], [10, 11, 12]]
    examples = [Example("", ids, ids, was_cut=False) for ids in rows]
    name = "model.layers.0.self_attn.q_proj"
    found = input_grams(model, {name}, examples, pad_token_id=0)[name]
    normed = model.model.layers[0].input_layernorm
    with torch.no_grad():
        inputs = normed(
            model.model.embed_tokens(torch.tensor([*rows[0], *rows[1], *rows[2]]))
        ).double()
    assert torch.allclose(found, inputs.T @ inputs, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "full"), [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True)]
)
def test_retain_answers_stay_to_the_fifth_decimal(family: str, full: bool, tmp_path: Path) -> None:
    """Weight decay and Adam included. The control without it moves a thousand times further."""
    before, [retain] = model_of(family), few_retain()
    wanted = answers(before, retain)
    moved = {}
    for variance in (ALL, None):
        output = tmp_path / str(variance)
        train(copy.deepcopy(before), output, variance, full)
        model = read(output, before, full)
        moved[variance] = float((answers(model, retain) - wanted).abs().max())
        other = make_records([{"text": "what does person 3 eat on day 1"}])[0]
        assert (answers(model, other) - answers(before, other)).abs().max() > 0.05
    assert moved[ALL] < 1e-5 * wanted.abs().max().clamp_min(1)
    assert moved[None] > 0.05


def test_an_adapter_that_goes_on_keeps_its_own_answers(tmp_path: Path) -> None:
    """Its B is frozen, its A changes off the span alone."""
    base, [retain] = model_of("llama"), few_retain()
    adapted = get_peft_model(copy.deepcopy(base), copy.deepcopy(LORA))
    generator = torch.Generator().manual_seed(1)
    second = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    for parameter in second.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    first = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_A" in n}
    wanted, kept = answers(adapted, retain), {n: p.detach().clone() for n, p in second.items()}
    train(adapted, tmp_path, ALL, full=False)
    assert (answers(adapted, retain) - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp_min(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            assert torch.equal(parameter, kept[name])
        if "lora_A" in name:
            assert not torch.allclose(parameter, first[name], atol=1e-3)
    assert not [path.name for path in tmp_path.iterdir() if "gram" in path.name]


def test_mistakes_are_told(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    config = arguments(tmp_path / "none", "ga", retain_projection=0.9)
    with pytest.raises(UserError, match="give --retain"):
        unlearn(model_of("llama"), make_tiny_tokenizer(), forget, [], config, make_method("ga"))
    config = arguments(tmp_path / "full", "ga", retain_projection=ALL)
    model = make_tiny_model(layers=1, width=16)
    with pytest.raises(UserError, match="leaves nothing to train"):
        unlearn(model, make_tiny_tokenizer(), forget, retain * 4, config, make_method("ga"))
