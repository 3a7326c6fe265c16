"""What a trainer tells somebody who watches: what each row's tokens were given, before each step.

Only what training has computed anyway; a watcher reads, and changes nothing.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor


class Observer(Protocol):
    """Watches one training run."""

    def observe_logits(
        self, index_B: Tensor, epoch: int, logits_BTV: Tensor, labels_BT: Tensor
    ) -> None:
        """Rows of a batch. Labels are of the tokens that the logits predict, -100 where none counts.

        Args:
            index_B: the rows' numbers among the records.
        """
        ...

    def observe_tokens(
        self, index_B: Tensor, epoch: int, values_BT: Mapping[str, Tensor], mask_BT: Tensor
    ) -> None:
        """The same where a fused head leaves numbers for each token and no logits.

        Args:
            values_BT: `log_probability` of the label (nats), `entropy` (nats), `accuracy` (is it the likeliest?)
                and `squares` (the sum of the squared probabilities).
        """
        ...

    def collect(self) -> dict[str, NDArray[Any]]:
        """Everything that all processes saw, as columns: `index`, `epoch`, `tokens` and the values."""
        ...

    def restore(self, columns: Mapping[str, Any]) -> None:
        """Go on from what an interrupted run saw."""
        ...
