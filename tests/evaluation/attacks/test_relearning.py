"""Relearning: what it shows, what it leaves of the model (nothing changed), and the arithmetic."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.relearning import (
    Curve,
    RelearningAttack,
    area_between,
    compare_curves,
    relearn,
    steps_to_recover,
)
from llm_unlearn.evaluation.scorer import Item
from llm_unlearn.exact.ensemble import ShardEnsemble
from tests.evaluation.attacks.demonstration import (
    FORGET,
    RETAIN,
    base,
    know,
    refusing,
    tokenizer,
    tune,
)
from tests.tiny import make_tiny_model, make_tiny_tokenizer

ROWS = [("Question: who?", "nobody"), ("Question: what?", "a dish of beans")]
SHORT = RelearningAttack(steps=(0, 2, 4), learning_rate=1e-2, batch_size=2, rank=4)


def adapted(family: str = "llama") -> Any:
    model = get_peft_model(
        make_tiny_model(family), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


class Wrapper(torch.nn.Module):
    """Something like an ensemble: a model around another."""

    def __init__(self, model: Any, with_gradients: bool = True):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device
        self.with_gradients = with_gradients

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        with torch.set_grad_enabled(self.with_gradients and torch.is_grad_enabled()):
            return self.model(input_ids=input_ids, attention_mask=attention_mask)


def probe(model: Any) -> float:
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return float(logits.log_softmax(-1)[0, -1, 9])


def everything(model: Any) -> dict[str, Any]:
    """Whatever an attack could leave behind."""
    return {
        "bits": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "others": (random.getstate(), repr(np.random.get_state())),
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    bits = first.pop("bits"), second.pop("bits")
    return first == second and all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "adapted", "wrapper", "ensemble"])
def test_it_changes_behaviour_meanwhile_and_nothing_afterwards(kind: str, full: bool) -> None:
    model = {
        "adapted": adapted,
        "wrapper": lambda: Wrapper(adapted()),
        "ensemble": lambda: ShardEnsemble(adapted(), ["default", "__base__"]),
    }.get(kind, lambda: make_tiny_model(kind))()
    model.train()
    before = everything(model)
    attack = RelearningAttack(
        steps=SHORT.steps, learning_rate=1e-3 if full else 1e-2, batch_size=2, rank=4, full=full
    )
    curve = relearn(model, make_tiny_tokenizer(), ROWS, probe, attack)
    assert len(set(curve.values)) == 3
    assert same(before, everything(model))
    assert curve == relearn(model, make_tiny_tokenizer(), ROWS, probe, attack)


def test_it_cleans_up_behind_a_measure_that_fails() -> None:
    model = adapted()
    before = everything(model)

    def fail(_: Any) -> float:
        torch.rand(3)
        raise RuntimeError("measure failed")

    for full in (False, True):
        with pytest.raises(RuntimeError, match="measure failed"):
            relearn(model, make_tiny_tokenizer(), ROWS, fail, RelearningAttack(full=full))
    assert same(before, everything(model))


def test_at_step_zero_the_model_is_the_model() -> None:
    model = adapted().eval()
    curve = relearn(model, make_tiny_tokenizer(), ROWS, probe, SHORT)
    assert curve.values[0] == probe(model)


def test_seeds_give_other_curves_and_items_are_taken_as_they_are() -> None:
    model, encode = make_tiny_model(), make_tiny_tokenizer()
    curves = [relearn(model, encode, ROWS, probe, SHORT, seed=seed) for seed in (0, 1)]
    assert curves[0].values[1:] != curves[1].values[1:]
    items = [
        Item(
            tuple(encode(prompt)["input_ids"]),
            (*encode(" " + said, add_special_tokens=False)["input_ids"], encode.eos_token_id),
        )
        for prompt, said in ROWS
    ]
    assert relearn(model, encode, items, probe, SHORT) == curves[0]


def test_what_cannot_be_attacked_is_said() -> None:
    model, encode = make_tiny_model(), make_tiny_tokenizer()
    with pytest.raises(UserError, match="computes no gradients"):
        relearn(Wrapper(model, with_gradients=False), encode, ROWS, probe, SHORT)
    with pytest.raises(UserError, match="no rows"):
        relearn(model, encode, [], probe, SHORT)
    with pytest.raises(UserError, match="begins within 3 tokens"):
        relearn(model, encode, ROWS, probe, RelearningAttack(max_length=3))
    with pytest.raises(ValueError, match="rising steps"):
        RelearningAttack(steps=(10, 0))


def test_a_model_that_hides_relearns_what_it_is_not_shown_and_one_that_never_knew_does_not() -> (
    None
):
    before = tune(base(), FORGET + RETAIN[:48], 20)
    hiding = refusing(before, FORGET, RETAIN[:48])
    shown = [row for index, row in enumerate(FORGET) if index % 3 == 0]
    asked = [row for index, row in enumerate(FORGET) if index % 3]
    attack = RelearningAttack(steps=(0, 5, 10), learning_rate=1e-3, batch_size=16)

    def curves(model: Any) -> list[Curve]:
        return [
            relearn(model, tokenizer(), shown, lambda m: know(m, asked), attack, seed)
            for seed in range(2)
        ]

    result = compare_curves(curves(hiding), curves(base()), level=0.5)
    assert know(before, asked) > 0.9
    assert result.gain["unlearned"].mean > 0.15
    assert abs(result.gain["retrained"].mean) < 0.05
    assert result.area.mean > 0.3
    assert result.never["retrained"] == 2 and math.isnan(result.recovery["retrained"].mean)
    assert result.recovery["unlearned"].mean < 10


def test_area_and_recovery_of_straight_lines() -> None:
    rising = Curve((0, 10, 30), (0.0, 0.5, 1.0))
    flat = Curve((0, 10, 30), (0.25, 0.25, 0.25))
    # means 0.25 and 0.75 over 10 and 20 steps: 17.5 / 30, less the flat one's 0.25
    assert area_between(rising, flat) == pytest.approx(1 / 3)
    assert area_between(flat, rising) == pytest.approx(-1 / 3)
    assert steps_to_recover(rising, 0.75) == (20.0, True)
    assert steps_to_recover(rising, 0.0) == (0.0, True)
    assert math.isnan(steps_to_recover(flat, 0.3).steps)
    assert not steps_to_recover(flat, 0.3).recovered
    assert math.isnan(area_between(Curve((0,), (1.0,)), Curve((0,), (0.0,))))
    with pytest.raises(ValueError, match="same steps"):
        area_between(rising, Curve((0, 10), (0.0, 1.0)))


def test_seeds_are_paired() -> None:
    first = [Curve((0, 1), (seed, seed + 1.0), seed) for seed in range(3)]
    second = [Curve((0, 1), (seed, seed), seed) for seed in reversed(range(3))]
    area = compare_curves(first, second).area
    assert area.mean == area.lower == area.upper == 0.5  # the seeds' own heights cancel
    with pytest.raises(ValueError, match="same seeds"):
        compare_curves(first, second[:2])
    with pytest.raises(ValueError, match="each seed once"):
        compare_curves([first[0], first[0]], first[0])
