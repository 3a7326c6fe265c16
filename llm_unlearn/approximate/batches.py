"""Forget and retain rows side by side, in an order that depends on the seed alone."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_unlearn.approximate.step import Batch
from llm_unlearn.data.encoding import IGNORED, Example


class Pick(NamedTuple):
    """Numbers of a forget and a retain row; whether the pair counts, or fills up a batch."""

    forget: int
    retain: int
    counts: bool = True


class PairedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of every side by the numbers of a `Pick`.

    Args:
        sides: examples by side; `forget/NAME` goes along with `forget`.

    Attributes:
        stopped: forget rows that no longer count (per-sample stopping).
    """

    def __init__(self, sides: Mapping[str, Sequence[Example]]):
        self.sides = sides
        self.stopped: set[int] = set()

    def __getitem__(self, pick: Pick) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = {}
        for name, rows in self.sides.items():
            anchor = name.split("/")[0]
            number = pick.forget if anchor == "forget" else pick.retain
            active = pick.counts and not (anchor == "forget" and number in self.stopped)
            found[name] = (rows[number], number, active)
        return found

    def __len__(self) -> int:
        return len(self.sides["forget"])


class PairSampler(torch.utils.data.Sampler[Pick]):
    """Every row of the anchor once an epoch in a seeded order, with the next row of the other side.

    The other side is gone through in seeded orders too, again and again across epochs. An epoch is
    filled up to whole batches of all processes with pairs that count for nothing, so that the
    number of processes changes nothing.

    Args:
        sizes: rows of `forget` and `retain` (0: there is none).
        multiple: rows of a batch of all processes together.
    """

    def __init__(self, sizes: Mapping[str, int], anchor: str, multiple: int, seed: int):
        self.sizes = sizes
        self.anchor = anchor
        self.other = "retain" if anchor == "forget" else "forget"
        self.multiple = multiple
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.sizes[self.anchor] // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[Pick]:
        count, others = self.sizes[self.anchor], self.sizes[self.other]
        order = self._order(count, f"{self.anchor} {self.epoch}")
        for place, number in enumerate(order):
            partner = self._partner(self.epoch * count + place, others) if others else 0
            yield Pick(*self._ordered(number, partner))
        for _ in range(len(self) - count):
            yield Pick(*self._ordered(order[0], 0), counts=False)

    def _partner(self, place: int, count: int) -> int:
        return self._order(count, f"{self.other} round {place // count}")[place % count]

    def _ordered(self, anchored: int, partner: int) -> tuple[int, int]:
        return (anchored, partner) if self.anchor == "forget" else (partner, anchored)

    def _order(self, count: int, what: str) -> list[int]:
        return seeded_order(count, f"{self.seed} {what}")


@functools.lru_cache(maxsize=4)
def seeded_order(count: int, phrase: str) -> list[int]:
    """The numbers below `count` in an order that depends on the phrase alone."""
    told = hashlib.sha256(phrase.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(told[:8], "big") >> 1)
    return torch.randperm(count, generator=generator).tolist()


def collate(rows: Sequence[tuple[Example, int, bool]], pad_token_id: int) -> Batch:
    """Pad one side's examples on the right."""
    width = max(len(example.input_ids) for example, _, _ in rows)

    def padded(values: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor([value + [filler] * (width - len(value)) for value in values])

    return {
        "input_ids": padded([e.input_ids for e, _, _ in rows], pad_token_id),
        "labels": padded([e.labels for e, _, _ in rows], IGNORED),
        "attention_mask": padded([[1] * len(e.input_ids) for e, _, _ in rows], 0),
        "index": torch.tensor([number for _, number, _ in rows]),
        "active": torch.tensor([active for _, _, active in rows]),
    }


class PairCollator:
    """Batches of every side."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Batch]:
        return {name: collate([row[name] for row in rows], self.pad_token_id) for name in rows[0]}
