"""The frozen prefix: hidden states below a block, computed once per record and replayed.

In `layers` mode everything below the block in training is the untouched base model, so what
enters the block is the same in every epoch. The model keeps building its own masks and positions;
only the forward of the skipped layers is replaced, which holds for architectures whose layers
depend on their index or whose embeddings are not the first layer's input.

A record is captured alone and unpadded: its cached states are a function of that record only.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import nn

from llm_unlearn import files
from llm_unlearn.decoder import find_decoder_layers
from llm_unlearn.exact.encryption import AtRest


class _Captured(Exception):
    """Ends a forward pass once the wanted states are known."""


def _hidden(output: object) -> torch.Tensor:
    value = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(value, torch.Tensor)
    return value


@torch.no_grad()
def capture(model: nn.Module, boundary: int, input_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states that enter layer `boundary` (at least 1), in evaluation mode.

    Args:
        input_ids: (1, T), without padding.

    Returns:
        (T, H), on the model's device.
    """
    _, layers = find_decoder_layers(model)
    caught: list[torch.Tensor] = []

    def stop(_module: nn.Module, _arguments: object, output: object) -> None:
        caught.append(_hidden(output).detach())
        raise _Captured

    was_training = model.training
    handle = layers[boundary - 1].register_forward_hook(stop)
    model.eval()
    try:
        with contextlib.suppress(_Captured):
            model(input_ids=input_ids, use_cache=False)
    finally:
        handle.remove()
        model.train(was_training)
    return caught[0][0]


def returns_tuple(model: nn.Module, input_ids: torch.Tensor) -> bool:
    """Do the layers of this architecture return tuples (GPT-J, BLOOM, Falcon) or tensors?"""
    _, layers = find_decoder_layers(model)
    seen: list[bool] = []
    handle = layers[0].register_forward_hook(
        lambda _m, _a, output: seen.append(isinstance(output, tuple))
    )
    try:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@contextlib.contextmanager
def replay(
    model: nn.Module, boundary: int, states_BTH: torch.Tensor, as_tuple: bool
) -> Iterator[None]:
    """Within the context, layers below `boundary` are skipped and `states_BTH` enters it.

    The states need a gradient flag under re-entrant activation checkpointing; it does no harm
    elsewhere, since nothing below the block is trained.
    """
    _, layers = find_decoder_layers(model)

    def skip(hidden_states: torch.Tensor, *_arguments: object, **_options: object) -> object:
        return (hidden_states,) if as_tuple else hidden_states

    def inject(_hidden_states: torch.Tensor, *_arguments: object, **_options: object) -> object:
        return (states_BTH,) if as_tuple else states_BTH

    for layer in layers[: boundary - 1]:
        layer.forward = skip
    layers[boundary - 1].forward = inject
    try:
        yield
    finally:
        for layer in layers[:boundary]:
            del layer.forward


class StateCache:
    """Cached states of one slice at one boundary: a safetensors file with one tensor a record.

    Mapped into memory, or of an encrypted run read into it: unlinking the file does not disturb us.
    """

    def __init__(self, path: Path, at_rest: AtRest):
        self._get: Callable[[str], torch.Tensor]
        if at_rest.is_encrypted:
            self._get = load(at_rest.read(path)).__getitem__
        else:
            self._get = safe_open(path, framework="pt").get_tensor

    @staticmethod
    def write(path: Path, states: dict[str, torch.Tensor], at_rest: AtRest) -> None:
        path.parent.mkdir(exist_ok=True)
        data = save({name: tensor.cpu().contiguous() for name, tensor in states.items()})
        (seal,) = at_rest.seals()
        files.write_bytes(path, seal(path, data))

    def __getitem__(self, record_id: str) -> torch.Tensor:
        return self._get(record_id)
