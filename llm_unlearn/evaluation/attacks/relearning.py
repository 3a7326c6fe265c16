"""Relearning: how fast a few steps of fine-tuning bring the forgotten knowledge back.

What it shows: whether an unlearned model only hides what it knew. A model that hides it needs fewer
steps on a small part of the forgotten data, or on harmless related text, than one that never knew.

Source: Hu, Fu, Wu, Smith, Unlearning or Obfuscating? Jogging the Memory of Unlearned LLMs via
Benign Relearning (arXiv 2406.13356, ICLR 2025). The yardstick of steps to recover
against a model that never saw the data is that of SGTM.

Control: the retrained model learns from the same rows too, so the attack's result is the area
*between* the two curves, never the unlearned model's curve alone. `measure` should look at rows
that are not in the attack, or it tells what the attack taught.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy import integrate
from torch import nn
from transformers import PreTrainedTokenizerBase

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.layers import Linear, linear_layers
from llm_unlearn.evaluation.scorer import Item, tokenize, tokenize_open
from llm_unlearn.evaluation.statistics import Interval, across_seeds

IGNORED = -100
Row = tuple[str, str] | Item


@dataclass(frozen=True)
class RelearningAttack:
    """How the attacker fine-tunes: AdamW without weight decay at a constant learning rate.

    Attributes:
        steps: when knowledge is measured, rising from 0 or more; the last is where training ends.
        rank: of the low-rank update of every linear layer; its scale is 2 (alpha = 2 rank).
        full: train every parameter instead of a low-rank update.
        max_length: rows are cut at the end beyond so many tokens.
    """

    steps: tuple[int, ...] = (0, 10, 50, 100)
    learning_rate: float = 1e-4
    batch_size: int = 8
    rank: int = 16
    full: bool = False
    max_length: int = 512

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or self.steps[0] < 0 or not rising:
            raise ValueError(f"expected rising steps from 0 or more, got {self.steps}")
        if self.batch_size < 1 or self.rank < 1 or not self.learning_rate > 0:
            raise ValueError("expected a batch size, a rank and a learning rate above 0")


@dataclass(frozen=True)
class Curve:
    """What `measure` said at each step of one attack."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    seed: int = 0


class Recovery(NamedTuple):
    """Steps until a level is reached; NaN and not `recovered` where the curve never reaches it."""

    steps: float
    recovered: bool


@dataclass(frozen=True)
class RelearningResult:
    """The attack's outcome over seeds; intervals are Student's t over seeds, 95 %.

    Attributes:
        area: between the unlearned and the retrained curve (`area_between`): above 0 = the
            unlearned model recovers faster, or started from more.
        area_never_trained: the same against a model that never saw anything, where there is one.
        gain: by role, the rise of the curve from its first to its last step.
        recovery: by role, steps until `level`; NaN if any seed never reached it.
        never: by role, the seeds that never reached it.
        level: NaN where none was given.
    """

    area: Interval
    area_never_trained: Interval | None
    gain: dict[str, Interval]
    recovery: dict[str, Interval] = field(default_factory=dict)
    never: dict[str, int] = field(default_factory=dict)
    level: float = math.nan


def relearn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    measure: Callable[[Any], float],
    attack: RelearningAttack | None = None,
    seed: int = 0,
) -> Curve:
    """Fine-tune on some rows, measuring on the way, and leave the model as it was, bit for bit.

    A low-rank update is hooked onto every linear layer but the head (LoRA's parametrisation and
    PEFT's initialisation: A uniform within 1 / sqrt(inputs), B zero), so any causal model can be
    attacked: plain, with PEFT adapters, an ensemble. Dropout is off. Neither the attack nor
    `measure` moves the global random state of torch.

    Args:
        rows: prompt and answer as texts (a space is put between where neither brings white space,
            and an end of sequence after), or as the ids of an `Item`, which are taken as they are.
        measure: knowledge of a model, higher = knows more; called once per step of `attack.steps`.
        seed: of the update's first values and of the order of rows.

    Raises:
        UserError: nothing to learn in the rows, or a model that cannot be trained this way.
    """
    attack = attack or RelearningAttack()
    items = _encode_rows(rows, tokenizer, attack.max_length)
    devices = [model.device] if model.device.type == "cuda" else []
    values: list[float] = []
    with torch.random.fork_rng(devices=devices), _evaluating(model):
        torch.manual_seed(seed)
        with _trainable(model, attack, seed) as parameters:
            optimizer = torch.optim.AdamW(parameters, lr=attack.learning_rate, weight_decay=0.0)
            batches = _batches(items, attack.batch_size, seed)
            done = 0
            for step in attack.steps:
                for _ in range(step - done):
                    _train_step(model, next(batches), optimizer)
                done = step
                with torch.no_grad():
                    values.append(float(measure(model)))
    return Curve(attack.steps, tuple(values), seed)


def area_between(first: Curve, second: Curve) -> float:
    """Mean height of the first curve above the second: trapezoids over steps, over their range.

    Range: that of `measure`, positive and negative; NaN if a value is, or with one step only.

    Raises:
        ValueError: curves over other steps.
    """
    if first.steps != second.steps:
        raise ValueError(f"expected the same steps, got {first.steps} and {second.steps}")
    steps = np.asarray(first.steps, dtype=np.float64)
    if len(steps) < 2:
        return math.nan
    heights = np.asarray(first.values) - np.asarray(second.values)
    return float(integrate.trapezoid(heights, steps) / (steps[-1] - steps[0]))


def steps_to_recover(curve: Curve, level: float) -> Recovery:
    """First step at which the curve, drawn with straight lines, reaches a level."""
    previous: tuple[float, float] | None = None
    for step, value in zip(curve.steps, curve.values, strict=True):
        if value >= level:
            if previous is None or previous[1] >= level:
                return Recovery(float(step), True)
            share = (level - previous[1]) / (value - previous[1])
            return Recovery(previous[0] + share * (step - previous[0]), True)
        previous = None if math.isnan(value) else (float(step), value)
    return Recovery(math.nan, False)


def compare_curves(
    unlearned: Curve | Sequence[Curve],
    retrained: Curve | Sequence[Curve],
    never_trained: Curve | Sequence[Curve] | None = None,
    level: float = math.nan,
) -> RelearningResult:
    """Compare attacks on several models: one curve per seed, the same seeds for each model.

    Args:
        level: knowledge that counts as recovered, such as half of what the model knew before.

    Raises:
        ValueError: other seeds or other steps.
    """
    curves = {"unlearned": _by_seed(unlearned), "retrained": _by_seed(retrained)}
    if never_trained is not None:
        curves["never_trained"] = _by_seed(never_trained)
    seeds = sorted(curves["unlearned"])
    if any(sorted(of_role) != seeds for of_role in curves.values()):
        raise ValueError("expected the same seeds for every model")

    def area(other: str) -> Interval:
        pairs = [(curves["unlearned"][seed], curves[other][seed]) for seed in seeds]
        return across_seeds([area_between(*pair) for pair in pairs])

    recoveries = {
        role: [steps_to_recover(curve, level) for curve in of_role.values()]
        for role, of_role in curves.items()
        if not math.isnan(level)
    }
    return RelearningResult(
        area=area("retrained"),
        area_never_trained=area("never_trained") if never_trained is not None else None,
        gain={
            role: across_seeds([curve.values[-1] - curve.values[0] for curve in of_role.values()])
            for role, of_role in curves.items()
        },
        recovery={role: _mean_recovery(found) for role, found in recoveries.items()},
        never={role: sum(not r.recovered for r in found) for role, found in recoveries.items()},
        level=level,
    )


def _by_seed(curves: Curve | Sequence[Curve]) -> dict[int, Curve]:
    listed = [curves] if isinstance(curves, Curve) else list(curves)
    by_seed = {curve.seed: curve for curve in listed}
    if not listed or len(by_seed) < len(listed):
        raise ValueError("expected at least one curve, and each seed once")
    return dict(sorted(by_seed.items()))


def _mean_recovery(found: Sequence[Recovery]) -> Interval:
    """NaN if any seed never recovered: a mean over those that did would flatter the attack."""
    never = sum(not recovery.recovered for recovery in found)
    if never:
        return Interval(math.nan, math.nan, math.nan, len(found) - never, never)
    return across_seeds([recovery.steps for recovery in found])


def _encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Item]:
    if not rows:
        raise UserError("the relearning attack has no rows: give it some prompts with answers")
    items = [row if isinstance(row, Item) else _encoded(*row, tokenizer) for row in rows]
    cut = [Item(i.prompt, i.target[: max(0, max_length - len(i.prompt))]) for i in items]
    kept = [item for item in cut if item.prompt and item.target]
    if not kept:
        raise UserError(
            f"no answer of the relearning attack begins within {max_length} tokens: raise max_length"
        )
    return kept


def _encoded(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> Item:
    separator = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    target = tokenize(tokenizer, separator + answer, add_special_tokens=False)
    end = tokenizer.eos_token_id
    ended = target if end is None or target[-1:] == [end] else [*target, cast(int, end)]
    return Item(tuple(tokenize_open(tokenizer, prompt)), tuple(ended))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off everywhere, and every module back in its mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def _trainable(
    model: Any, attack: RelearningAttack, seed: int
) -> Iterator[list[torch.nn.Parameter]]:
    """What the attack trains; afterwards no trace of it is left in the model."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        with _full(model) if attack.full else _low_rank(model, attack.rank, seed) as parameters:
            yield parameters
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _full(model: Any) -> Iterator[list[torch.nn.Parameter]]:
    """Every parameter, on copies of their data: the originals are put back, not computed back."""
    trained = [p for p in model.parameters() if p.is_floating_point()]
    states = [*trained, *(b for b in model.buffers())]
    originals = [state.data for state in states]
    gradients = [parameter.grad for parameter in trained]
    for state in states:
        state.data = state.data.clone()
    for parameter in trained:
        parameter.grad = None
        parameter.requires_grad_(True)
    try:
        yield trained
    finally:
        for state, original in zip(states, originals, strict=True):
            state.data = original
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def _low_rank(model: Any, rank: int, seed: int) -> Iterator[list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    parameters: list[torch.nn.Parameter] = []
    handles = []
    try:
        for layer in linear_layers(model).values():
            update = _Update(layer, rank, generator)
            parameters += [update.down_RI, update.up_OR]
            handles.append(layer.register_forward_hook(update.add))
        yield parameters
    finally:
        for handle in handles:
            handle.remove()


class _Update:
    """A low-rank update of one linear layer: R is its rank, I and O the layer's inputs and outputs."""

    def __init__(self, layer: Linear, rank: int, generator: torch.Generator):
        shape = layer.weight.shape
        outputs, inputs = shape if isinstance(layer, nn.Linear) else (shape[1], shape[0])
        if isinstance(layer, nn.Linear):  # a quantised layer packs its weight into another shape
            outputs, inputs = layer.out_features, layer.in_features
        bound = 1 / math.sqrt(inputs)
        down_RI = (torch.rand(rank, inputs, generator=generator) * 2 - 1) * bound
        device = layer.weight.device
        self.down_RI = torch.nn.Parameter(down_RI.to(device))
        self.up_OR = torch.nn.Parameter(torch.zeros(outputs, rank, device=device))

    def add(self, _layer: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> Any:
        hidden = arguments[0].to(self.down_RI.dtype) @ self.down_RI.T
        return output + (2 * hidden @ self.up_OR.T).to(output.dtype)


def _batches(items: Sequence[Item], size: int, seed: int) -> Iterator[list[Item]]:
    """Epoch after epoch, each in a new seeded order; an epoch's last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [items[index] for index in order[start : start + size]]


def _train_step(model: Any, batch: list[Item], optimizer: torch.optim.Optimizer) -> None:
    width = max(len(item.prompt) + len(item.target) for item in batch)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        filled = [row + [filler] * (width - len(row)) for row in rows]
        return torch.tensor(filled, device=model.device)

    rows = [[*item.prompt, *item.target] for item in batch]
    ids_BT, mask_BT = padded(rows, 0), padded([[1] * len(row) for row in rows], 0)
    labels = [[IGNORED] * len(item.prompt) + list(item.target) for item in batch]
    labels_BT = padded(labels, IGNORED)
    with torch.enable_grad():
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits.float()
        loss = nn.functional.cross_entropy(
            logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]),
            labels_BT[:, 1:].reshape(-1),
            ignore_index=IGNORED,
        )
        if not loss.requires_grad:
            raise UserError(
                f"{type(model).__name__} computes no gradients, so it cannot be fine-tuned: "
                "attack the model inside it"
            )
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
