"""Whose checkpoints are in an output directory: an interrupted request goes on, another is refused."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from llm_unlearn import files
from llm_unlearn.approximate.arguments import COMMON, UnlearningConfig
from llm_unlearn.approximate.method import Method
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.trainer import last_checkpoint
from llm_unlearn.approximate.tuning import ADAPTER
from llm_unlearn.data.records import digest
from llm_unlearn.digests import tensors_digest
from llm_unlearn.errors import RunError, UserError

CHECKPOINTS = "checkpoints"
LOCK_NAME = ".lock"
STEPS_NAME = "newton.safetensors"  # of a method that takes its own steps, instead of checkpoints


def checkpoints_of(config: UnlearningConfig) -> Path:
    """Where the checkpoints of a request are, until its result is written."""
    return Path(str(config.output_dir), CHECKPOINTS)


def describe(session: Session, method: Method) -> dict[str, Any]:
    """What an interrupted call must have in common with the one that goes on with it.

    The sides are among it as they are trained on: so are the contents of files that flags name.
    """
    sides, given = session.sides, (session.forget, session.retain)
    return {
        "model": tensors_digest(session.model),
        "adapter": _shape(session.model) if session.tuned.is_adapter else None,
        "method": asdict(method),
        "encoder": session.encoder,
        "training": training_flags(session.config),
        "records": digest([[record.content for record in records] for records in given]),
        "sides": {name: digest([[e.input_ids, e.labels] for e in sides[name]]) for name in sides},
    }


def _shape(model: Any) -> list[Any]:
    """What the tensors of a LoRA do not tell."""
    lora = model.peft_config[ADAPTER]
    return [lora.lora_alpha, lora.lora_dropout, lora.use_rslora]


def claim(work: Path, described: dict[str, Any], held: ExitStack | None = None) -> None:
    """Make checkpoints this call's own.

    Args:
        held: what keeps other processes out until it is closed; without it nothing does.

    Raises:
        UserError: they are those of another call; the main process decides for all.
        RunError: a process is at work there.
    """
    state = PartialState()
    path = work / "request.json"
    told = json.dumps(described)
    if busy := broadcast_object_list([_hold(work, held) if state.is_main_process else ""])[0]:
        raise RunError(busy)
    is_other = path.exists() and json.loads(path.read_bytes()) != json.loads(told)
    if broadcast_object_list([is_other and _has_progress(work)])[0]:
        raise UserError(
            f"{work} holds the checkpoints of another request that was interrupted: finish that one, "
            "remove the directory, or choose another --output_dir"
        )
    if state.is_main_process:
        if is_other:  # it ended before its first checkpoint: nothing to go on with
            for left in work.iterdir():
                if left.name != LOCK_NAME:
                    files.remove(left)
        files.write_bytes(path, told.encode())
    state.wait_for_everyone()


def _hold(work: Path, held: ExitStack | None) -> str:
    """Why this process cannot have the directory; empty: it has it."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        if held is not None:
            held.enter_context(files.locked(work / LOCK_NAME, "unlearning there", timeout=0))
    except RunError as error:
        return str(error)
    return ""


def _has_progress(work: Path) -> bool:
    return last_checkpoint(work) is not None or (work / STEPS_NAME).exists()


def training_flags(config: UnlearningConfig) -> dict[str, Any]:
    """What decides the result, as resolved from flags, preset and defaults."""
    wanted = [*COMMON, "seed", "num_threads", "full", "trainable", "max_length", "completion_only_loss", "bf16", "fp16",
              "retain_projection", "stop_samples", "stop_when", "utility_floor", "keep"]  # fmt: skip
    values = {name: getattr(config, name) for name in wanted}
    return json.loads(json.dumps(values, default=str))
