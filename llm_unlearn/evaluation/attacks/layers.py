"""The linear layers of a causal language model, whatever wraps it, without its output head.

A PEFT adapter keeps the layer that it adapts as `base_layer`: that layer is one of them, the
adapter's own small matrices are not. Inside a wrapper (an ensemble, a decoy) they are found too.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_unlearn.errors import UserError

Linear = nn.Linear | Conv1D


def linear_layers(model: Any, with_head: bool = False) -> dict[str, Linear]:
    """By name as in `model.named_modules()`; each tensor of weights once.

    Args:
        with_head: also the layer that turns hidden states into logits.

    Raises:
        UserError: there is none.
    """
    left_out = set(_adapter_parts(model))
    heads = set() if with_head else set(_head_weights(model))
    found: dict[str, Linear] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or id(module) in left_out:
            continue
        if id(module.weight) in heads | seen:
            continue
        seen.add(id(module.weight))
        found[name] = module
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear layers that this attack can reach: attack the "
            "model inside it"
        )
    return found


def plain_name(name: str) -> str:
    """A layer's name without what PEFT puts around it, so that two models can be compared."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _adapter_parts(model: Any) -> Iterator[int]:
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            kept = {id(part) for part in base.modules()} | {id(module)}
            yield from (id(part) for part in module.modules() if id(part) not in kept)


def _head_weights(model: Any) -> Iterator[int]:
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Module) and hasattr(head, "weight"):
            yield id(head.weight)
