"""Arithmetic on what LoRA adapters add to the weights, exact although the factors are multiplied."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.approximate.tuning import Tuned
from llm_unlearn.errors import UserError


def negate_adapter(tuned: Tuned, alpha: float) -> None:
    """Make the adapter add start - alpha (trained - start), where those are products B A.

    A fresh adapter starts at 0, so -alpha B does. Else the ranks of both stand side by side, with
    (1 + alpha) on those of the start: an ordinary LoRA of twice the rank and the same scale.

    Raises:
        UserError: the adapter is more than a product of two factors.
    """
    name = tuned.model.active_adapters[0]
    config = tuned.model.peft_config[name]
    layers = _layers(tuned.model, name)
    if config.use_dora or config.lora_bias:
        raise UserError(
            "task_vector adds and subtracts plain LoRAs: no DoRA, no bias; or use --full"
        )
    assert tuned.start is not None
    starts = {key: _start(tuned, key, layer, name) for key, layer in layers.items()}
    is_fresh = all(not B.any() for _, B in starts.values())
    for key, layer in layers.items():
        start_A, start_B = starts[key]
        A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        if is_fresh:
            _put(layer, name, A, -alpha * B)
        else:
            both_B = torch.cat([(1 + alpha) * start_B, -alpha * B], dim=1)
            _put(layer, name, torch.cat([start_A, A]), both_B)
    if not is_fresh:
        _double(config)


def _layers(model: Any, name: str) -> dict[str, Any]:
    """Layers with this adapter, by their name in the model."""
    found = {}
    for key, module in model.named_modules():
        if name in getattr(module, "lora_embedding_A", {}):
            raise UserError("task_vector does not add LoRAs of embeddings: use --full")
        if name in getattr(module, "lora_A", {}):
            if not isinstance(module.lora_A[name], nn.Linear):
                raise UserError("task_vector adds LoRAs of linear layers only: use --full")
            found[key] = module
    return found


def _start(tuned: Tuned, key: str, layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Both factors before training; those that are not trained are as they were."""
    assert tuned.start is not None
    factors = []
    for factor in ("lora_A", "lora_B"):
        now = getattr(layer, factor)[name].weight.detach()
        factors.append(tuned.start.get(f"{key}.{factor}.{name}.weight", now))
    return factors[0], factors[1]


def _put(layer: Any, name: str, A: Tensor, B: Tensor) -> None:
    for factor, weight in ((layer.lora_A[name], A), (layer.lora_B[name], B)):
        factor.weight = nn.Parameter(weight.contiguous())
        factor.out_features, factor.in_features = weight.shape
    layer.r[name] = len(A)


def _double(config: Any) -> None:
    """Twice the rank with the same scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
