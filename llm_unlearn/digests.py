"""Digests of models and tokenizers: what every number computed with them depends on."""

import copy
import hashlib
import json
from collections.abc import Mapping

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase

from llm_unlearn.data.records import digest


def tensors_digest(model: nn.Module, skip: set[str] | None = None) -> str:
    """SHA-256 over all parameters and buffers: names, types, shapes and bytes.

    Args:
        skip: names that are left out (the parameters in training).
    """
    left_out = skip or set()
    return _digest({n: t for n, t in model.state_dict().items() if n not in left_out})


def base_digest(model: nn.Module) -> str:
    """`tensors_digest` of the model under a LoRA; of the model itself, if it has none."""
    named = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            named[own] = tensor
    return _digest(named)


def _digest(named: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else _lasting(backend)
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    return digest([vocabulary, special, str(tokenizer.chat_template)])


def _lasting(backend: Tokenizer) -> str:
    """A tokenizer without the padding and truncation of its last call, which it goes on holding."""
    if backend.padding is None and backend.truncation is None:
        return backend.to_str()
    lasting = copy.deepcopy(backend)  # somebody may be padding a batch with this one
    lasting.no_padding()
    lasting.no_truncation()
    return lasting.to_str()
