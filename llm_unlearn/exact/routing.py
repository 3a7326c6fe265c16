"""Which adapter sees which row of a batch, and how their answers become one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_unlearn.exact.selection import BASE_MODEL, Choice

BASE = "__base__"  # PEFT's name for rows of a mixed batch that no adapter touches


@dataclass(frozen=True)
class Routing:
    """Which adapter sees which row: R pairs, the first choice of every row first.

    Attributes:
        rows: index of the row, (R,).
        names: adapter of each pair, R of them.
        log_weights: of its probabilities in the answer, (R,).
        sizes: how many rows have a first choice (all B), a second, ...
    """

    rows: torch.Tensor
    names: list[str]
    log_weights: torch.Tensor
    sizes: tuple[int, ...]

    @classmethod
    def pairs(cls, rows: Sequence[int], names: Sequence[str]) -> "Routing":
        """Pairs to be asked in one batch and kept apart."""
        return cls(torch.tensor(rows), list(names), torch.zeros(len(rows)), (len(rows),))

    @classmethod
    def of(
        cls, choices: list[list[Choice]], adapters: Sequence[str], nobody: str = BASE
    ) -> "Routing":
        """Pairs whose answers `combine` to one for each row.

        Args:
            nobody: who answers where no shard was chosen.
        """
        rows, names, weights, sizes = [], [], [], []
        for rank in range(max(map(len, choices))):
            having = [row for row, chosen in enumerate(choices) if len(chosen) > rank]
            sizes.append(len(having))
            for row in having:
                choice = choices[row][rank]
                rows.append(row)
                names.append(nobody if choice.adapter == BASE_MODEL else adapters[choice.adapter])
                weights.append(choice.weight)
        return cls(torch.tensor(rows), names, torch.tensor(weights).log(), tuple(sizes))

    def spread(self, tensor_B: torch.Tensor) -> torch.Tensor:
        """Rows repeated for every adapter that sees them: (B, ...) to (R, ...)."""
        return tensor_B[self.rows.to(tensor_B.device)]

    def combine(self, log_probs_RTV: torch.Tensor) -> torch.Tensor:
        """Log of the weighted mean of probabilities: (R, T, V) to (B, T, V)."""
        weighted = log_probs_RTV + self.log_weights.to(log_probs_RTV.device)[:, None, None]
        combined = weighted[: self.sizes[0]]
        start = self.sizes[0]
        for size in self.sizes[1:]:
            rows = self.rows[start : start + size].to(log_probs_RTV.device)
            both = torch.logaddexp(combined[rows], weighted[start : start + size])
            combined = combined.index_copy(0, rows, both)
            start += size
        return combined

    def ballot(self, log_probs_RTV: torch.Tensor) -> torch.Tensor:
        """Log of the share of votes: each adapter has one for its likeliest token, the mean another.

        So a majority decides, the mean breaks ties, and no token is impossible.
        """
        shares = self.combine(log_probs_RTV).exp()
        winners = log_probs_RTV.argmax(dim=-1, keepdim=True)
        start = 0
        for size in self.sizes:
            rows = self.rows[start : start + size].to(shares.device)
            votes = torch.ones_like(winners[start : start + size], dtype=shares.dtype)
            voted = shares[rows].scatter_add(-1, winners[start : start + size], votes)
            shares = shares.index_copy(0, rows, voted)
            start += size
        return (shares / (len(self.sizes) + 1)).log()
