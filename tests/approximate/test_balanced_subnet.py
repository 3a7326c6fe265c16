"""BalancedSubnet: the mask, its straight-through gradient, and weights that are really gone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.methods.balanced_subnet import masking, top_mask
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.errors import UserError
from tests.approximate.known import (
    LORA,
    arguments,
    forget_and_retain,
    knowing_model,
    knowledge,
    read_result,
)
from tests.tiny import make_tiny_model, make_tiny_tokenizer

TRAINING = {"learning_rate": 0.1, "per_device_train_batch_size": 8, "num_train_epochs": 5}


def run(model: Any, output: Path, full: bool = True, **flags: Any) -> Any:
    forget, retain = forget_and_retain()
    config = arguments(output, "balanced_subnet", full=full, **TRAINING)
    method = make_method("balanced_subnet", flags)
    return unlearn(model, make_tiny_tokenizer(), forget, retain, config, method, lora=LORA)


def test_the_mask_drops_the_smallest_scores_exactly() -> None:
    scores = torch.tensor([[0.3, -0.1], [0.2, -0.9]])
    assert top_mask(scores, 0.5).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert top_mask(scores, 0.49).tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert top_mask(scores, 0.2).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_the_gradient_goes_straight_through_to_dropped_scores_too() -> None:
    """d loss / d S = (d loss / d W_eff) * W * sign(S), by hand."""
    weight, scores = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.5, -0.1]])
    one = masking(scores, 0.5)
    (one(weight) * torch.tensor([[10.0, 100.0]])).sum().backward()
    assert one.scores.grad.tolist() == [[10.0 * 2.0, 100.0 * 3.0 * -1.0]]


def test_the_paper_s_flags_are_the_preset(tmp_path: Path) -> None:
    config = UnlearningConfig(
        output_dir=str(tmp_path), method="balanced_subnet", full=True, use_cpu=True, bf16=False
    )
    assert (config.learning_rate, config.weight_decay, config.num_train_epochs) == (0.1, 5e-4, 5.0)
    assert (config.optim, config.optim_args, config.max_grad_norm) == ("sgd", "momentum=0.9", 0)


def test_weights_are_gone_or_as_they_were_and_the_loss_chose_them(tmp_path: Path) -> None:
    """The control drops as many, chosen by chance."""
    forget, retain = forget_and_retain()
    before = knowing_model().state_dict()
    report = run(knowing_model(), tmp_path / "learnt", ratio=0.1)
    run(knowing_model(), tmp_path / "chance", ratio=0.1, forget_weight=0.0, retain_weight=1e-9)
    learnt, chance = (read_result(tmp_path / name, True) for name in ("learnt", "chance"))
    dropped = 0
    for name, weight in learnt.state_dict().items():
        is_masked = ".mlp." in name
        gone = (weight == 0) & (before[name] != 0)
        assert torch.equal(weight[~gone], before[name][~gone]), name
        assert int(gone.sum()) == (int(0.1 * weight.numel()) if is_masked else 0), name
        dropped += int(gone.sum())
    assert report.notes == [f"{dropped} weights of 6 layers were set to 0"]
    assert report.trained_parameters == sum(
        before[name].numel() for name in before if ".mlp." in name
    )
    assert knowledge(learnt, forget) < knowledge(chance, forget) - 0.5
    assert knowledge(learnt, forget) < knowledge(learnt, retain) - 0.5


def test_subnet_does_not_look_at_the_retain_set(tmp_path: Path) -> None:
    report = run(knowing_model(), tmp_path, ratio=0.1, retain_weight=0.0)
    assert report.history[0].keys() == {"step", "forget"}


def test_an_adapter_is_merged_and_gpt2_has_its_layers(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    adapted: Any = get_peft_model(knowing_model(), copy.deepcopy(LORA))
    assert run(adapted, tmp_path / "merged").notes[0].endswith("of 6 layers were set to 0")
    report = run(make_tiny_model("gpt2", layers=2), tmp_path / "gpt2")
    assert report.notes[0].endswith("of 4 layers were set to 0")
    with pytest.raises(UserError, match="say --full"):
        run(get_peft_model(knowing_model(), copy.deepcopy(LORA)), tmp_path / "lora", full=False)
    with pytest.raises(UserError, match="between 0 and 1"):
        make_method("balanced_subnet", {"ratio": 1.0})
    config = arguments(tmp_path / "none", "balanced_subnet", full=True, trainable="self_attn")
    with pytest.raises(UserError, match="no feed-forward weight"):
        unlearn(knowing_model(), make_tiny_tokenizer(), forget, retain, config)
