"""What a causal language model is made of: the linear modules of its decoder layers, its digest."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from llm_unlearn.decoder import find_decoder_layers
from llm_unlearn.digests import tensors_digest, tokenizer_digest
from llm_unlearn.errors import UserError
from llm_unlearn.exact.config import ModelShape, Module


def find_linear_modules(model: Any, targets: list[str] | None) -> list[Module]:
    """The linear modules of the decoder layers that carry LoRA.

    Args:
        targets: last parts of their names (`q_proj`, ...); None or `["all-linear"]` takes all.

    Raises:
        UserError: a target that no decoder layer has; the message lists those it has.
    """
    prefix, layers = find_decoder_layers(model)
    linear = [
        Module(f"{prefix}.{index}.{name}", index, *_sizes(module))
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    known = sorted({module.name.rsplit(".", 1)[-1] for module in linear})
    if not known:
        raise UserError(f"{type(model).__name__} has no linear modules that LoRA could be put on")
    if not targets or targets == ["all-linear"]:
        return linear
    if unknown := sorted(set(targets) - set(known)):
        raise UserError(
            f"--lora_target_modules {unknown[0]!r} is not in the decoder layers; they have {known}"
        )
    return [module for module in linear if module.name.rsplit(".", 1)[-1] in targets]


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def describe_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name_or_path: str,
    revision: str | None = None,
    targets: list[str] | None = None,
) -> ModelShape:
    """Everything that a run keeps of its base model.

    Raises:
        UserError: the model family is not supported or a target module does not exist.
    """
    prefix, layers = find_decoder_layers(model)
    modules = find_linear_modules(model, targets)
    return ModelShape(
        name_or_path=str(Path(name_or_path).resolve())
        if Path(name_or_path).is_dir()
        else name_or_path,
        revision=revision,
        weights=tensors_digest(model),
        tokenizer=tokenizer_digest(tokenizer),
        num_layers=len(layers),
        layers_pattern=prefix.rsplit(".", 1)[-1],
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        modules=tuple(modules),
    )
