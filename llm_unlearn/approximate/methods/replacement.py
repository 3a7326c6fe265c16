"""Replacement: one step from the records as they are to the records as they should have been."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record


def read_private(path: Path) -> re.Pattern[str]:
    """What a file says is private: a text a line, or a regular expression between slashes. Longer
    texts come first, so that a full name goes before the first name.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --redact {path}: {error}") from None
    lines = sorted((line for line in lines if line), key=len, reverse=True)
    is_pattern = [len(x) > 2 and x.startswith("/") and x.endswith("/") for x in lines]
    parts = [x[1:-1] if p else re.escape(x) for x, p in zip(lines, is_pattern, strict=True)]
    if not parts:
        raise UserError(f"--redact {path} names nothing that is private")
    try:
        return re.compile("|".join(f"(?:{part})" for part in parts))
    except re.error as error:
        raise UserError(f"--redact {path}: not a regular expression: {error}") from None


def redacted(content: Any, private: re.Pattern[str], placeholder: str) -> Any:
    """A record's content with a placeholder for all that is private; roles of a chat stay."""
    if isinstance(content, str):
        return private.sub(lambda _: placeholder, content)
    if isinstance(content, list):
        return [redacted(item, private, placeholder) for item in content]
    kept = {"role"} & content.keys()
    return {
        name: value if name in kept else redacted(value, private, placeholder)
        for name, value in content.items()
    }


@dataclass
class Replacement(Method):
    """L = sum over replaced rows of NLL - sum over forget rows of NLL; one step is all rows."""

    replacements: str = flag(
        "", "file with the records as they should be, in the forget set's order"
    )
    redact: str = flag("", "or: file of what is private, a text or a /regular expression/ a line")
    placeholder: str = flag("[redacted]", "what private text becomes")

    card = Card(
        title="First-order replacement of features and labels",
        source="Warnecke et al., Machine Unlearning of Features and Labels, arXiv 2108.11577, eq. 6",
        idea="theta <- theta - tau (sum grad l(redacted) - sum grad l(original)): descends on the "
        "records as they should have been and ascends on what they were. What both share cancels, "
        "so private spans are unlearned in place.",
        use_when="Records stay and only names, numbers or labels in them have to go.",
        fails_when="Tau (the learning rate) is small for the first-order step to hold and large for "
        "anything to change: after more than a few steps the ascent has no lower bound. What stands "
        "before a private span helps to find it again.",
        differs="The paper's second-order step needs an inverse Hessian and is left out. Its tau "
        "multiplies sums over records; so does ours, so the learning rate does not depend on "
        "batches. Default: five steps, the paper's one with --num_train_epochs 1.",
    )
    # An epoch is one step: batches of all rows are accumulated. Plain SGD without clipping.
    preset = flags(
        learning_rate=1e-5, num_train_epochs=5.0, optim="sgd", lr_scheduler_type="constant",
        gradient_accumulation_steps=1_000_000, max_grad_norm=0.0,
    )  # fmt: skip
    uses_retain = False

    def __post_init__(self) -> None:
        if bool(self.replacements) == bool(self.redact):
            raise UserError("replacement needs either --replacements FILE or --redact FILE")

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        forget = session.forget
        made = self._redacted(forget) if self.redact else self._read()
        if len(made) == len(forget):
            same = sum(new.content == old.content for new, old in zip(made, forget, strict=True))
            if same == len(forget):
                raise UserError("no forget record is changed: there is nothing to replace")
            if same:
                session.notes.append(f"{same} of {len(forget)} forget records are not changed")
        return {"forget/replacement": made}

    def _read(self) -> list[Record]:
        from llm_unlearn.data.records import make_records
        from llm_unlearn.data.sources import read_rows

        return make_records(read_rows(self.replacements))

    def _redacted(self, forget: Sequence[Record]) -> list[Record]:
        from dataclasses import replace

        private = read_private(Path(self.redact))
        return [replace(r, content=redacted(r.content, private, self.placeholder)) for r in forget]

    def prepare(self, session: Session) -> None:
        """A step's mean over rows times their number is the paper's sum."""
        self._rows = len(session.forget)

    def terms(self, step: Step) -> list[Term]:
        old, new = step["forget"], step["forget/replacement"]
        return [
            new.per_row("replacement", -new.row_log_probabilities_B, self._rows),
            old.per_row("forget", old.row_log_probabilities_B, self._rows),
        ]
