"""`unlearn`: one request, from a fine-tuned model to what is written."""

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from transformers import set_seed

from llm_unlearn import files
from llm_unlearn.approximate.arguments import COMMON, UnlearningConfig
from llm_unlearn.approximate.method import Method
from llm_unlearn.approximate.methods import load_method
from llm_unlearn.approximate.model_card import model_card
from llm_unlearn.approximate.reference import Reference
from llm_unlearn.approximate.retain_projection import make_modifier
from llm_unlearn.approximate.sample_stopping import make_stopper
from llm_unlearn.approximate.session import Session, check_sets
from llm_unlearn.approximate.trainer import UnlearningTrainer, last_checkpoint
from llm_unlearn.approximate.tuning import ADAPTER, Tuned, tune
from llm_unlearn.approximate.watch import Standing, Watch
from llm_unlearn.data.records import Record, digest
from llm_unlearn.digests import tensors_digest
from llm_unlearn.errors import RunError, UserError

REPORT_NAME = "unlearning.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Report:
    """What was done; `unlearning.json` in the output directory. It names nobody.

    Attributes:
        flags: of the method.
        training: of the trainer, as resolved.
        history: every term's mean by optimizer step.
        standings: forget and utility by epoch, where the model was evaluated on the way.
        diverged_at: the step whose loss was no number; what was written is from before it.
        stopped_rows: forget rows that were left out at the end, as forgotten.
    """

    method: str
    flags: dict[str, Any]
    training: dict[str, Any]
    base_model: str
    is_adapter: bool
    is_suppression: bool
    forget_records: int
    retain_records: int
    seconds: float
    steps: int
    trained_parameters: int
    history: list[dict[str, float]] = field(default_factory=list)
    standings: dict[int, Standing] = field(default_factory=dict)
    kept_epoch: int | None = None
    diverged_at: int | None = None
    stopped_rows: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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

    Raises:
        UserError: empty or overlapping sets, a method that does not fit the model.
        RunError: training diverged; the last good state was written.
    """
    start = time.monotonic()
    config = config or UnlearningConfig()
    method = method or make_method(config.method)
    watch = _watch(config, watching, tokenizer)
    model = method.start_from(model)
    session, output = prepare(
        model, tokenizer, forget, retain, config, method, lora=lora, encoder=encoder
    )
    trainer = train(session, method, watch, on_step)
    if watch is not None:
        watch.restore_best(session.tuned)
    method.finish(session)
    report = Report(
        method=config.method,
        flags=asdict(method),
        training=_training_flags(config),
        base_model=_base_name(session.model),
        is_adapter=session.tuned.is_adapter,
        is_suppression=method.is_suppression,
        forget_records=len(forget),
        retain_records=len(retain),
        seconds=time.monotonic() - start,
        steps=trainer.state.global_step if trainer else 0,
        trained_parameters=sum(p.numel() for p in session.tuned.trainable.values()),
        history=trainer.history if trainer else [],
        standings=watch.seen if watch else {},
        kept_epoch=watch.best_epoch if watch and watch.keep == "best" else None,
        diverged_at=trainer.diverged_at if trainer else None,
        stopped_rows=len(trainer.rows.stopped) if trainer else 0,
        notes=session.notes,
    )
    content = json.dumps(report.to_dict(), indent=1, default=str)
    save_result(session, output, {"README.md": model_card(method, report), REPORT_NAME: content})
    if report.diverged_at is not None:
        raise RunError(
            f"the loss was no number at step {report.diverged_at}: {output} holds the last good "
            "state; lower --learning_rate or stop earlier"
        )
    return report


def prepare(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Record],
    retain: Sequence[Record],
    config: UnlearningConfig,
    method: Method,
    lora: LoraConfig | None = None,
    encoder: str | None = None,
) -> tuple[Session, Path]:
    """Everything before training: checks, what is tuned, encoded sides, the method's own hook.

    Returns:
        The session, and where the result goes.
    """
    check_sets(forget, retain, method.uses_retain)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    set_seed(config.seed)
    output, work = Path(str(config.output_dir)), _work(config)
    tuned = _tuned(model, config, method, lora)
    session = Session(tuned, tokenizer, forget, retain, config, work, encoder)
    session.sides["forget"] = session.encode(forget)
    if method.uses_retain:
        session.sides["retain"] = session.encode(retain)
    # What a model chose or made up may differ between processes by rounding: the main one's counts.
    session.add_sides(broadcast_object_list([method.sides(session)])[0])
    _claim(work, _describe(session, method))
    method.prepare(session)
    return session, output


def _work(config: UnlearningConfig) -> Path:
    return Path(str(config.output_dir), CHECKPOINTS)


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
) -> UnlearningTrainer | None:
    """Train, going on from a checkpoint; nothing where the method is not trained by gradients."""
    if not method.trains:
        return None
    config, work = copy.copy(session.config), session.work
    reference = Reference(session.tuned, work, session.pad_token_id)
    config.output_dir = str(work)
    stopper = make_stopper(config.stop_samples, session, method)
    modifier = make_modifier(config.retain_projection, session)
    trainer = UnlearningTrainer(
        config, method, session, reference, watch, stopper, modifier, on_step
    )
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
        _work(config),
        config.stop_when,
        floor,
        watching.retrained.forget if watching.retrained else None,
        config.keep,
        is_writer=PartialState().is_main_process,
    )


def save_result(session: Session, output: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write the adapter or model, what else belongs to it, and forget the checkpoints: they are made
    of the data that is to be forgotten. By the main process alone.
    """
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        _clear(output)
        session.model.save_pretrained(str(output))
        session.tokenizer.save_pretrained(str(output))
        for name, content in session.extra_files.items():
            if isinstance(content, Path):
                shutil.move(content, output / name)
            else:
                files.write_bytes(output / name, content)
        for name, text in (texts or {}).items():
            files.write_bytes(output / name, text.encode(), mode=0o644)
        shutil.rmtree(session.work)
    state.wait_for_everyone()


def _clear(output: Path) -> None:
    """Remove what an earlier result there left and this one might not write over."""
    if (output / REPORT_NAME).exists():
        for pattern in ("*.safetensors", "*config.json", "*.index.json", "wrapper.json"):
            for path in output.glob(pattern):
                path.unlink()


def _describe(session: Session, method: Method) -> dict[str, Any]:
    """What an interrupted call must have in common with the one that goes on with it.

    The sides are among it as they are trained on: so are the contents of files that flags name.
    """
    sides, given = session.sides, (session.forget, session.retain)
    return {
        "model": tensors_digest(session.model),
        "adapter": _shape(session.model) if session.tuned.is_adapter else None,
        "method": asdict(method),
        "encoder": session.encoder,
        "training": _training_flags(session.config),
        "records": digest([[record.content for record in records] for records in given]),
        "sides": {name: digest([[e.input_ids, e.labels] for e in sides[name]]) for name in sides},
    }


def _shape(model: Any) -> list[Any]:
    """What the tensors of a LoRA do not tell."""
    lora = model.peft_config[ADAPTER]
    return [lora.lora_alpha, lora.lora_dropout, lora.use_rslora]


def _claim(work: Path, described: dict[str, Any]) -> None:
    """Make checkpoints this call's own.

    Raises:
        UserError: they are those of another call; the main process decides for all.
    """
    state = PartialState()
    path = work / "request.json"
    told = json.dumps(described)
    is_other = path.exists() and json.loads(path.read_bytes()) != json.loads(told)
    if broadcast_object_list([is_other and last_checkpoint(work) is not None])[0]:
        raise UserError(
            f"{work} holds the checkpoints of another request that was interrupted: finish that one, "
            "remove the directory, or choose another --output_dir"
        )
    if state.is_main_process:
        if is_other:  # it ended before its first checkpoint: nothing to go on with
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, told.encode())
    state.wait_for_everyone()


def _training_flags(config: UnlearningConfig) -> dict[str, Any]:
    """What decides the result, as resolved from flags, preset and defaults."""
    wanted = [*COMMON, "seed", "num_threads", "full", "trainable", "max_length", "completion_only_loss", "bf16", "fp16",
              "retain_projection", "stop_samples", "stop_when", "utility_floor", "keep"]  # fmt: skip
    values = {name: getattr(config, name) for name in wanted}
    return json.loads(json.dumps(values, default=str))


def _base_name(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or "")
