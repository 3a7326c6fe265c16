"""What is trained: a LoRA (fresh, or the one the model came with), or the weights themselves.

The reference model is the same weights with the trained tensors as they were at the start: they
are kept aside and swapped in for a forward pass. A second copy of the base is never made.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_unlearn.decoder import find_decoder_layers
from llm_unlearn.errors import UserError

ADAPTER = "default"


class Tuned:
    """A model and its trained tensors.

    Attributes:
        model: a `PeftModel` or a plain model.
        trainable: the tensors in training, by their name in the model.
        start: their values before training, for adapters; None for full fine-tuning.
    """

    def __init__(self, model: Any, trainable: dict[str, nn.Parameter]):
        self.model = model
        self.trainable = trainable
        self.start = copied(trainable) if isinstance(model, PeftModel) else None

    @property
    def is_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other values of its trained tensors, evaluating and without gradients.

        Nothing is computed back: the tensors in training are put aside and put in again.
        """
        aside = {name: parameter.data for name, parameter in self.trainable.items()}
        was_training = self.model.training
        try:
            for name, parameter in self.trainable.items():
                parameter.data = tensors[name]
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            for name, parameter in self.trainable.items():
                parameter.data = aside[name]
            self.model.train(was_training)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the trained tensors in place."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[name])

    def save(self, path: Path) -> None:
        save_file(copied(self.trainable), path)

    def restore(self, path: Path) -> None:
        self.load(load_file(path))

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.trainable.values())


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def tune(model: Any, lora: LoraConfig, full: bool, trainable: str | None, seed: int) -> Tuned:
    """Choose what is trained, and give gradients to that alone.

    Args:
        model: one that comes with an adapter goes on training that one.
        lora: the shape of a fresh adapter.
        full: train the weights, of a model without an adapter.
        trainable: a regular expression that the names of trained modules must match.

    Raises:
        UserError: nothing matches, the adapter is not one LoRA under its default name, or the model
            has one inside without being a `PeftModel`.
    """
    if isinstance(model, PeftModel):
        _check_adapter(model)
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            "the model has an adapter inside that it does not know of (an earlier call's, or loaded with "
            "AutoModel): give the PeftModel, or load the base model again"
        )
    elif not full:
        model = _fresh(model, lora, trainable, seed)
    chosen = {}
    for name, parameter in model.named_parameters():
        is_factor = ".lora_" in name and f".{ADAPTER}." in name
        wanted = (full or is_factor) and parameter.is_floating_point()
        wanted = wanted and (trainable is None or re.search(trainable, name) is not None)
        parameter.requires_grad_(bool(wanted))
        if wanted:
            chosen[name] = parameter
    if not chosen:
        raise UserError(f"no parameter matches --trainable {trainable!r}")
    return Tuned(model, chosen)


def _check_adapter(model: PeftModel) -> None:
    names = list(model.peft_config)
    if names != [ADAPTER]:
        raise UserError(
            f"the model has adapters called {', '.join(names)}: give it one, loaded as {ADAPTER!r}, which "
            "is where it is written"
        )
    if str(model.peft_config[ADAPTER].peft_type).rsplit(".", 1)[-1] != "LORA":
        raise UserError("the model's adapter is not a LoRA: merge it, or use --full")


def _fresh(model: Any, lora: LoraConfig, trainable: str | None, seed: int) -> PeftModel:
    """A new adapter whose first values depend on the seed alone."""
    lora = copy.deepcopy(lora)  # PEFT and we write into it, and it is the caller's
    if trainable is not None:
        kinds = (nn.Linear, Conv1D)
        linear = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        names = [n for n in linear if re.search(trainable, n) and not n.endswith("lm_head")]
        if not names:
            raise UserError(f"no linear layer matches --trainable {trainable!r}")
        lora.target_modules = names  # pyright: ignore[reportAttributeAccessIssue]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, lora, adapter_name=ADAPTER)  # pyright: ignore
        except ValueError as error:  # target modules that are not there
            raise UserError(f"cannot put a LoRA on the model: {error}") from None


def last_projections(model: Any, indices: Sequence[int]) -> str:
    """Regular expression of what some decoder layers write last (Llama: `mlp.down_proj`, GPT-2:
    `mlp.c_proj`); of all there is in those layers where the model has an adapter that is not on it.

    A layer's index is matched as a whole: 1 is not the beginning of 10.
    """
    name, layers = find_decoder_layers(model)
    name = name.removeprefix("base_model.model.")  # an adapter stands around it
    matrices = [n for n, p in layers[indices[0]].named_parameters() if p.dim() > 1]
    last = re.split(r"\.(?:base_layer|lora_\w+|weight)\b", matrices[-1])[0]
    has_factors = any(n.startswith(f"{last}.lora_") for n in matrices)
    where = rf"(?:^|\.){re.escape(name)}\.(?:{'|'.join(map(str, indices))})\."
    if isinstance(model, PeftModel) and not has_factors:
        return where
    return rf"{where}{re.escape(last)}(?:\.|$)"
