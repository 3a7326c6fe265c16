"""Holdout retraining: what moves, what must not, and the divergence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_unlearn.data.encoding import Example
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.holdout_retraining import (
    Retraining,
    check_holdout,
    holdout_retraining,
    symmetric_divergence,
)
from tests.tiny import load_tiny, tiny_records

RECORDS = [Example(f"r{n}", [5 + n, 6, 7, 8], [-100, 6, 7, 8], False) for n in range(6)]
HELD = [Example(f"h{n}", [40 + n, 41, 42], [-100, 41, 42], False) for n in range(6)]
FAST = Retraining(learning_rate=1e-2, epochs=2, batch_size=3)


def test_the_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    plain = 0.5 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))
    assert symmetric_divergence(p.log(), q.log()).tolist() == pytest.approx(plain.tolist())
    assert symmetric_divergence(p.log(), q.log())[1].item() == 0


@pytest.mark.parametrize("is_adapter", [True, False], ids=["its own adapter", "a fresh one"])
def test_the_model_comes_back_bit_for_bit(is_adapter: bool, tiny_base: Path) -> None:
    model, _ = load_tiny(tiny_base)
    if is_adapter:
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)  # pyright: ignore
    had = [p.requires_grad for p in model.parameters()]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = holdout_retraining(model, RECORDS, HELD, 0, FAST)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.requires_grad for p in model.parameters()] == had
    assert found.shape == (6,) and (found > 0).all()
    again = holdout_retraining(model, RECORDS, HELD, 0, FAST)
    assert np.array_equal(found, again)  # seeded, and without dropout


def test_what_is_like_the_held_out_text_moves_more_than_at_no_rate(tiny_base: Path) -> None:
    model, _ = load_tiny(tiny_base)
    still = holdout_retraining(model, RECORDS, HELD, 0, Retraining(learning_rate=0.0))
    assert still == pytest.approx(np.zeros(6), abs=1e-9)


def test_records_are_not_held_out() -> None:
    records, held = tiny_records(2), tiny_records(4)
    with pytest.raises(UserError, match="give --holdout"):
        check_holdout(records, [])
    with pytest.raises(UserError, match="4 held-out records are among those"):
        check_holdout(records, held)
    check_holdout(records, held[4:])
