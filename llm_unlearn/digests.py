"""Digests of models and tokenizers: what every number computed with them depends on."""

import hashlib
import json

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llm_unlearn.data.records import digest


def tensors_digest(model: nn.Module, skip: set[str] | None = None) -> str:
    """SHA-256 over all parameters and buffers: names, types, shapes and bytes.

    Args:
        skip: names that are left out (the parameters in training).
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if skip and name in skip:
            continue
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    return digest([state, special, str(tokenizer.chat_template)])
