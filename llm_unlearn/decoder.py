"""The decoder layers of a causal language model."""

from typing import Any

from torch import nn

from llm_unlearn.errors import UserError


def find_decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers of any Hugging Face causal language model.

    It is the one `nn.ModuleList` below the model whose length is the configured number of layers.
    Layers are addressed by their parsed index in it, never by a part of their name ("layers.1" is
    also the beginning of "layers.10").

    Raises:
        UserError: there is no such list, or more than one.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__}: expected one list of {count} decoder layers, found "
            f"{[name for name, _ in found]}. This model family is not supported"
        )
    return found[0]
