"""RMU: its loss, its direction, and which layers it trains."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_unlearn.approximate.methods.rmu import RMU, draw_direction, row_squared_errors
from llm_unlearn.approximate.tuning import Tuned, last_projections
from llm_unlearn.approximate.unlearn import _tuned
from llm_unlearn.errors import UserError
from tests.approximate.fixed import Fixed, make_batch, make_step, means
from tests.approximate.known import LORA, arguments
from tests.tiny import make_tiny_model


def test_squared_errors_are_a_mean_of_a_rows_tokens() -> None:
    hidden_BTD = torch.tensor([[[1.0, 3.0], [0.0, 0.0], [5.0, 5.0]]])
    target_D = torch.tensor([1.0, 1.0])
    tokens_BT = torch.tensor([[True, True, False]])
    assert row_squared_errors(hidden_BTD, target_D, tokens_BT).tolist() == [(2.0 + 1.0) / 2]
    assert row_squared_errors(hidden_BTD, hidden_BTD, tokens_BT).tolist() == [0.0]
    assert row_squared_errors(hidden_BTD, target_D, ~tokens_BT[:, :3] & False).tolist() == [0.0]


def test_the_direction_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    direction = draw_direction(64, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert math.hypot(*direction) == pytest.approx(1.0)
    assert min(direction) >= 0
    assert direction == draw_direction(64, 3) != draw_direction(64, 4)


def test_loss_is_zero_where_states_are_what_they_should_be() -> None:
    """Rows count alike, however many labels they have."""
    batches = {
        "forget": make_batch([[-100, 1, 1], [-100, -100, 1]], "forget"),
        "retain": make_batch([[-100, 1, 1]], "retain"),
    }
    method = RMU(steering_coefficient=2.0)
    method.load_state({"direction": [0.6, 0.8]})
    there = torch.tensor([1.2, 1.6])
    forget = torch.stack([there.expand(3, 2), torch.zeros(3, 2)])
    retain = torch.ones(1, 3, 2)
    logits = {"forget": torch.zeros(2, 3, 4), "retain": torch.zeros(1, 3, 4)}
    fixed = Fixed(
        logits,
        hidden={"forget": forget, "retain": retain},
        reference_hidden={"retain": retain},
    )
    found = means(method.terms(make_step(fixed, batches)), batches)
    assert found == {"forget": pytest.approx((0 + (1.44 + 2.56) / 2) / 2), "retain": 0.0}
    assert method.state() == {"direction": [0.6, 0.8]}


def trained(tuned: Tuned, layers: str) -> set[tuple[int, str]]:
    """Layer index and module of every trained tensor."""
    found = set()
    for name in tuned.trainable:
        match = re.search(rf"\.{layers}\.(\d+)\.([a-z0-9_.]+?)\.(?:lora_|weight|bias)", name)
        assert match, name
        found.add((int(match[1]), match[2]))
    return found


def tuned_by(method: RMU, model: Any, tmp_path: Path, full: bool = False) -> Tuned:
    return _tuned(model, arguments(tmp_path, "rmu", full=full), method, LORA)


def test_a_fresh_lora_is_on_three_projections(tmp_path: Path) -> None:
    tuned = tuned_by(RMU(), make_tiny_model(layers=12), tmp_path)
    assert trained(tuned, "layers") == {(n, "mlp.down_proj") for n in (5, 6, 7)}
    carrying = {n for n, _ in tuned.model.named_parameters() if ".lora_" in n}
    assert carrying == set(tuned.trainable), "no factor lies idle elsewhere"
    assert LORA.target_modules == "all-linear", "what the caller gave is left alone"


def test_a_layer_is_no_beginning_of_another(tmp_path: Path) -> None:
    tuned = tuned_by(RMU(layer=1), make_tiny_model(layers=12), tmp_path, full=True)
    assert trained(tuned, "layers") == {(0, "mlp.down_proj"), (1, "mlp.down_proj")}


def test_gpt2_has_other_names(tmp_path: Path) -> None:
    fresh = tuned_by(RMU(layer=1), make_tiny_model("gpt2", layers=12), tmp_path)
    full = tuned_by(RMU(layer=1), make_tiny_model("gpt2", layers=12), tmp_path, full=True)
    assert trained(fresh, "h") == trained(full, "h") == {(0, "mlp.c_proj"), (1, "mlp.c_proj")}


@pytest.mark.parametrize(
    ("family", "module"), [("gpt_neox", "mlp.dense_4h_to_h"), ("gemma2", "mlp.down_proj")]
)
def test_other_families(family: str, module: str, tmp_path: Path) -> None:
    tuned = tuned_by(RMU(), make_tiny_model(family), tmp_path)
    assert trained(tuned, "layers") == {(0, module), (1, module)}, "the middle of four is layer 1"


def adapted(targets: Any) -> Any:
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(make_tiny_model(layers=12), config)  # pyright: ignore


def test_a_continued_adapter(tmp_path: Path) -> None:
    everywhere = tuned_by(RMU(layer=1), adapted("all-linear"), tmp_path)
    assert trained(everywhere, "layers") == {(0, "mlp.down_proj"), (1, "mlp.down_proj")}
    elsewhere = tuned_by(RMU(layer=1), adapted(["q_proj", "v_proj"]), tmp_path)
    names = ("self_attn.q_proj", "self_attn.v_proj")
    assert trained(elsewhere, "layers") == {(n, name) for n in (0, 1) for name in names}
    merged = tuned_by(RMU(layer=1), adapted(["q_proj", "v_proj"]), tmp_path, full=True)
    assert trained(merged, "layers") == {(0, "mlp.down_proj"), (1, "mlp.down_proj")}


def test_a_person_decides(tmp_path: Path) -> None:
    config = arguments(tmp_path, "rmu", trainable=r"layers\.3\.self_attn\.o_proj")
    tuned = _tuned(make_tiny_model(), config, RMU(), LORA)
    assert trained(tuned, "layers") == {(3, "self_attn.o_proj")}


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="0 to 3"):
        RMU(layer=4).trainable(make_tiny_model())


def test_the_pattern_matches_whole_indices() -> None:
    pattern = last_projections(make_tiny_model(layers=12), [1])
    assert re.search(pattern, "base_model.model.model.layers.1.mlp.down_proj.lora_A.x.weight")
    for other in ("model.layers.10.mlp.down_proj", "model.layers.11.mlp.down_proj.weight"):
        assert not re.search(pattern, other)
