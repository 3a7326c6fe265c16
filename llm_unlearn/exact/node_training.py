"""Training of one node: its block learns, everything else stays as it is, bit for bit.

The blocks under it are loaded as one frozen PEFT adapter, active and without dropout; the block in
training is a second adapter, fresh or continued from its parent's tensors. Blocks of later stages
do not exist yet. Every source of chance is seeded from the node's key.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from llm_unlearn.data.encoding import IGNORED, Example
from llm_unlearn.digests import tensors_digest
from llm_unlearn.errors import RunError
from llm_unlearn.exact.adapters import Tensors, adapter_config, assemble, expected_shapes
from llm_unlearn.exact.config import ModelShape, RunConfig
from llm_unlearn.exact.environment import make_deterministic
from llm_unlearn.exact.replay import StateCache, replay, returns_tuple
from llm_unlearn.exact.trie import Node, seed_from
from llm_unlearn.observing import Observer

OBSERVED = ("log_probs", "entropy", "is_top1", "log_sum_sq_probs")
FROZEN = "frozen"
TRAINED = "default"


class IsolationError(AssertionError):
    """Something outside the block changed during training: the node is not published."""


@dataclass(frozen=True)
class NodeTask:
    """Everything that decides the bits of one node.

    Attributes:
        parents: nodes that are frozen under this one, first stage first.
        parts: their tensors, in the same order.
        examples: the records to learn, in the order of their leaves.
        states: cached hidden states by record id, or None where nothing is replayed.
        start: the tensors that the block starts from, or None where it starts anew.
    """

    node: Node
    parents: list[Node]
    parts: list[Tensors]
    examples: list[Example]
    states: Mapping[str, StateCache] | None
    start: Tensors | None = None


class Collator:
    """Pads a batch on the right, and adds the cached hidden states where there are some."""

    def __init__(self, pad_token_id: int, states: Mapping[str, StateCache] | None):
        self.pad_token_id = pad_token_id
        self.states = states

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

        batch = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED),
        }
        if "index" in rows[0]:
            batch["index"] = torch.tensor([row["index"] for row in rows])
        batch["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        )
        if self.states is not None:
            cached = [self.states[row["record_id"]][row["record_id"]] for row in rows]
            batch["prefix_states"] = nn.utils.rnn.pad_sequence(cached, batch_first=True)
        return batch


class NodeTrainer(SFTTrainer):
    """`SFTTrainer` whose forward pass can begin at the block's lowest layer, and can be watched."""

    boundary: int = 0
    layers_return_tuple: bool = False
    observer: Observer | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        states, index = inputs.pop("prefix_states", None), inputs.pop("index", None)
        with ExitStack() as stack:
            if index is not None:
                stack.enter_context(self._observing(model, index))
            if states is not None:
                base = self.accelerator.unwrap_model(model).get_base_model()
                stack.enter_context(
                    replay(base, self.boundary, states.requires_grad_(), self.layers_return_tuple)
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def watch(self, observer: Observer) -> None:
        """Tell `observer` what each forward pass gives every token.

        TRL's fused head leaves no logits, but what they say of each label; one more sum is asked of it.
        """
        self.observer = observer
        model = cast(Any, self.accelerator.unwrap_model(self.model))
        add_fused_lm_head(model.get_base_model(), outputs=OBSERVED)

    @contextmanager
    def _observing(self, model: Any, index: torch.Tensor) -> Iterator[None]:
        def tell(_module: Any, _arguments: Any, given: Any) -> None:
            probability = given.log_probs.detach()
            values = {
                "log_probability": probability,
                "entropy": given.entropy,
                "accuracy": given.is_top1,
                "squares": given.log_sum_sq_probs.exp(),
            }
            epoch = int((self.state.epoch or 0) + 1e-6)
            assert self.observer is not None
            self.observer.observe_tokens(index, epoch, values, given.label_mask)

        handle = model.register_forward_hook(tell)
        try:
            yield
        finally:
            handle.remove()


class StepReporter(TrainerCallback):
    """Seeds dropout right before the first step, and reports every step."""

    def __init__(self, seed: int, on_step: Callable[[int, int], None] | None):
        self.seed = seed
        self.on_step = on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        set_seed(self.seed)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.on_step is not None:
            self.on_step(state.global_step, state.max_steps)


def initial_block(node: Node, shape: ModelShape) -> Tensors:
    """LoRA factors before training: A uniform as in PEFT (Kaiming, a = sqrt 5), B zero.

    They are drawn here and not by PEFT, which takes whatever state the global generator is in.
    """
    generator = torch.Generator().manual_seed(seed_from(node.key, "lora_init"))
    tensors: Tensors = {}
    for name, size in sorted(expected_shapes(node, shape).items()):
        if name.endswith("lora_A.weight"):
            bound = 1.0 / math.sqrt(size[1])
            tensors[name] = torch.empty(size).uniform_(-bound, bound, generator=generator).numpy()
        else:
            tensors[name] = np.zeros(size, np.float32)
    return tensors


def _lora_config(tensors: Tensors, run: RunConfig, shape: ModelShape, dropout: float) -> LoraConfig:
    options = adapter_config(tensors, run.lora, shape)
    for name in ("peft_type", "inference_mode", "revision", "base_model_name_or_path"):
        del options[name]
    return LoraConfig(**{**options, "lora_dropout": dropout})


def attach(base: PreTrainedModel, task: NodeTask, run: RunConfig, shape: ModelShape) -> PeftModel:
    """The base with the frozen prefix and the block at its start; only the block has gradients."""
    start = task.start if task.start is not None else initial_block(task.node, shape)
    model = get_peft_model(
        base, _lora_config(start, run, shape, run.lora.dropout), adapter_name=TRAINED
    )
    assert isinstance(model, PeftModel)
    _load(model, start, TRAINED)
    if task.parts:
        prefix = assemble(task.parts)
        model.add_adapter(FROZEN, _lora_config(prefix, run, shape, 0.0))
        _load(model, prefix, FROZEN)
        cast(Any, model.base_model).set_adapter([FROZEN, TRAINED])
    owned = set(_parameter_names(model, start))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in owned)
    return model


def _load(model: PeftModel, tensors: Tensors, adapter: str) -> None:
    state = {
        name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()
    }
    outcome = set_peft_model_state_dict(model, state, adapter_name=adapter)
    assert not outcome.unexpected_keys, (
        f"tensors that the model does not have: {outcome.unexpected_keys}"
    )


def _parameter_names(model: PeftModel, tensors: Tensors) -> dict[str, str]:
    """Full parameter name of every tensor of the block in training."""
    known = dict(model.named_parameters())
    names = {name.replace(".weight", f".{TRAINED}.weight"): name for name in tensors}
    assert names.keys() <= known.keys(), "the block's parameters are not in the model"
    return names


def read_block(model: PeftModel, node: Node, shape: ModelShape) -> Tensors:
    """The trained tensors of the block, as they go to disk.

    Raises:
        RunError: the block holds a value that is not finite.
    """
    wanted = expected_shapes(node, shape)
    parameters = dict(model.named_parameters())
    tensors = {
        stored: parameters[full].detach().cpu().float().numpy().copy()
        for full, stored in _parameter_names(model, dict.fromkeys(wanted)).items()  # pyright: ignore
    }
    assert all(tensors[name].shape == size for name, size in wanted.items())
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise RunError(
            "training diverged: the block holds values that are not finite, so it was not kept; "
            "lower --learning_rate"
        )
    return tensors


def train_node(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: NodeTask,
    run: RunConfig,
    shape: ModelShape,
    output_dir: str,
    on_step: Callable[[int, int], None] | None = None,
    observer: Observer | None = None,
) -> Tensors:
    """Train one node and give the base model back as it was.

    Args:
        observer: watches every forward pass, by the numbers of the task's examples; no bit depends on it.

    Returns:
        The tensors of the block, named as PEFT names them.

    Raises:
        IsolationError: a tensor outside the block changed.
        RunError: training diverged.
    """
    with ExitStack() as stack:
        stack.callback(_restore, base)
        model = attach(base, task, run, shape)
        stack.callback(model.unload)
        trained = set(_parameter_names(model, expected_shapes(task.node, shape)))  # pyright: ignore
        before = tensors_digest(model, skip=trained)
        _fit(model, tokenizer, task, run, output_dir, on_step, observer)
        if tensors_digest(model, skip=trained) != before:
            raise IsolationError(
                f"a tensor outside the block of node {task.node.key[:12]} changed during training"
            )
        return read_block(model, task.node, shape)


def _fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: NodeTask,
    run: RunConfig,
    output_dir: str,
    on_step: Callable[[int, int], None] | None,
    observer: Observer | None,
) -> None:
    seed = seed_from(task.node.key, "training")
    make_deterministic(run.num_threads)
    arguments = SFTConfig(
        output_dir=output_dir,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        packing=False,
        shuffle_dataset=False,
        ddp_find_unused_parameters=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=run.max_length,
        **run.runtime,
        **{name: value for name, value in run.training.items() if name != "seed"},
    )
    rows: list[dict[str, Any]] = [
        {"record_id": e.record_id, "input_ids": e.input_ids, "labels": e.labels}
        for e in task.examples
    ]
    if observer is not None:
        rows = [{**row, "index": number} for number, row in enumerate(rows)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    set_seed(seed)
    trainer = NodeTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=Collator(pad if pad is not None else 0, task.states),  # pyright: ignore
        processing_class=tokenizer,
        callbacks=[StepReporter(seed_from(task.node.key, "dropout"), on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    if observer is not None:
        trainer.watch(observer)
    if task.states is not None:
        trainer.boundary = min(task.node.block.layers)
        first = torch.tensor([task.examples[0].input_ids[:1]], device=model.device)
        trainer.layers_return_tuple = returns_tuple(model.get_base_model(), first)
    trainer.train()


def _restore(base: PreTrainedModel) -> None:
    """Undo what trainers leave on the model object: a patched forward, checkpointing, hooks."""
    if "forward" in vars(base):
        del base.forward
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
