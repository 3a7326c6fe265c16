"""Every row of a batch under its own adapter, in two batched products a layer.

PEFT computes such batches adapter after adapter and hangs hooks on every layer for each forward pass, which
costs several times the model itself where adapters are many and small. The adapters stay PEFT's: only the
forward pass of its LoRA layers is replaced, and only while a batch says which row is whose.
"""

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from llm_unlearn.exact.routing import BASE

PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a batch are.

    Attributes:
        names: the adapter of every row, or `__base__`.
        adapters: the different ones.
        index: for each row under an adapter its place in `adapters`, (r,).
        positions: which rows those are, (r,); None for all.
        factors: by layer, the factors of the adapters side by side, once they were needed.
    """

    names: tuple[str, ...]
    adapters: tuple[str, ...]
    index: torch.Tensor
    positions: torch.Tensor | None
    factors: dict[int, "Factors"] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Sequence[str], device: torch.device) -> "Rows":
        adapters = tuple(dict.fromkeys(name for name in names if name != BASE))
        positions = [row for row, name in enumerate(names) if name != BASE]
        index = torch.tensor([adapters.index(names[row]) for row in positions], device=device)
        is_all = len(positions) == len(names)
        where = None if is_all else torch.tensor(positions, device=device)
        return cls(tuple(names), adapters, index, where)


class Factors(NamedTuple):
    """LoRA factors of U adapters in one layer: (U, k, I), (U, O, k), and their scales (U, 1, 1)."""

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor


class Mixing:
    """Takes over the LoRA layers of a model. Adapters are in evaluation: dropout does not act.

    Args:
        model: its layers go on as PEFT's where no rows are set.

    Attributes:
        keeps: whether what was put side by side serves the next batch of the same rows. Whoever changes
            a weight calls `forget`.
    """

    def __init__(self, model: PeftModel):
        self.rows: Rows | None = None
        self.keeps = False
        self._kept: Rows | None = None
        self.cover(model)

    def cover(self, model: PeftModel) -> None:
        """Take over layers that got an adapter since."""
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                _take_over(layer, self)

    def forget(self) -> None:
        """Overwrite what was put side by side, of adapters that may be withdrawn."""
        if self._kept is not None:
            for factors in self._kept.factors.values():
                factors.down.zero_()
                factors.up.zero_()
        self._kept = None

    @contextmanager
    def batch(self, names: Sequence[str], device: torch.device) -> Iterator[None]:
        """Within it, row i is computed under `names[i]`, or by the base model alone."""
        is_known = self._kept is not None and self._kept.names == tuple(names)
        self.rows = self._kept if is_known else Rows.of(names, device)
        self._kept = self.rows if self.keeps else None
        try:
            yield
        finally:
            self.rows = None

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Within it no weight changes, so that what was put side by side for one token serves the next."""
        before, self.keeps = self.keeps, True
        try:
            yield
        finally:
            self.keeps, self._kept = before, None


def _take_over(layer: Any, mixing: Mixing) -> None:
    """Everything is kept with the layer, so that a copy of the model is a copy of all of it."""
    if "mixing" not in vars(layer):
        layer.forward_unmixed = layer.forward
        layer.forward = types.MethodType(_forward, layer)
    layer.mixing = mixing


def _forward(layer: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    rows = layer.mixing.rows
    if rows is None:
        return layer.forward_unmixed(x, *arguments, **options)
    result = layer.base_layer(x, *arguments, **options)
    held = [name for name in rows.adapters if name in layer.lora_A]
    if not held:
        return result
    own = x if rows.positions is None else x[rows.positions]
    update = _update(layer, own, rows, held).to(result.dtype)
    if rows.positions is None:
        return result + update
    return result.index_add(0, rows.positions, update)


def _update(layer: Any, x_rTI: torch.Tensor, rows: Rows, held: list[str]) -> torch.Tensor:
    """What the adapters add to their rows: (r, T, O)."""
    dtype = layer.lora_A[held[0]].weight.dtype
    x_rTI = x_rTI.to(dtype)
    if len(rows.adapters) == 1:
        name = held[0]
        return layer.lora_B[name](layer.lora_A[name](x_rTI)) * layer.scaling[name]
    if id(layer) not in rows.factors:
        rows.factors[id(layer)] = _side_by_side(layer, rows.adapters, held)
    down_UkI, up_UOk, scale_U11 = rows.factors[id(layer)]
    if len(rows.adapters) < len(rows.index):
        down_UkI, up_UOk = down_UkI[rows.index], up_UOk[rows.index]
        scale_U11 = scale_U11[rows.index]
    hidden_rTk = torch.bmm(x_rTI, down_UkI.transpose(1, 2)) * scale_U11
    return torch.bmm(hidden_rTk, up_UOk.transpose(1, 2))


def _side_by_side(layer: Any, adapters: Sequence[str], held: list[str]) -> Factors:
    """Their factors, filled up with zeros to one rank; all zeros where one does not touch the layer."""
    rank = max(layer.lora_A[name].weight.shape[0] for name in held)
    down, up, scale = [], [], []
    for name in adapters:
        is_held = name in layer.lora_A
        A, B = (getattr(layer, part)[name if is_held else held[0]].weight for part in PARTS)
        missing = rank - A.shape[0]
        down.append(nn.functional.pad(A, (0, 0, 0, missing)) if missing else A)
        up.append(nn.functional.pad(B, (0, missing)) if missing else B)
        scale.append(layer.scaling[name] if is_held else 0.0)
    scale_U11 = torch.tensor(scale, dtype=down[0].dtype, device=down[0].device)[:, None, None]
    return Factors(torch.stack(down), torch.stack(up), scale_U11)
