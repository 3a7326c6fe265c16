"""What a method may look at: the model, both sets of records, and where things are put."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.tuning import Tuned
from llm_unlearn.data.encoding import Example, check_lengths, encode
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError

START_NAME = (
    "start.safetensors"  # of full fine-tuning: the trained tensors before it, in the work directory
)


@dataclass
class Session:
    """One request: what is to be forgotten, what is to be kept, and the model.

    Attributes:
        forget, retain: the records; `retain` may be empty for methods that need none.
        encoder: name of a text encoder for methods that compare texts; None: the model itself.
        work: a directory for what is not needed afterwards.
        extra_files: what the result needs besides weights: name -> content, or a file in `work`
            that is moved there; for wrappers.
        history: of the steps of a method that takes its own, for the report.
        on_step: what such a method calls with steps done and wanted.
    """

    tuned: Tuned
    tokenizer: Any
    forget: Sequence[Record]
    retain: Sequence[Record]
    config: UnlearningConfig
    work: Path
    encoder: str | None = None
    sides: dict[str, list[Example]] = field(default_factory=dict)
    extra_files: dict[str, bytes | Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    on_step: Callable[[int, int], None] | None = None

    @property
    def model(self) -> Any:
        return self.tuned.model

    @property
    def pad_token_id(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return next(token for token in (pad, end, 0) if token is not None)

    def encode(self, records: Sequence[Record]) -> list[Example]:
        """Ids and labels of records.

        Raises:
            UserError: a record keeps nothing to learn within `max_length`.
        """
        config = self.config
        examples = [
            encode(r, self.tokenizer, config.max_length, config.completion_only_loss)
            for r in records
        ]
        if warning := check_lengths(examples, config.max_length):
            self.notes.append(warning)
        return examples

    def save_trained(self, name: str) -> Path:
        """The trained tensors as they are now, as a file in the work directory. By the main process."""
        state = PartialState()
        if state.is_main_process:
            self.work.mkdir(parents=True, exist_ok=True)
            self.tuned.save(self.work / name)
        state.wait_for_everyone()
        return self.work / name

    def add_sides(self, sides: Mapping[str, Sequence[Record]]) -> None:
        """Encode further sides; each goes along with the forget or the retain rows."""
        for name, records in sides.items():
            anchor = name.split("/")[0]
            if len(records) != len(self.sides[anchor]):
                raise UserError(
                    f"{name} has {len(records)} rows, {anchor} {len(self.sides[anchor])}"
                )
            self.sides[name] = self.encode(records)


def check_sets(forget: Sequence[Record], retain: Sequence[Record], uses_retain: bool) -> None:
    """Refuse what cannot be unlearned.

    Raises:
        UserError: an empty set, or records that are in both.
    """
    if not forget:
        raise UserError("the forget set is empty: there is nothing to unlearn")
    if not retain and uses_retain:
        raise UserError(
            "the method needs data to keep: give --retain, or use one that needs none (see --help)"
        )
    known = {tuple(record.texts()) for record in forget}
    both = sum(tuple(record.texts()) in known for record in retain)
    if both:
        raise UserError(
            f"{both} of {len(retain)} retain records are in the forget set too: a model cannot keep "
            "and forget the same text; take them out of --retain, or pass --drop_overlap"
        )
