"""Continuous batching: rows of many answers in one forward pass, each under its own adapter.

A row is one adapter's reading of one text, with its own keys and values: an answer of m shards has m rows.
Rows join after their prompt is read and leave when their answer ends; the others go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from llm_unlearn.exact.ensemble import ShardEnsemble, positions

TOKENS_READ_AT_ONCE = 8192


@dataclass(eq=False)
class Row:
    """One adapter's reading of one text.

    Attributes:
        adapter: its name, as the ensemble knows it.
        log_probs: (V,), of the next token, after the last pass.
        best: the likeliest one.
    """

    adapter: str
    log_probs: torch.Tensor
    best: int


class Batch:
    """The rows under way. Texts are padded on the left, to the length of the longest.

    Args:
        ensemble: whose model and adapters are asked.
    """

    def __init__(self, ensemble: ShardEnsemble):
        self.ensemble = ensemble
        ensemble.mixing.keeps = True  # the library says when a slot holds something else
        self.rows: list[Row] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]], adapters: Sequence[str]) -> list[Row]:
        """Let adapters read texts, a row each, and keep the rows.

        Args:
            texts: token ids, at least one each.
            adapters: names, one for each text.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        made: dict[int, Row] = {}
        while order:
            chunk = _fitting(order, texts)
            order = order[len(chunk) :]
            rows = self._read([texts[i] for i in chunk], [adapters[i] for i in chunk])
            made |= dict(zip(chunk, rows, strict=True))
        return [made[i] for i in range(len(texts))]

    def _read(self, texts: list[Sequence[int]], adapters: list[str]) -> list[Row]:
        device, length = self.ensemble.device, max(map(len, texts))
        ids, mask = torch.zeros(2, len(texts), length, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, length - len(text) :] = torch.tensor(text)
            mask[row, length - len(text) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache = DynamicCache()
        log_probs = self._forward(adapters, ids, mask, positions(mask), cache)
        best = log_probs.argmax(-1).tolist()
        rows = [Row(*told) for told in zip(adapters, log_probs, best, strict=True)]
        self._join(rows, cache, mask)
        return rows

    def _forward(
        self,
        adapters: list[str],
        ids: torch.Tensor,
        mask: torch.Tensor,
        where: torch.Tensor,
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Log-probabilities of the next token, (R, V)."""
        ensemble = self.ensemble
        slots = ensemble.slots_of(adapters)
        with ensemble.mixing.batch(slots, ids.device):
            output = ensemble.model(
                input_ids=ids, attention_mask=mask, position_ids=where, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        return output.logits[:, -1].float().log_softmax(-1)

    def _join(self, rows: list[Row], cache: DynamicCache, mask: torch.Tensor) -> None:
        if self._cache is None or not self.rows:
            self.rows, self._cache, self._mask = list(rows), cache, mask
            return
        length = max(mask.shape[1], self._mask.shape[1])
        for held, new in zip(_layers(self._cache), _layers(cache), strict=True):
            held.keys = torch.cat([_padded(held.keys, length), _padded(new.keys, length)])
            held.values = torch.cat([_padded(held.values, length), _padded(new.values, length)])
        self._mask = torch.cat([_padded_mask(self._mask, length), _padded_mask(mask, length)])
        self.rows += rows

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> None:
        """One token more for every row.

        Args:
            tokens: the next token of each row, in their order.
        """
        assert self._cache is not None
        device = self.ensemble.device
        ids = torch.tensor(tokens, device=device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        where = self._mask.sum(1, keepdim=True) - 1
        adapters = [row.adapter for row in self.rows]
        log_probs = self._forward(adapters, ids, self._mask, where, self._cache)
        best = log_probs.argmax(-1).tolist()
        for row, own, likeliest in zip(self.rows, log_probs, best, strict=True):
            row.log_probs, row.best = own, likeliest

    def leave(self, gone: Sequence[Row]) -> None:
        """Take rows out; their keys and values are dropped."""
        if not gone or self._cache is None:
            return
        left = [place for place, row in enumerate(self.rows) if all(row is not g for g in gone)]
        self.rows = [self.rows[place] for place in left]
        if not left:
            self._cache, self._mask = None, torch.zeros(0, 0, dtype=torch.long)
            return
        index = torch.tensor(left, device=self._mask.device)
        mask = self._mask[index]
        start = int(mask.shape[1] - mask.sum(1).max())  # padding that no row needs any more
        self._mask = mask[:, start:]
        for layer in _layers(self._cache):
            layer.keys = layer.keys[index][:, :, start:]
            layer.values = layer.values[index][:, :, start:]


def _fitting(order: list[int], texts: Sequence[Sequence[int]]) -> list[int]:
    """The first texts, shortest first, that are read in one pass."""
    chunk: list[int] = []
    for i in order:
        if chunk and len(texts[i]) * (len(chunk) + 1) > TOKENS_READ_AT_ONCE:
            break
        chunk.append(i)
    return chunk


def _layers(cache: DynamicCache) -> list[Any]:
    """Keys and values of every layer, (R, H, T, D) each. A cache that is made without a configuration has
    all of them in full, also where a layer looks back over a window only, which its mask sees to."""
    return cache.layers


def _padded(tensor_RHTD: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor_RHTD, (0, 0, length - tensor_RHTD.shape[2], 0))


def _padded_mask(mask_RT: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask_RT, (length - mask_RT.shape[1], 0))
