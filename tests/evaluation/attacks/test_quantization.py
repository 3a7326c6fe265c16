"""Quantisation: the rounding, the exact way back, and that it can undo an unlearning."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.layers import linear_layers
from llm_unlearn.evaluation.attacks.quantization import (
    Group,
    codes_and_steps,
    collision_rate,
    quantize,
    rounded,
)
from llm_unlearn.exact.ensemble import ShardEnsemble
from tests.evaluation.attacks.demonstration import FORGET, PUBLIC, RETAIN, base, know, pairs, tune
from tests.tiny import make_tiny_model

WEIGHT = torch.tensor([[8.0, -3.9, 0.0, 0.6], [0.1, 0.05, -0.8, 0.04]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


def adapted(**options: Any) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", **options)
    model = get_peft_model(make_tiny_model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def test_rounding_is_to_the_nearest_multiple_of_the_papers_step() -> None:
    # step = 2 * 8 / 2^4 = 1 for the tensor and the first row, 0.1 for the second
    expected = {
        "tensor": [[8, -4, 0, 1], [0, 0, -1, 0]],
        "row": [[8, -4, 0, 1], [0.1, 0, -0.8, 0]],
        # steps 1, 0.075, 0.0125, 0.1
        2: [[8, -4, 0, 0.6], [0.1, 0.05, -0.8, 0]],
    }
    for group, values in expected.items():
        torch.testing.assert_close(rounded(WEIGHT, 4, group), torch.tensor(values).float())  # pyright: ignore


@pytest.mark.parametrize("group", ["tensor", "row", 3, 64])
def test_no_weight_moves_by_more_than_half_a_step(group: Group) -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    codes, steps = codes_and_steps(weight, 4, group)
    assert codes.abs().max() == 8
    assert (rounded(weight, 4, group) - weight).abs().max() <= steps.max() / 2 + 1e-6
    assert (rounded(weight, 16, group) - weight).abs().max() < 1e-4
    assert not rounded(torch.zeros(2, 3), 4, group).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("group", ["tensor", "row", 8])
def test_linear_weights_are_rounded_and_the_bits_come_back(family: str, group: Group) -> None:
    model = make_tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = logits(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with quantize(model, 4, group):
        assert not torch.equal(logits(model), own)
        changed = {
            name
            for name, value in model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert changed == {f"{name}.weight" for name in linear_layers(model)}
        assert not any("embed" in name or "head" in name or "norm" in name for name in changed)
    assert torch.equal(logits(model), own)
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gpt2_rows_are_outputs_though_its_weights_are_transposed() -> None:
    model = make_tiny_model("gpt2")
    layer = model.transformer.h[0].attn.c_attn  # (inputs, outputs)
    original = layer.weight.detach().clone()
    with quantize(model, 4, "row"):
        torch.testing.assert_close(layer.weight.detach(), rounded(original.T, 4, "row").T)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_adapters_are_rounded_together_with_the_base_weight(options: dict[str, Any]) -> None:
    model = adapted(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = logits(model)
    with quantize(model, 4, "row", adapters="merge"):
        found = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    with quantize(merged, 4, "row"):
        torch.testing.assert_close(found, logits(merged))
    assert torch.equal(logits(model), own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_kept_adapters_stay_exact_above_a_rounded_base() -> None:
    model = adapted()
    with quantize(model, 4, "row", adapters="keep"):
        kept = logits(model)
        with model.disable_adapter():
            base_alone = logits(model)
    plain = make_tiny_model()
    with quantize(plain, 4, "row"):
        torch.testing.assert_close(base_alone, logits(plain))
    with quantize(model, 4, "row", adapters="merge"):
        assert not torch.allclose(kept, logits(model))
    with model.disable_adapter(), quantize(model, 4, "row"):
        torch.testing.assert_close(logits(model), base_alone)


def test_the_bits_come_back_after_an_error() -> None:
    model = adapted()
    own = logits(model)
    with pytest.raises(RuntimeError, match="meanwhile"), quantize(model, 3):
        raise RuntimeError("meanwhile")
    assert torch.equal(logits(model), own)


def test_bad_settings_and_several_adapters_are_refused() -> None:
    model = make_tiny_model()
    for bits, group in ((1, "row"), (4, "column"), (4, 0)):
        with pytest.raises(ValueError, match="expected"), quantize(model, bits, group):  # pyright: ignore
            pass

    ensemble = ShardEnsemble(adapted(), ["default", "__base__"]).eval()
    own = logits(ensemble)
    with pytest.raises(UserError, match="adapters='keep'"), quantize(ensemble, 4):
        pass
    with quantize(ensemble, 4, adapters="keep"):
        assert not torch.equal(logits(ensemble), own)
    assert torch.equal(logits(ensemble), own)


def test_collisions_are_counted_among_all_and_among_changed_weights() -> None:
    first, second = make_tiny_model(), make_tiny_model()
    alike = collision_rate(first, second, 4)
    assert alike.share == 1 and alike.n_changed == 0 and math.isnan(alike.share_of_changed)
    layer = next(iter(linear_layers(second).values()))
    step = 2 * layer.weight.abs().amax(dim=1) / 16
    row = layer.weight.data[0]
    codes = torch.round(row / step[0])
    inner = codes.abs() < 7
    inner[inner.nonzero().flatten()[4:]] = False  # four weights of the first row
    places = inner.nonzero().flatten()
    row[places[:3]] = (codes[places[:3]] + 0.25) * step[0]  # stay in their cell
    row[places[3]] = (codes[places[3]] + 1) * step[0]  # crosses
    found = collision_rate(first, second, 4)
    assert (found.n_changed, found.share_of_changed) == (4, 0.75)
    assert found.share == 1 - 1 / found.n
    layer.weight.data *= 2  # the same codes on a scale of its own
    assert collision_rate(first, second, 4).share == found.share
    assert collision_rate(first, second, 4, shared_scale=True).share < found.share


def test_collisions_see_through_adapters() -> None:
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    assert collision_rate(model, merged, 8).share == 1
    assert collision_rate(make_tiny_model(), merged, 8).share < 1
    with pytest.raises(UserError, match="different layers"):
        collision_rate(model, make_tiny_model("gpt2"), 4)


def into_cells(model: Any, original: Any, bits: int) -> Any:
    """Move every weight back into the cell in which the original's is rounded."""
    for name, layer in linear_layers(original).items():
        weight = layer.weight.data
        codes, steps = codes_and_steps(weight, bits, "row")
        low, high = (codes - 0.499) * steps, (codes + 0.499) * steps
        largest = weight.abs().amax(dim=1, keepdim=True)
        moved = linear_layers(model)[name].weight.data.clamp(low, high).clamp(-largest, largest)
        linear_layers(model)[name].weight.data = torch.where(weight.abs() == largest, weight, moved)
    return model


def test_four_bits_undo_an_unlearning_that_stays_within_its_cells() -> None:
    original, victim = base(), base()
    forget = pairs(PUBLIC[:4])
    layers = [layer.weight for layer in linear_layers(victim).values()]
    unlearned = into_cells(
        tune(victim, RETAIN, 5, 1e-3, ascend=forget, parameters=layers), original, 4
    )
    assert know(unlearned, forget) < 0.5 and know(unlearned, RETAIN) > 0.7
    found = collision_rate(original, unlearned, 4)
    assert found.share == 1 and found.n_changed > 0.9 * found.n
    with quantize(unlearned, 4):
        assert know(unlearned, forget) > 0.9  # it is all back
    with quantize(unlearned, 8):
        assert know(unlearned, forget) < 0.5
    # The control: rounding teaches a model that never knew nothing.
    with quantize(original, 4):
        assert know(original, FORGET) < 0.05
