"""Maximum entropy, and fine-tuning on the retain set with an L1 norm."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn.approximate.methods.maximum_entropy import uniform_divergence
from llm_unlearn.approximate.methods.retain_ft import decayed
from llm_unlearn.approximate.step import Step
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.errors import UserError
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer


def test_the_divergence_from_uniform_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]])
    wanted = sum(1 / 3 * math.log(1 / 3 / q) for q in (0.5, 0.25, 0.25))
    found = uniform_divergence(p.log())[0]
    assert float(found[0]) == pytest.approx(wanted, rel=1e-5)
    assert float(found[1]) == pytest.approx(0.0, abs=1e-6)


def batch_of(labels: list[list[int]], mask: list[list[int]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[1, 40, 50, 60], [1, 90, 80, 0]]),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
        "index": torch.arange(2),
        "active": torch.tensor([True, True]),
    }


def test_entropy_counts_prompts_and_no_padding() -> None:
    labels = [[-100, -100, 50, 60], [-100, -100, 80, -100]]
    batch = batch_of(labels, [[1, 1, 1, 1], [1, 1, 1, 0]])
    model: Any = knowing_model()
    term = make_method("me").terms(Step(model, {"forget": batch, "retain": batch}, None))[0]  # pyright: ignore
    with torch.no_grad():
        log_BTV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        kl_BT = uniform_divergence(log_BTV.log_softmax(-1))
    wanted = kl_BT[0, :3].sum() + kl_BT[1, :2].sum()
    assert float(term.total) == pytest.approx(float(wanted), rel=1e-5)
    assert (term.unit, term.weight) == ("positions", 0.1)


def test_the_weight_of_l1_falls_to_nothing() -> None:
    assert [decayed(0.4, part) for part in (0.0, 0.5, 1.0)] == [0.4, 0.2, 0.0]
    with pytest.raises(UserError, match="--l1"):
        make_method("retain_ft", {"l1": -1.0})


def test_l1_is_the_norm_of_what_is_trained(tmp_path: Path) -> None:
    """Counted once a step, whatever the number of micro-batches; all retain rows in each epoch."""
    forget, retain = forget_and_retain()
    first = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = arguments(
            tmp_path / str(size), "retain_ft", full=True, learning_rate=1e-12, num_train_epochs=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        method = make_method("retain_ft", {"l1": 1e-3})
        report = unlearn(knowing_model(), make_tiny_tokenizer(), forget, retain, config, method)
        assert report.steps == len(retain) // 4
        first.append(report.history[0]["l1"])
    wanted = sum(float(p.abs().sum()) for p in knowing_model().parameters())
    assert first == pytest.approx([wanted] * 3, rel=1e-4)


def test_l1_makes_the_norm_fall(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    norms = {}
    for l1 in (0.0, 0.1):
        config = arguments(tmp_path / str(l1), "retain_ft", full=True)
        method = make_method("retain_ft", {"l1": l1})
        model = knowing_model()
        unlearn(model, make_tiny_tokenizer(), forget, retain, config, method, lora=LORA)
        norms[l1] = sum(float(p.detach().abs().sum()) for p in model.parameters())
        history = json.loads((tmp_path / str(l1) / "unlearning.json").read_text())["history"]
        assert ("l1" in history[0]) == (l1 > 0)
    assert norms[0.1] < 0.9 * norms[0.0]
