"""Texts to vectors: the model's own hidden states, or those of a text encoder.

Shapes: N texts, T tokens, L layers, D width.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError

LONGEST = 512  # tokens of a text that are looked at


def text_of(record: Record) -> str:
    """All that a record says, as one text."""
    if "messages" in record.content:
        return "\n".join(record.texts())
    return "".join(record.texts())


def masked_mean(states_NTD: Tensor, mask_NT: Tensor) -> Tensor:
    """Mean over the positions of the mask, (N, D); padding has no part in it."""
    counted_NT1 = mask_NT.to(states_NTD.dtype)[..., None]
    return (states_NTD * counted_NT1).sum(1) / counted_NT1.sum(1).clamp_min(1)


class Encoder:
    """Hidden states of a model, row by row the same in every batch.

    A causal model's first position is left out of every mean: all others attend to it, so its state
    is large and much the same for every text (Xiao et al., arXiv 2309.17453).

    Args:
        layer: whose output `vectors` and `tokens` are, counted from 1; default: the last.
        is_causal: a language model, whose adapter (if any) is switched off.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layer: int = -1,
        is_causal: bool = False,
        batch_size: int = 16,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.layer = layer
        self.is_causal = is_causal
        self.batch_size = batch_size
        config = model.config.get_text_config()
        self.layer_count = int(config.num_hidden_layers)
        # RoBERTa keeps its first positions for padding.
        room = getattr(config, "max_position_embeddings", LONGEST) - (0 if is_causal else 2)
        self.longest = min(LONGEST, room)

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Masked means of one layer, of length 1, (N, D)."""
        found = [
            masked_mean(states[self.layer], mask)
            for states, mask in self._batches(self.tokenize(texts))
        ]
        return normalize(torch.cat(found).cpu(), dim=-1)

    def tokens(self, texts: Sequence[str]) -> list[Tensor]:
        """Every token's state in one layer, of length 1, (T, D) a text."""
        found = []
        for states, mask in self._batches(self.tokenize(texts)):
            rows = zip(states[self.layer], mask, strict=True)
            found += [normalize(row[kept.bool()], dim=-1).cpu() for row, kept in rows]
        return found

    def layers(self, rows: Sequence[Sequence[int]], layers: Sequence[int]) -> Tensor:
        """Masked means of several layers, (N, L, D), of rows of ids.

        Args:
            layers: counted from 1, the first decoder layer.
        """
        found = [
            torch.stack([masked_mean(states[layer], mask) for layer in layers], dim=1)
            for states, mask in self._batches(rows)
        ]
        return torch.cat(found)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.longest)
        return [list(ids) for ids in encoded["input_ids"]]

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
        """Hidden states of each layer and what to count of them, padded on the right."""
        for start in range(0, len(rows), self.batch_size):
            part = [
                list(row)[: self.longest] or [0] for row in rows[start : start + self.batch_size]
            ]
            width = max(map(len, part))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            states = [state.float() for state in self._states(ids, mask)]
            if self.is_causal:
                mask[:, 0] = (mask.sum(1) == 1).long()
            yield states, mask

    @torch.no_grad()
    def _states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        was_training = self.model.training
        self.model.eval()
        try:
            return self.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=True
            ).hidden_states
        finally:
            self.model.train(was_training)


class BaseEncoder(Encoder):
    """The language model without its adapter."""

    def __init__(self, model: Any, tokenizer: Any):
        count = int(model.config.get_text_config().num_hidden_layers)
        super().__init__(model, tokenizer, layer=max(1, count // 2), is_causal=True)

    def _states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        off = getattr(self.model, "disable_adapter", contextlib.nullcontext)
        with off():
            return super()._states(ids, mask)


def make_encoder(name: str | None, model: Any, tokenizer: Any) -> Encoder:
    """A text encoder by name or path, or the model as it is now, at its middle layer.

    `sentence-transformers/all-MiniLM-L6-v2` and its like give what that library gives: a masked mean
    of the last layer, of length 1.
    """
    if name is not None:
        return load_encoder(name, model.device)
    count = int(model.config.get_text_config().num_hidden_layers)
    return Encoder(model, tokenizer, layer=max(1, count // 2), is_causal=True)


def load_encoder(name: str, device: Any = "cpu") -> Encoder:
    """A text encoder of Transformers (BERT, RoBERTa, MiniLM). Safetensors only.

    Raises:
        UserError: it cannot be found or loaded.
    """
    from transformers import AutoModel

    model, tokenizer, _ = read_text_model(AutoModel, name)
    return Encoder(model.to(device).eval().requires_grad_(False), tokenizer)


def read_text_model(kind: Any, name: str) -> tuple[Any, Any, set[str]]:
    """A model of one of Transformers' auto classes, its tokenizer, and the weights it came without.

    Raises:
        UserError: it cannot be found or loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, told = kind.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load the text encoder {name!r}: {reason}") from None
    return model, tokenizer, set(told["missing_keys"])
