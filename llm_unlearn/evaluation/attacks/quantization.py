"""Quantisation: rounding the weights can undo an unlearning that moved them too little.

What it shows: an update of less than half a step is rounded away, so the quantised unlearned model
is the quantised model from before. It happens without any attacker, whenever a model is quantised
for serving.

Formula: round to nearest, `Q(w) = step * round(w / step)` with `step = 2 max|w| / 2^bits` over a
group of weights. As in the paper nothing is clipped: codes run from -2^(bits-1) to 2^(bits-1), one
more than `bits` bits can hold. Weights stay floating-point numbers (it is a simulation on any
machine; speed and memory do not change), activations are not quantised.

Source: Zhang et al., Catastrophic Failure of LLM Unlearning via Quantization (arXiv 2410.16454,
ICLR 2025).

Control: quantise the retrained model too. Rounding harms every model, and what the retrained one
"recovers" is noise. `collision_rate` shows the mechanism without asking the model anything. At a
rate of 1 the two quantised models are one; below 1 it proves nothing, however near: the few weights
that cross move by a whole step, so that an update spread over many weights can survive rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.layers import Linear, linear_layers, plain_name

# What shares one step: the whole tensor, an output's weights, or so many neighbours among them.
Group = Literal["tensor", "row"] | int
Adapters = Literal["merge", "keep"]


@dataclass(frozen=True)
class Collisions:
    """How many weights of two models fall on the same code.

    Attributes:
        share: of all weights, in [0, 1].
        share_of_changed: of those that differ between the models: 1 = quantisation undoes the
            whole change. NaN if none differs.
        n, n_changed: weights.
    """

    share: float
    share_of_changed: float
    n: int
    n_changed: int


@contextmanager
def quantize(
    model: Any,
    bits: int,
    group: Group = "row",
    adapters: Adapters = "merge",
    with_head: bool = False,
) -> Iterator[Any]:
    """Round a model's linear weights while the context lasts; the exact bits are back afterwards.

    Embeddings, norms, biases and (unless `with_head`) the output head stay as they are.

    Args:
        bits: 2 to 16; 4 is where the paper's attack works, 8 where it hardly does.
        group: the weights that share one step. Real 4-bit formats use groups of 32 to 128.
        adapters: `merge` rounds base weight and adapters together, as the paper's attack on full
            weights does; `keep` rounds the base weights below adapters of full precision, which
            is how adapters are served on a quantised base.

    Raises:
        ValueError: bits or group out of range.
        UserError: adapters that cannot be merged into one weight, or weights that are packed.
    """
    _check(bits, group)
    layers = linear_layers(model, with_head)
    _refuse_packed(layers)
    with _merged(model, adapters):
        originals = [(layer, layer.weight.data) for layer in layers.values()]
        try:
            for layer, weight in originals:
                layer.weight.data = rounded(_rows(layer, weight), bits, group, weight)
            yield model
        finally:
            for layer, weight in originals:
                layer.weight.data = weight


def rounded(
    weight_OI: torch.Tensor, bits: int, group: Group, like: torch.Tensor | None = None
) -> torch.Tensor:
    """Q(w) in the weight's own type and, where `like` is its transpose, in that layout."""
    codes, steps = codes_and_steps(weight_OI, bits, group)
    values = _ungrouped(codes * steps, weight_OI).to(weight_OI.dtype)
    return values if like is None or like.shape == values.shape else values.T.contiguous()


def codes_and_steps(
    weight_OI: torch.Tensor, bits: int, group: Group, steps: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`round(w / step)` by group and the steps; a group of zeros has code 0.

    Args:
        steps: those of another model, to quantise on its scale.
    """
    grouped = _grouped(weight_OI.detach().to(torch.float32), group)
    used = 2 * grouped.abs().amax(dim=-1, keepdim=True) / 2**bits if steps is None else steps
    return torch.round(grouped / used.masked_fill(used == 0, 1.0)), used


@torch.no_grad()
def collision_rate(
    first: Any, second: Any, bits: int, group: Group = "row", shared_scale: bool = False
) -> Collisions:
    """Share of linear weights with the same code in both models, adapters merged.

    Args:
        shared_scale: round both on the steps of `first`, so that a code means the same number in
            both. By default each has its own steps, as when each is quantised for itself; the same
            code is then nearly, not exactly, the same number.

    Raises:
        UserError: models of different shape, or adapters that cannot be merged.
    """
    _check(bits, group)
    same = changed = collided = count = 0
    mine, theirs = linear_layers(first), linear_layers(second)
    names = {plain_name(name): name for name in theirs}
    if sorted(names) != sorted(plain_name(name) for name in mine):
        raise UserError("the two models have different layers: compare a model with its original")
    adapted = {
        id(wrapped.get_base_layer()): wrapped
        for model in (first, second)
        for wrapped in _adapted_layers(model)
    }
    for name, layer in mine.items():
        other = theirs[names[plain_name(name)]]
        left, right = _effective(layer, adapted), _effective(other, adapted)
        if left.shape != right.shape:
            raise UserError(f"{plain_name(name)} has another shape in each of the two models")
        left_codes, steps = codes_and_steps(left, bits, group)
        right_codes, _ = codes_and_steps(
            right.to(left.device), bits, group, steps if shared_scale else None
        )
        equal = _ungrouped(left_codes == right_codes, left)
        differs = left != right.to(left.device)
        same += int(equal.sum())
        changed += int(differs.sum())
        collided += int((equal & differs).sum())
        count += left.numel()
    return Collisions(same / count, collided / changed if changed else float("nan"), count, changed)


def _check(bits: int, group: Group) -> None:
    if not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits}, expected 2 to 16")
    if group not in ("tensor", "row") and not (isinstance(group, int) and group > 0):
        raise ValueError(f"group is {group!r}, expected 'tensor', 'row' or a number of weights")


def _rows(layer: Linear, weight: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs): GPT-2's layers keep theirs the other way round."""
    return weight.T if isinstance(layer, Conv1D) else weight


def _grouped(weight_OI: torch.Tensor, group: Group) -> torch.Tensor:
    """The last axis is one group; a row's last group is filled up with zeros, which change no step."""
    if group == "tensor":
        return weight_OI.reshape(1, -1)
    if group == "row":
        return weight_OI
    assert isinstance(group, int)
    missing = -weight_OI.shape[1] % group
    padded = nn.functional.pad(weight_OI, (0, missing))
    return padded.reshape(weight_OI.shape[0], -1, group)


def _ungrouped(values: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    rows, columns = weight_OI.shape
    return values.reshape(rows, -1)[:, :columns]


def _refuse_packed(layers: dict[str, Linear]) -> None:
    for name, layer in layers.items():
        if not layer.weight.is_floating_point() or layer.weight.is_meta:
            raise UserError(
                f"{name} is already quantised or not in memory: load the model in full precision"
            )


@contextmanager
def _merged(model: Any, adapters: Adapters) -> Iterator[None]:
    """Active adapters added into (copies of) the base weights; the original tensors come back."""
    if adapters == "keep":
        yield
        return
    layers = _adapted_layers(model)
    bases = [layer.get_base_layer() for layer in layers]
    originals = [(p, p.data) for base in bases for p in base.parameters()]
    try:
        for parameter, data in originals:
            parameter.data = data.clone()
        for layer in layers:
            layer.merge()
        yield
    finally:
        # Not `unmerge`: subtracting what was added does not give the same bits.
        for parameter, data in originals:
            parameter.data = data
        for layer in layers:
            layer.merged_adapters.clear()


def _adapted_layers(model: Any) -> list[Any]:
    """PEFT layers whose active adapters are still apart from the base weight."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    wrapped = any(isinstance(part, PeftModel) for part in model.modules() if part is not model)
    if layers and wrapped:
        raise UserError(
            f"{type(model).__name__} has several adapters that no single weight can hold: "
            "quantise with adapters='keep', or quantise each adapter's model"
        )
    return [layer for layer in layers if not layer.disable_adapters and not layer.merged]


def _effective(layer: Linear, adapted: dict[int, Any]) -> torch.Tensor:
    """A layer's weight with its active adapters added, as (outputs, inputs)."""
    if id(layer) not in adapted:
        return _rows(layer, layer.weight.data)
    with _merged(adapted[id(layer)], "merge"):
        return _rows(layer, layer.weight.data)
