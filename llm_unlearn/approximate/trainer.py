"""The one trainer of all methods: forget and retain rows together, averaged over whole steps.

A method gives sums over rows, tokens or positions; they are divided by how many the whole optimizer
step has, over all micro-batches and processes. So neither gradient accumulation nor the number of
processes changes what a step does, beyond rounding.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.batches import PairCollator, PairedRows, PairSampler
from llm_unlearn.approximate.method import Method
from llm_unlearn.approximate.reference import Reference
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.step import UNITS, Step, Term, count_units
from llm_unlearn.approximate.watch import Watch
from llm_unlearn.errors import RunError
from llm_unlearn.observing import Observer

STATE_NAME = "unlearning_state.json"
TENSORS_NAME = "trained.safetensors"
Counts = Mapping[str, Tensor]


class DivergedError(ArithmeticError):
    """The loss is no number any more."""


class GradientModifier(Protocol):
    """Changes gradients before each optimizer step, and parameters right after it."""

    def apply(self, parameters: Mapping[str, torch.nn.Parameter]) -> None: ...

    def after_step(self, parameters: Mapping[str, torch.nn.Parameter]) -> None: ...


class SampleStopper(Protocol):
    """Says after each epoch which forget rows are forgotten."""

    def stopped(self, model: Any) -> set[int]: ...


class UnlearningTrainer(Trainer):
    """Runs a method's loss.

    Attributes:
        history: means of every term, by optimizer step.
        diverged_at: the step whose loss was no number, after which training ended.
        observer: is told what every forward pass gives; set it before `run`.
    """

    # Our losses are divided by what the whole step holds.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        config: UnlearningConfig,
        method: Method,
        session: Session,
        reference: Reference,
        watch: Watch | None = None,
        stopper: SampleStopper | None = None,
        modifier: GradientModifier | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ):
        self.method = method
        self.session = session
        self.reference = reference
        self.rows = PairedRows(session.sides)
        self.watch = watch
        self.modifier = modifier
        self.observer: Observer | None = None
        self.history: list[dict[str, float]] = []
        self.diverged_at: int | None = None
        self._step_terms: dict[str, Tensor] = {}
        self._last_good: dict[str, Tensor] | None = None
        super().__init__(
            model=session.model,
            args=config,
            train_dataset=self.rows,
            data_collator=PairCollator(session.pad_token_id),
            processing_class=session.tokenizer,
            callbacks=[_Rounds(self, stopper, on_step)],
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        sizes = {name: len(self.session.sides.get(name, ())) for name in ("forget", "retain")}
        world = self.args.world_size * self.args.per_device_train_batch_size
        return PairSampler(sizes, self.method.anchor, world, self.args.seed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of one step, and how many units all processes have in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total: dict[str, Tensor] = {}
        for batch in batches:
            for name, counts in count_units(batch).items():
                total[name] = total.get(name, torch.zeros_like(counts)) + counts
        names = sorted(total)
        if names:
            stacked = torch.stack([total[name] for name in names]).to(self.args.device)
            gathered = self.accelerator.reduce(stacked, reduction="sum")
            total = dict(zip(names, gathered, strict=True))  # pyright: ignore[reportArgumentType]
        self._step_terms = {}
        return batches, total

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ):
        progress = self.state.global_step / max(1, self.state.max_steps)
        step = Step(model, inputs, self.reference, int(self.state.epoch or 0), progress)
        terms = self.method.terms(step)
        loss = torch.zeros((), device=self.args.device)
        for term in terms:
            mean = term.total / _units(term, num_items_in_batch)
            known = self._step_terms.get(term.name, torch.zeros_like(mean))
            self._step_terms[term.name] = known + mean.detach()
            loss = loss + term.weight * mean
        if self.observer is not None:
            self._observe(step, self.observer)
        # DistributedDataParallel averages gradients over processes: what is wanted is their sum.
        return loss * self.args.world_size

    def _observe(self, step: Step, observer: Observer) -> None:
        """Tell what the forward passes of a step gave its rows; records are numbered forget first."""
        for side in step.computed():
            first = len(self.session.forget) if side.name == "retain" else 0
            labels_BT = side.labels_BT.masked_fill(~side.batch["active"][:, None], -100)
            epoch = int((self.state.epoch or 0) + 1e-6)
            observer.observe_logits(side.index_B + first, epoch, side.logits_BTV, labels_BT)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        bad = self.accelerator.reduce((~torch.isfinite(loss)).long(), reduction="sum")
        if bad.item():  # pyright: ignore[reportAttributeAccessIssue]
            raise DivergedError
        return loss

    def run(self, checkpoint: str | None) -> None:
        """Train, from a checkpoint if there is one; a loss that is no number ends it.

        Raises:
            RunError: it did, and there is no good state to go back to.
        """
        try:
            self.train(resume_from_checkpoint=checkpoint)
        except DivergedError:
            self.diverged_at = self.state.global_step + 1
        if self.diverged_at is None and not self.session.tuned.is_finite():
            self.diverged_at = self.state.global_step
        if self.diverged_at is not None:
            self._back_to_last_good()

    def _back_to_last_good(self) -> None:
        if self._last_good is not None:
            self.session.tuned.load(self._last_good)
        elif checkpoint := last_checkpoint(Path(str(self.args.output_dir))):
            self.session.tuned.restore(checkpoint / TENSORS_NAME)
        else:
            raise RunError(
                f"the loss was no number at step {self.diverged_at}, before there was a state to keep: "
                "nothing was written; lower --learning_rate"
            )

    def remember_good(self) -> None:
        """Keep the weights whose losses were numbers. A small copy for a LoRA; weights in full
        training are on disk once an epoch.
        """
        if self.session.tuned.start is not None and self.session.tuned.is_finite():
            tuned = self.session.tuned.trainable
            self._last_good = {name: p.detach().clone() for name, p in tuned.items()}

    def step_means(self) -> dict[str, float]:
        """Every term's mean over the step that has just been taken, all processes together."""
        if not self._step_terms:
            return {}
        names = sorted(self._step_terms)
        stacked = torch.stack([self._step_terms[name] for name in names])
        summed = self.accelerator.reduce(stacked, reduction="sum")
        return dict(zip(names, summed.tolist(), strict=True))  # pyright: ignore

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint holds what is trained; the rest of the model is where it came from."""
        directory = Path(output_dir or str(self.args.output_dir))
        seen = self.observer.collect() if self.observer is not None else {}
        if self.args.should_save:
            directory.mkdir(parents=True, exist_ok=True)
            self.session.tuned.save(directory / TENSORS_NAME)
            content = {
                "seen": {name: values.tolist() for name, values in seen.items()},
                "method": self.method.state(),
                "stopped": sorted(self.rows.stopped),
                "history": self.history,
                "watch": self.watch.state() if self.watch else {},
            }
            (directory / STATE_NAME).write_text(json.dumps(content))

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        directory = Path(str(resume_from_checkpoint))
        self.session.tuned.restore(directory / TENSORS_NAME)
        content = json.loads((directory / STATE_NAME).read_text())
        self.method.load_state(content["method"])
        self.rows.stopped = set(content["stopped"])
        self.history = content["history"]
        if self.watch:
            self.watch.load_state(content["watch"])
        if self.observer is not None and self.is_world_process_zero():
            self.observer.restore(content["seen"])


class _Rounds(TrainerCallback):
    """What happens around steps and epochs."""

    def __init__(
        self,
        trainer: UnlearningTrainer,
        stopper: SampleStopper | None,
        on_step: Callable[[int, int], None] | None,
    ):
        self.trainer = trainer
        self.stopper = stopper
        self.on_step = on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        set_seed(args.seed)
        self._find_stopped(control)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.remember_good()
        if self.trainer.modifier is not None:
            self.trainer.modifier.apply(self.trainer.session.tuned.trainable)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.modifier is not None:
            self.trainer.modifier.after_step(self.trainer.session.tuned.trainable)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        means = self.trainer.step_means()
        self.trainer.history.append({"step": state.global_step, **means})
        self.trainer.method.after_step(means)
        if self.on_step is not None:
            self.on_step(state.global_step, state.max_steps)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        watch = self.trainer.watch
        if watch is not None and watch.look(self.trainer.session.tuned, round(state.epoch or 0)):
            control.should_training_stop = True
        self._find_stopped(control)

    def _find_stopped(self, control: Any) -> None:
        if self.stopper is None:
            return
        model = self.trainer.session.model
        was_training = model.training
        model.eval()
        with torch.no_grad():
            self.trainer.rows.stopped = self.stopper.stopped(model)
        model.train(was_training)
        if len(self.trainer.rows.stopped) == len(self.trainer.session.sides["forget"]):
            control.should_training_stop = True


def _units(term: Term, counts: Counts) -> Tensor:
    return counts[term.side][UNITS.index(term.unit)].clamp_min(1)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint, if any."""
    found = [p for p in directory.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
