"""What a request leaves: the adapter or model, its card, and `unlearning.json`."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from llm_unlearn import files
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.travelled import NOTHING, REPORT_NAME, Ledger
from llm_unlearn.approximate.watch import Standing
from llm_unlearn.record_tables import FOLDER


@dataclass(frozen=True)
class Report:
    """What was done; `unlearning.json` in the output directory. It names nobody.

    Attributes:
        flags: of the method.
        training: of the trainer, as resolved.
        history: every term's mean by optimizer step, or what a method says of each of its own steps.
        standings: forget and utility by epoch, where the model was evaluated on the way.
        diverged_at: the step whose loss was no number; what was written is from before it.
        stopped_rows: forget rows that were left out at the end, as forgotten.
        travelled: how far the weights went, with what earlier requests did; see `travelled`.
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
    history: list[dict[str, Any]] = field(default_factory=list)
    standings: dict[int, Standing] = field(default_factory=dict)
    kept_epoch: int | None = None
    diverged_at: int | None = None
    stopped_rows: int = 0
    travelled: Ledger = field(default_factory=lambda: NOTHING)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        weights = ("*.safetensors", "*config.json", "*.index.json", "wrapper.json")
        for pattern in (*weights, "refinement.json", f"{FOLDER}/*.parquet"):
            for path in output.glob(pattern):
                path.unlink()
