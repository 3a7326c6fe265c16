"""Holdout retraining: how far a record's predictions move when training goes on with held-out text.

    (KL(p|q) + KL(q|p)) / 2, a mean over the record's tokens;  p before, q after   (arXiv 2410.16516)

It needs nothing from the training run, so it works on a model of somebody else's. Only the adapter is kept twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_unlearn.data.encoding import Example
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.orientation import Floats
from llm_unlearn.memorization.probing import (
    TOKENS_AT_ONCE,
    batches,
    evaluating,
    logits_of,
    padded,
)


@dataclass(frozen=True)
class Retraining:
    """How training goes on: the rate should be that of the training before, few epochs, then it stops.

    Attributes:
        epochs: at most; it ends with the first whose loss is not lower than the last's.
    """

    learning_rate: float = 2e-4
    epochs: int = 3
    batch_size: int = 8
    seed: int = 0


def holdout_retraining(
    model: Any,
    examples: Sequence[Example],
    holdout: Sequence[Example],
    pad_token_id: int,
    options: Retraining | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Floats:
    """Divergence of each record's predictions (nats), in the order of the records; not yet oriented.

    The model comes back bit for bit as it was. Without an adapter of its own it gets a fresh one meanwhile.

    Args:
        holdout: what `check_holdout` has nothing against.
    """
    with _adapted(model) as (tuned, factors), evaluating(tuned), _put_back(factors) as start:
        _train(tuned, factors, holdout, pad_token_id, options or Retraining())
        moved = [factor.detach().clone() for factor in factors]
        return _divergences(tuned, factors, (start, moved), examples, pad_token_id, advance)


def check_holdout(records: Sequence[Record], holdout: Sequence[Record]) -> None:
    """Raises UserError if there is no held-out text, or one of them is among the records."""
    if not holdout:
        raise UserError("holdout retraining needs held-out records: give --holdout")
    known = {tuple(record.texts()) for record in records}
    if both := sum(tuple(record.texts()) in known for record in holdout):
        raise UserError(
            f"{both} held-out records are among those that are scored: what was trained on is not held "
            "out; take them out of --holdout"
        )


@contextmanager
def _adapted(model: Any) -> Iterator[tuple[Any, list[nn.Parameter]]]:
    """The model with an adapter, and its factors; nothing else has gradients."""
    from peft import LoraConfig, PeftModel, get_peft_model

    is_fresh = not isinstance(model, PeftModel)
    had = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned: Any = get_peft_model(model, lora) if is_fresh else model
    factors = [p for name, p in tuned.named_parameters() if ".lora_" in name]
    for parameter in tuned.parameters():
        parameter.requires_grad_(False)
    for factor in factors:
        factor.requires_grad_(True)
    try:
        if not factors:
            raise UserError("the model's adapter is not a LoRA: merge it first")
        yield tuned, factors
    finally:
        if is_fresh:
            tuned.unload()
        for parameter, had_gradient in had:
            parameter.requires_grad_(had_gradient)


@contextmanager
def _put_back(factors: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    start = [factor.detach().clone() for factor in factors]
    try:
        yield start
    finally:
        _load(factors, start)


def _load(factors: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for factor, value in zip(factors, values, strict=True):
            factor.copy_(value)
            factor.grad = None


def _train(
    model: Any,
    factors: list[nn.Parameter],
    holdout: Sequence[Example],
    pad_token_id: int,
    options: Retraining,
) -> None:
    """Without dropout, so that the seed decides the order of rows and nothing else is drawn."""
    optimizer = torch.optim.AdamW(factors, lr=options.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    last = float("inf")
    for _ in range(options.epochs):
        order = torch.randperm(len(holdout), generator=generator).tolist()
        total = 0.0
        for start in range(0, len(order), options.batch_size):
            rows = [holdout[n] for n in order[start : start + options.batch_size]]
            batch = padded(rows, pad_token_id, model.device)
            logits_BTV, labels_BT = logits_of(model, batch), batch["labels"][:, 1:]
            loss = nn.functional.cross_entropy(logits_BTV.float().transpose(1, 2), labels_BT)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        if not total < last:
            break
        last = total


@torch.no_grad()
def _divergences(
    model: Any,
    factors: list[nn.Parameter],
    states: tuple[list[Tensor], list[Tensor]],
    examples: Sequence[Example],
    pad_token_id: int,
    advance: Callable[[int], None],
) -> Floats:
    found = np.full(len(examples), np.nan)
    for numbers in batches(examples, TOKENS_AT_ONCE // 2):
        batch = padded([examples[n] for n in numbers], pad_token_id, model.device)
        mask_BT = batch["labels"][:, 1:] >= 0
        before, after = [], []
        for state, kept in zip(states, (before, after), strict=True):
            _load(factors, state)
            kept.append(logits_of(model, batch)[mask_BT].float().log_softmax(-1))
        values_N = symmetric_divergence(before[0], after[0])
        rows_N = mask_BT.nonzero()[:, 0]
        total_B = torch.zeros(len(numbers), device=values_N.device).index_add_(0, rows_N, values_N)
        found[numbers] = (total_B / mask_BT.sum(1)).cpu().numpy()
        advance(len(numbers))
    return found


def symmetric_divergence(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """`(KL(p|q) + KL(q|p)) / 2 = sum_v (p - q)(log p - log q) / 2`, nats, (N,)."""
    return 0.5 * ((log_p_NV.exp() - log_q_NV.exp()) * (log_p_NV - log_q_NV)).sum(-1)
