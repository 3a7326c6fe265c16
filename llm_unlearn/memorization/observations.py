"""Watching a training run: one line a record and epoch, from numbers that training has computed anyway."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_unlearn.memorization.learning_events import ROW_VALUES, row_values, token_values

COUNTS = ("index", "epoch", "tokens")


class Observations:
    """Watches one training run (`observing.Observer`).

    Numbers stay on the device until they are collected: nothing waits for a transfer in a step.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int, dict[str, Tensor]]] = []
        self._before: dict[str, NDArray[Any]] = {}

    @torch.no_grad()
    def observe_logits(
        self, index_B: Tensor, epoch: int, logits_BTV: Tensor, labels_BT: Tensor
    ) -> None:
        mask_BT = labels_BT >= 0
        values = token_values(logits_BTV.detach()[mask_BT], labels_BT[mask_BT])
        self._add(index_B, epoch, values, mask_BT)

    @torch.no_grad()
    def observe_tokens(
        self, index_B: Tensor, epoch: int, values_BT: Mapping[str, Tensor], mask_BT: Tensor
    ) -> None:
        values = {name: values.detach()[mask_BT] for name, values in values_BT.items()}
        self._add(index_B, epoch, values, mask_BT)

    def _add(
        self, index_B: Tensor, epoch: int, values: Mapping[str, Tensor], mask_BT: Tensor
    ) -> None:
        rows_N = mask_BT.nonzero()[:, 0]
        self._seen.append((index_B.detach(), epoch, row_values(values, rows_N, len(mask_BT))))

    def collect(self) -> dict[str, NDArray[Any]]:
        from accelerate import PartialState
        from accelerate.utils import gather_object

        mine = [self._columns()]
        found = gather_object(mine) if PartialState().num_processes > 1 else mine
        return merged(found)

    def restore(self, columns: Mapping[str, Any]) -> None:
        self._before = {name: np.asarray(values) for name, values in columns.items()}

    def _columns(self) -> dict[str, NDArray[Any]]:
        """What this process saw."""
        parts = [self._before] if self._before else []
        for index, epoch, values in self._seen:
            told = {name: one.cpu().numpy() for name, one in values.items()}
            numbers = index.cpu().numpy()
            told |= {"index": numbers, "epoch": np.full(len(numbers), epoch)}
            told["tokens"] = np.nan_to_num(told["tokens"]).astype(np.int64)
            parts.append(told)
        return joined(parts)


def joined(parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """One after the other; empty columns of nothing."""
    parts = [part for part in parts if part and len(part["index"])]
    names = [n for n in (*COUNTS, *ROW_VALUES) if parts and all(n in part for part in parts)]
    if not names:
        return {name: np.zeros(0, np.int64) for name in COUNTS}
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def merged(parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Several processes' or batches' columns as one, a line for each record and epoch.

    Rows that fill up a batch have no tokens that count, or are seen twice in an epoch: those go.
    """
    columns = joined(parts)
    columns = {name: values[columns["tokens"] > 0] for name, values in columns.items()}
    epochs = int(columns["epoch"].max(initial=0)) + 1
    _, first = np.unique(columns["index"] * epochs + columns["epoch"], return_index=True)
    return {name: values[first] for name, values in columns.items()}
