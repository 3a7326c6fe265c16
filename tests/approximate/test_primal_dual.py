"""PDU: its loss, and its dual variable in arithmetic and in training."""

import math
from pathlib import Path

import pytest
import torch

from llm_unlearn.approximate.methods.pdu import PDU, flattening_loss, updated_dual
from llm_unlearn.approximate.unlearn import unlearn
from llm_unlearn.errors import UserError
from tests.approximate.fixed import Fixed, logits_of, make_batch, make_step, means
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer


def test_flat_logits_are_the_aim() -> None:
    logits_BTV = torch.tensor([[[3.0, 0.0, 0.0], [7.0, 7.0, 7.0]]])
    assert flattening_loss(logits_BTV).tolist() == [[4.0, 0.0]]


def test_the_logits_that_predict_a_label_are_flattened() -> None:
    """The label at place 2 is predicted at place 1, where the loss is 4; elsewhere it is not."""
    batches = {
        "forget": make_batch([[-100, -100, 1, -100]], "forget"),
        "retain": make_batch([[-100, 0, -100, -100]], "retain"),
    }
    forget = torch.tensor([[[9.0, 0.0, 0.0], [3.0, 0.0, 0.0], [6.0, 0.0, 0.0], [12.0, 0.0, 0.0]]])
    retain = logits_of([[0.5, 0.25, 0.25]] * 3)
    before = logits_of([[0.8, 0.1, 0.1]] * 3)
    fixed = Fixed({"forget": forget, "retain": retain}, {"forget": forget, "retain": before})
    terms = PDU(retain_weight=7.0).terms(make_step(fixed, batches))
    assert means(terms, batches) == {
        "forget": pytest.approx(4.0),
        "retain": pytest.approx(-math.log(0.5)),
        "retain before": pytest.approx(-math.log(0.8)),
    }
    assert [term.weight for term in terms] == [1.0, 7.0, 0.0]


def test_dual_update() -> None:
    assert updated_dual(100.0, 0.2, 5.0) == pytest.approx(101.0)
    assert updated_dual(1.0, -0.5, 5.0) == 0.0, "never below 0"


def stepped(method: PDU, epoch: int, **found: float) -> float:
    method._epoch = epoch
    method.after_step({name.replace("_", " "): value for name, value in found.items()})
    return method.state()["dual"]


def test_the_dual_variable_moves_after_its_warm_up() -> None:
    method = PDU(retain_loss_eps=0.3, dual_step=2.0, retain_weight=1.0, dual_warmup=2)
    assert stepped(method, 1, retain=9.0) == 1.0
    assert stepped(method, 2, retain=0.8) == pytest.approx(2.0)
    assert stepped(method, 2, retain=0.1) == pytest.approx(1.6)


def test_the_limit_is_what_was_lost_before_and_a_margin() -> None:
    method = PDU(retain_weight=1.0, dual_step=1.0, dual_warmup=0, retain_loss_margin=0.1)
    assert stepped(method, 0, retain=0.9, retain_before=0.5) == pytest.approx(1.3)
    divergence = PDU(
        retain_weight=1.0, dual_step=1.0, dual_warmup=0, retain_loss_margin=0.1, retain_loss="kl"
    )
    assert stepped(divergence, 0, retain=0.3) == pytest.approx(1.2)


def test_a_resumed_run_knows_the_dual_variable() -> None:
    method = PDU(retain_loss_eps=0.0, dual_warmup=0)
    stepped(method, 0, retain=1.0)
    other = PDU(retain_loss_eps=0.0, dual_warmup=0)
    other.load_state(method.state())
    assert other.state() == method.state() == {"dual": 105.0}


def test_a_dual_variable_that_cannot_start_is_refused() -> None:
    with pytest.raises(UserError, match="above 0"):
        PDU(retain_weight=0.0)


def test_the_dual_variable_moves_once_an_optimizer_step(tmp_path: Path) -> None:
    """Two micro-batches a step, yet the history of steps alone gives the last value."""
    method = PDU(retain_weight=1.0, dual_step=2.0, dual_warmup=1, retain_loss_margin=0.01)
    config = arguments(
        tmp_path,
        "pdu",
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
    )
    report = unlearn(
        knowing_model(), make_tiny_tokenizer(), *forget_and_retain(), config, method, lora=LORA
    )
    assert report.steps == 6
    dual = 1.0
    for step in report.history[2:]:
        dual = max(0.0, dual + 2.0 * (step["retain"] - step["retain before"] - 0.01))
    assert dual != pytest.approx(1.0, abs=0.01)
    assert method.state()["dual"] == pytest.approx(dual)


def test_an_interrupted_run_ends_with_the_same_dual_variable(tmp_path: Path) -> None:
    """Cut off in the third epoch, after the dual variable has moved."""

    def run(output: Path, cut: int | None = None) -> tuple[float, list[dict[str, float]]]:
        def on_step(done: int, wanted: int) -> None:
            if done == cut:
                raise KeyboardInterrupt

        method = PDU(retain_weight=1.0, dual_step=2.0, dual_warmup=1, retain_loss_margin=0.01)
        options = {"num_train_epochs": 4, "learning_rate": 1e-2, "save_strategy": "epoch"}
        report = unlearn(
            knowing_model(), make_tiny_tokenizer(), *forget_and_retain(),
            arguments(output, "pdu", **options), method, lora=LORA, on_step=on_step,
        )  # fmt: skip
        return method.state()["dual"], report.history

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", cut=5)
    assert run(tmp_path / "cut") == whole
    assert whole[0] != pytest.approx(1.0, abs=0.01)
