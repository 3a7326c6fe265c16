"""Selective synaptic dampening: what is selected, by how much it shrinks, and what it is measured by."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.methods.ssd import SSD, dampening, importance
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.tuning import tune
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.errors import UserError
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer


def session_of(model: Any, config: UnlearningConfig, tmp_path: Path) -> Session:
    forget, retain = forget_and_retain()
    tuned = tune(model, LORA, config.full, None, 0)
    session = Session(tuned, make_tiny_tokenizer(), forget, retain, config, tmp_path)
    session.sides = {"forget": session.encode(forget), "retain": session.encode(retain)}
    return session


def test_dampening_by_hand() -> None:
    forget = torch.tensor([4.0, 4.0, 4.0, 0.0, 4.0])
    kept = torch.tensor([1.0, 3.0, 2.0, 0.0, 0.0])
    # alpha 2: selected where forget > 2 kept, strictly; then kept / forget, times lambda.
    assert dampening(forget, kept, 2.0, 1.0).tolist() == [0.25, 1.0, 1.0, 1.0, 0.0]
    assert dampening(forget, kept, 2.0, 0.5).tolist() == [0.125, 1.0, 1.0, 1.0, 0.0]
    assert dampening(forget, kept, 2.0, 8.0).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("rows", [1, 3])
def test_importance_is_the_mean_squared_gradient(rows: int, tmp_path: Path) -> None:
    """Against Transformers' own loss and `backward`, row by row and in batches; pads do not count."""
    session = session_of(knowing_model(), arguments(tmp_path, "ssd", full=True), tmp_path)
    examples = session.sides["forget"][:5]
    found = importance(session, examples, rows)
    name = "model.layers.1.mlp.down_proj.weight"
    weight, squares = session.tuned.trainable[name], []
    for start in range(0, 5, rows):
        session.model.zero_grad()
        part = examples[start : start + rows]
        tokens = sum(sum(label >= 0 for label in e.labels) for e in part)
        for example in part:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            own = sum(label >= 0 for label in example.labels)
            (session.model(input_ids=ids, labels=labels).loss * own / tokens).backward()
        assert weight.grad is not None
        squares.append(weight.grad.square().clone())
    assert torch.allclose(found[name], torch.stack(squares).mean(0), rtol=1e-3, atol=1e-9)


def test_weights_are_multiplied_by_what_the_importances_say(tmp_path: Path) -> None:
    session = session_of(knowing_model(), arguments(tmp_path, "ssd", full=True), tmp_path)
    before = {n: p.detach().clone() for n, p in session.tuned.trainable.items()}
    kept = importance(session, [*session.sides["retain"], *session.sides["forget"]], 1)
    forget = importance(session, session.sides["forget"], 1)
    SSD(alpha=1.5, with_forget=True).finish(session)
    changed = 0
    for name, parameter in session.tuned.trainable.items():
        factor = torch.ones_like(parameter)
        chosen = forget[name] > 1.5 * kept[name]
        factor[chosen] = (kept[name] / forget[name])[chosen]
        changed += int(chosen.sum())
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-5, atol=0)
    total = sum(p.numel() for p in session.tuned.trainable.values())
    assert changed > 0 and session.notes == [
        f"{changed / total:.2%} of the parameters were dampened"
    ]


def test_per_module_importances_do_not_depend_on_their_scale() -> None:
    forget, kept = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
    one = SSD(alpha=1.2, per_module=True)
    expected = torch.tensor([1.0, 1 / 1.5])  # means 2 and 1: 0.5 against 1, and 1.5 against 1
    assert torch.allclose(one._factor(forget, kept), expected)
    assert torch.allclose(one._factor(forget * 1000, kept), expected)
    assert not torch.allclose(SSD(alpha=1.2)._factor(forget * 1000, kept), expected)


def test_an_adapter_that_is_there_is_dampened_and_the_base_is_not(tmp_path: Path) -> None:
    from peft import get_peft_model

    model: Any = get_peft_model(knowing_model(), copy.deepcopy(LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    forget, retain = forget_and_retain()
    config, method = arguments(tmp_path, "ssd"), make_method("ssd", {"alpha": 2.0})
    unlearn(model, make_tiny_tokenizer(), forget, retain, config, method)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".lora_" in name for name in moved)
    for name in moved:
        after = dict(model.named_parameters())[name]
        assert (after.abs() <= before[name].abs()).all() and (after * before[name] >= 0).all()


def test_mistakes_are_told(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    run = (knowing_model(), make_tiny_tokenizer(), forget, retain)
    with pytest.raises(UserError, match="a fresh LoRA holds none"):
        unlearn(*run, arguments(tmp_path / "a", "ssd"), make_method("ssd"))
    config, method = arguments(tmp_path / "b", "ssd", full=True), SSD(with_forget=True)
    with pytest.raises(UserError, match="must be below 3"):
        unlearn(*run, config, method)
    with pytest.raises(UserError, match="above 0"):
        SSD(alpha=0.0)
