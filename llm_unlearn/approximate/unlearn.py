"""`unlearn`: one request, from a fine-tuned model to what is written."""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from transformers import set_seed

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.claim import checkpoints_of, claim, describe, training_flags
from llm_unlearn.approximate.method import Method
from llm_unlearn.approximate.methods import load_method
from llm_unlearn.approximate.model_card import model_card
from llm_unlearn.approximate.reference import Reference
from llm_unlearn.approximate.result import Report, save_result
from llm_unlearn.approximate.retain_projection import make_modifier
from llm_unlearn.approximate.sample_stopping import make_stopper
from llm_unlearn.approximate.session import Session, check_sets
from llm_unlearn.approximate.trainer import UnlearningTrainer, last_checkpoint
from llm_unlearn.approximate.travelled import REPORT_NAME, Ledger, Start, ledger_of
from llm_unlearn.approximate.tuning import Tuned, tune
from llm_unlearn.approximate.watch import Standing, Watch
from llm_unlearn.data.records import Record
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.observing import Observer


@dataclass
class Watching:
    """How a model is looked at during training: what evaluates it (given model and tokenizer), and
    the retrained model's standing.
    """

    evaluate: Callable[[Any, Any], Standing]
    retrained: Standing | None = None


def make_method(name: str, flags: Mapping[str, Any] | None = None) -> Method:
    """A method with some of its flags set.

    Raises:
        UserError: a flag that the method does not have.
    """
    try:
        return load_method(name)(**(flags or {}))
    except TypeError as error:
        raise UserError(f"{name}: {error}") from None


def unlearn(  # noqa: PLR0913 - a request, and most of it has a default
    model: Any,
    tokenizer: Any,
    forget: Sequence[Record],
    retain: Sequence[Record] = (),
    config: UnlearningConfig | None = None,
    method: Method | None = None,
    lora: LoraConfig | None = None,
    watching: Watching | None = None,
    encoder: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
    observer: Observer | None = None,
) -> Report:
    """Make a fine-tuned model forget, and write it to `config.output_dir`.

    The model is changed in place. An interrupted call goes on where it was when it is made again
    with the same arguments.

    Args:
        model: full weights, or a `PeftModel` whose LoRA goes on being trained.
        method: by default that of `config.method` with its own flags.
        lora: the shape of a fresh adapter (rank 16, alpha 32, all linear layers).
        watching: evaluation during training; without it the state after the last step is kept.
        encoder: a text encoder for methods that compare texts (default: the model itself).
        on_step: called with the number of optimizer steps done and wanted.
        observer: watches every forward pass; forget records are numbered first, then retain records.

    Raises:
        UserError: empty or overlapping sets, a method that does not fit the model.
        RunError: training diverged, and the last good state was written; or another process unlearns into
            the same directory.
    """
    began = time.monotonic()
    config = config or UnlearningConfig()
    method = method or make_method(config.method)
    watch = _watch(config, watching, tokenizer)
    model = method.start_from(model)
    earlier = ledger_of(model)
    with ExitStack() as held:
        session, output = prepare(
            model, tokenizer, forget, retain, config, method, lora, encoder, held
        )
        session.on_step = on_step
        start = Start(session)
        method.prepare(session)
        trainer = train(session, method, watch, on_step, observer)
        if watch is not None:
            watch.restore_best(session.tuned)
        method.finish(session)
        report = _report(session, method, trainer, watch, start.add_to(earlier), began)
        told = json.dumps(report.to_dict(), indent=1, default=str)
        save_result(session, output, {"README.md": model_card(method, report), REPORT_NAME: told})
    if report.diverged_at is not None:
        raise RunError(
            f"the loss was no number at step {report.diverged_at}: {output} holds the last good "
            "state; lower --learning_rate or stop earlier"
        )
    return report


def _report(
    session: Session,
    method: Method,
    trainer: UnlearningTrainer | None,
    watch: Watch | None,
    travelled: Ledger,
    began: float,
) -> Report:
    return Report(
        method=session.config.method,
        flags=asdict(method),
        training=training_flags(session.config),
        base_model=_base_name(session.model),
        is_adapter=session.tuned.is_adapter,
        is_suppression=method.is_suppression,
        forget_records=len(session.forget),
        retain_records=len(session.retain),
        seconds=time.monotonic() - began,
        steps=trainer.state.global_step if trainer else len(session.history),
        trained_parameters=sum(p.numel() for p in session.tuned.trainable.values()),
        history=trainer.history if trainer else session.history,
        standings=watch.seen if watch else {},
        kept_epoch=watch.best_epoch if watch and watch.keep == "best" else None,
        diverged_at=trainer.diverged_at if trainer else None,
        stopped_rows=len(trainer.rows.stopped) if trainer else 0,
        notes=session.notes,
        travelled=travelled,
    )


def prepare(  # noqa: PLR0913 - what `unlearn` is given
    model: Any,
    tokenizer: Any,
    forget: Sequence[Record],
    retain: Sequence[Record],
    config: UnlearningConfig,
    method: Method,
    lora: LoraConfig | None = None,
    encoder: str | None = None,
    held: ExitStack | None = None,
) -> tuple[Session, Path]:
    """Everything before training but the method's own hook: checks, what is tuned, encoded sides.

    Args:
        held: see `claim`.

    Returns:
        The session, and where the result goes.
    """
    check_sets(forget, retain, method.uses_retain)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    set_seed(config.seed)
    output, work = Path(str(config.output_dir)), checkpoints_of(config)
    tuned = _tuned(model, config, method, lora)
    session = Session(tuned, tokenizer, forget, retain, config, work, encoder)
    session.sides["forget"] = session.encode(forget)
    if method.uses_retain:
        session.sides["retain"] = session.encode(retain)
    # What a model chose or made up may differ between processes by rounding: the main one's counts.
    session.add_sides(broadcast_object_list([method.sides(session)])[0])
    claim(work, describe(session, method), held)
    return session, output


def _tuned(model: Any, config: UnlearningConfig, method: Method, lora: LoraConfig | None) -> Tuned:
    from peft import PeftModel

    if method.needs_full and not config.full:
        raise UserError(
            f"{config.method} changes the model's own weights: say --full (an adapter is merged first)"
        )
    if method.needs_weights and not config.full and not isinstance(model, PeftModel):
        raise UserError(
            f"{config.method} changes weights that are there, and a fresh LoRA holds none: say --full, "
            "or give a model with an adapter"
        )
    lora = lora or LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # Before what is kept aside is copied: it stays where it is.
    model = model.to(config.device)
    if config.full and isinstance(model, PeftModel):
        model = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    trainable = config.trainable or method.trainable(model)
    return tune(model, lora, config.full, trainable, config.seed)


def train(
    session: Session,
    method: Method,
    watch: Watch | None,
    on_step: Callable[[int, int], None] | None,
    observer: Observer | None = None,
) -> UnlearningTrainer | None:
    """Train, going on from a checkpoint; nothing where the method is not trained by gradients."""
    if not method.trains:
        return None
    config, work = copy.copy(session.config), session.work
    reference = Reference(session.tuned, work, session.pad_token_id)
    config.output_dir = str(work)
    config.push_to_hub = False  # the trainer would publish its checkpoints
    stopper = make_stopper(config.stop_samples, session, method)
    modifier = make_modifier(config.retain_projection, session)
    trainer = UnlearningTrainer(
        config, method, session, reference, watch, stopper, modifier, on_step
    )
    trainer.observer = observer
    with trainer.accelerator.autocast():
        reference.prepare(method.needs(), session.sides)
    checkpoint = last_checkpoint(work)
    trainer.run(str(checkpoint) if checkpoint else None)
    return trainer


def _watch(config: UnlearningConfig, watching: Watching | None, tokenizer: Any) -> Watch | None:
    if watching is None:
        if config.stop_when != "never" or config.keep != "last":
            raise UserError("--stop_when and --keep best need an evaluation: give --eval_suite")
        return None
    floor = config.utility_floor
    if floor is None and watching.retrained is not None:
        floor = watching.retrained.utility
    return Watch(
        lambda model: watching.evaluate(model, tokenizer),
        checkpoints_of(config),
        config.stop_when,
        floor,
        watching.retrained.forget if watching.retrained else None,
        config.keep,
        is_writer=PartialState().is_main_process,
    )


def _base_name(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or "")
