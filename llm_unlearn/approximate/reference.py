"""The model before unlearning: the same weights with the trained tensors as they were.

With an adapter its starting values are swapped in for a forward pass. With full fine-tuning what
methods ask for is computed once and stored: log-probabilities in memory, distributions and hidden
states on disk. Log-probabilities are stored in both cases: they are a number a token, and asked for
in every epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from llm_unlearn.approximate.batches import collate
from llm_unlearn.approximate.losses import label_log_probabilities
from llm_unlearn.approximate.method import DISTRIBUTIONS, HIDDEN, LOG_PROBABILITIES
from llm_unlearn.approximate.step import Side, forward
from llm_unlearn.approximate.tuning import Tuned
from llm_unlearn.data.encoding import Example
from llm_unlearn.errors import UserError

Needs = Mapping[str, set[str]]


class Reference:
    """Answers what the model before unlearning thought of a side's rows.

    Args:
        directory: where distributions and hidden states are stored, for full fine-tuning.
    """

    def __init__(self, tuned: Tuned, directory: Path, pad_token_id: int, batch_size: int = 8):
        self.tuned = tuned
        self.directory = directory
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self._known: dict[tuple[str, str], list[Tensor]] = {}

    def prepare(self, needs: Needs, sides: Mapping[str, Sequence[Example]]) -> None:
        """Compute what is stored, with the model as it is now."""
        for side, kinds in needs.items():
            stored = {LOG_PROBABILITIES} | (set() if self.tuned.is_adapter else {DISTRIBUTIONS})
            if HIDDEN in kinds and not self.tuned.is_adapter:
                stored |= {HIDDEN}
            for kind in sorted(kinds & stored):
                self._known[side, kind] = self._store(side, kind, sides[side])

    def log_probabilities(self, side: Side) -> Tensor:
        """Of the labels, (B, T); 0 where there is none."""
        return self._stored(side, LOG_PROBABILITIES)

    def distributions(self, side: Side) -> Tensor:
        """Log-probabilities of the whole vocabulary, (B, T, V)."""
        if self.tuned.start is None:
            return self._stored(side, DISTRIBUTIONS)
        with self.tuned.swapped(self.tuned.start):
            outputs = forward(self.tuned.model, side.batch, hidden=False)
            return outputs.logits[:, :-1].float().log_softmax(-1)

    def hidden(self, side: Side, layer: int) -> Tensor:
        """Output of a decoder layer at the positions of the labels, (B, T, D)."""
        if self.tuned.start is None:
            return self._stored(side, HIDDEN)[:, :, layer + 1]
        with self.tuned.swapped(self.tuned.start):
            states = forward(self.tuned.model, side.batch, hidden=True).hidden_states
            return states[layer + 1][:, 1:].float()

    def _stored(self, side: Side, kind: str) -> Tensor:
        if (side.name, kind) not in self._known:
            raise UserError(f"the method did not say that it needs {kind} of {side.name}")
        rows = [self._known[side.name, kind][number] for number in side.index_B.tolist()]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        missing = side.labels_BT.shape[1] - padded.shape[1]
        padding = [0, 0] * (padded.dim() - 2) + [0, missing]
        return torch.nn.functional.pad(padded, padding).to(side.labels_BT.device)

    def _store(self, side: str, kind: str, examples: Sequence[Example]) -> list[Tensor]:
        rows = self._rows(kind, examples)
        return (
            list(rows) if kind == LOG_PROBABILITIES else self._to_disk(side, kind, rows, examples)
        )

    def _rows(self, kind: str, examples: Sequence[Example]) -> Iterator[Tensor]:
        """What is asked for of each example, without padding."""
        model = self.tuned.model
        was_training = model.training
        model.eval()
        for start in range(0, len(examples), self.batch_size):
            part = examples[start : start + self.batch_size]
            batch = collate([(e, 0, True) for e in part], self.pad_token_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with torch.no_grad():
                values = _values(kind, forward(model, batch, kind == HIDDEN), batch["labels"])
            for row, example in zip(values, part, strict=True):
                yield row[: len(example.input_ids) - 1].cpu()
        model.train(was_training)

    def _to_disk(
        self, side: str, kind: str, rows: Iterator[Tensor], examples: Sequence[Example]
    ) -> list[Tensor]:
        """The same rows, one after another in a file that is mapped into memory."""
        name = f"reference-{side.replace('/', '-')}-{kind}-{PartialState().process_index}.bin"
        self.directory.mkdir(parents=True, exist_ok=True)
        total = sum(len(example.input_ids) - 1 for example in examples)
        found: list[Tensor] = []
        flat, place = None, 0
        for row in rows:
            if flat is None:
                shape = (total, *row.shape[1:])
                flat = np.memmap(self.directory / name, dtype=np.float32, mode="w+", shape=shape)
            flat[place : place + len(row)] = row.numpy()
            found.append(torch.from_numpy(flat[place : place + len(row)]))
            place += len(row)
        return found


def _values(kind: str, outputs: object, labels: Tensor) -> Tensor:
    logits = outputs.logits[:, :-1].float()  # pyright: ignore[reportAttributeAccessIssue]
    if kind == LOG_PROBABILITIES:
        return label_log_probabilities(logits, labels[:, 1:])
    if kind == DISTRIBUTIONS:
        return logits.log_softmax(-1)
    states = outputs.hidden_states  # pyright: ignore[reportAttributeAccessIssue]
    return torch.stack([state[:, 1:].float() for state in states], dim=2)
