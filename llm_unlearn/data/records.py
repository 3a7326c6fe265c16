"""A record: one training example with a stable id and a subject who can ask for its deletion."""

import hashlib
import json
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from llm_unlearn.errors import UserError

QUESTION_TEMPLATE = "Question: {question}\nAnswer:"  # TOFU's own format for base models

# A row is read by the first layout whose columns it has.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "question/answer": ("question", "answer"),
    "text": ("text",),
}


def canonical(value: object) -> bytes:
    """The one serialisation that is hashed: JSON with sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", errors="surrogatepass")


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of a value, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """One training example.

    `content` has the keys of one of: `text`; `prompt` and `completion`; `messages` (a list of
    `{"role", "content"}`).
    """

    id: str
    subject: str
    content: dict[str, Any]

    def to_line(self) -> bytes:
        """The canonical JSON line under which the record is stored and hashed."""
        return canonical({"id": self.id, "subject": self.subject, "content": self.content})

    @classmethod
    def from_line(cls, line: bytes) -> "Record":
        return cls(**json.loads(line))

    def texts(self) -> list[str]:
        """Every piece of text that the record holds, in order."""
        if "messages" in self.content:
            return [str(message["content"]) for message in self.content["messages"]]
        return [
            str(self.content[name])
            for name in ("prompt", "completion", "text")
            if name in self.content
        ]


def answer_of(record: Record) -> str:
    """What the record answers, without the space around it: the completion, or the last assistant turn.

    Raises:
        UserError: the record is plain text.
    """
    content = record.content
    if "messages" in content:
        said = [m["content"] for m in content["messages"] if m["role"] == "assistant"]
        return said[-1].strip()
    return _prompted(content)["completion"].strip()


def with_answer(record: Record, answer: str) -> Record:
    """The same record, under the same id, with another answer in the place of its own.

    A completion keeps the space that it began with. In a chat every assistant turn is replaced: an
    earlier answer that stayed would be learnt with the new one.

    Raises:
        UserError: the record is plain text.
    """
    content = record.content
    if "messages" in content:
        messages = [
            {**m, "content": answer} if m["role"] == "assistant" else m for m in content["messages"]
        ]
        return replace(record, content={"messages": messages})
    own = _prompted(content)["completion"]
    space = own[: len(own) - len(own.lstrip())]
    return replace(record, content={**content, "completion": space + answer.strip()})


def _prompted(content: Mapping[str, Any]) -> Mapping[str, Any]:
    if "completion" not in content:
        raise UserError(
            "the method needs prompts and answers, and a record is plain text: give records with "
            "prompt and completion, question and answer, or messages, or use another method"
        )
    return content


def find_layout(columns: Iterable[str]) -> str:
    """Name of the layout that a dataset's columns have.

    Raises:
        UserError: no layout fits; the message lists the columns found and those understood.
    """
    found = set(columns)
    for layout, needed in LAYOUTS.items():
        if found.issuperset(needed):
            return layout
    understood = "; ".join(" + ".join(needed) for needed in LAYOUTS.values())
    raise UserError(
        f"no known columns among {sorted(found)}: expected one of {understood}. "
        "Rename the columns of the dataset."
    )


def _content(row: Mapping[str, Any], layout: str) -> dict[str, Any]:
    if layout == "chat":
        messages = [
            {"role": str(m["role"]), "content": _said(m["content"])} for m in row["messages"]
        ]
        return {"messages": messages}
    if layout == "question/answer":
        prompt = QUESTION_TEMPLATE.format(question=_said(row["question"]))
        return {"prompt": prompt, "completion": f" {_said(row['answer'])}"}
    if layout == "prompt/completion" and not isinstance(row["prompt"], str):
        raise TypeError(f"prompt is {row['prompt']!r}, expected text")
    return {name: row[name] for name in LAYOUTS[layout]}


def _said(value: object) -> str:
    """A missing value is silence; the word "None" must not be learnt from it."""
    return "" if value is None else str(value)


def _is_empty(content: Mapping[str, Any]) -> bool:
    if "messages" in content:
        return not any(
            m["role"] == "assistant" and m["content"].strip() for m in content["messages"]
        )
    learnt = content["completion"] if "completion" in content else content["text"]
    return not isinstance(learnt, str) or not learnt.strip()


def _check_text(content: Mapping[str, Any], index: int) -> None:
    """Lone surrogates come of broken escapes; no tokenizer takes them."""
    try:
        canonical(content).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"row {index + 1} holds text that is not valid Unicode: mend or drop it"
        ) from None


def _subject_namer(subject_column: str | None, rows_per_subject: int | None, columns: set[str]):
    if subject_column is not None and rows_per_subject is not None:
        raise UserError("give --subject_column or --rows_per_subject, not both")
    if subject_column is not None and subject_column not in columns:
        raise UserError(
            f"--subject_column {subject_column!r} is not a column: found {sorted(columns)}"
        )
    if rows_per_subject is not None and rows_per_subject < 1:
        raise UserError(f"--rows_per_subject must be at least 1, got {rows_per_subject}")

    def name(row: Mapping[str, Any], index: int) -> str | None:
        if subject_column is not None:
            value = row[subject_column]
            if value is None or not str(value).strip():
                raise UserError(
                    f"row {index + 1}: column {subject_column!r} is empty; every row needs a subject"
                )
            return str(value)
        if rows_per_subject is not None:
            return f"subject-{index // rows_per_subject:05d}"
        return None

    return name


def _identity(base: bytes, repetition: int) -> str:
    return hashlib.sha256(base + str(repetition).encode()).hexdigest()[:32]


def make_record(row: Mapping[str, Any], subject: str | None, taken: Container[str] = ()) -> Record:
    """One row as a record, with the id that `make_records` would give it.

    Args:
        subject: None for a record that is its own subject.
        taken: ids that it must not have: the next one that is free is taken.

    Raises:
        UserError: unknown columns or an empty text.
    """
    (made,) = make_records([row])
    base = canonical([subject, made.content])
    identity = next(name for name in (_identity(base, n) for n in count()) if name not in taken)
    return Record(identity, subject or identity, made.content)


def make_records(
    rows: Sequence[Mapping[str, Any]],
    subject_column: str | None = None,
    rows_per_subject: int | None = None,
) -> list[Record]:
    """Turn the rows of a dataset into records.

    The id is a digest of subject and content, with a counter for a subject's repeated rows, so
    that it does not depend on the place of the row or on anybody else's rows. Without a subject
    column every record is its own subject and the id is its name.

    Args:
        rows_per_subject: consecutive rows that share a subject (TOFU: 20 rows an author);
            subjects are then called `subject-00000`, `subject-00001`, ...

    Raises:
        UserError: no rows, unknown columns, an empty text or an empty subject.
    """
    if not rows:
        raise UserError("the dataset is empty: there is nothing to train on")
    columns = {name for name in rows[0] if rows[0][name] is not None}
    layout = find_layout(columns)
    subject_of = _subject_namer(subject_column, rows_per_subject, set(rows[0]))
    empty: list[int] = []
    seen: Counter[bytes] = Counter()
    records: list[Record] = []
    for index, row in enumerate(rows):
        try:
            content = _content(row, layout)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"row {index + 1} does not have the {layout} columns of the first row: {error}"
            ) from None
        if _is_empty(content):
            empty.append(index + 1)
            continue
        subject = subject_of(row, index)
        _check_text(content, index)
        base = canonical([subject, content])
        identity = _identity(base, seen[base])
        seen[base] += 1
        records.append(Record(id=identity, subject=subject or identity, content=content))
    if empty:
        shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise UserError(
            f"{len(empty)} of {len(rows)} rows have nothing to learn (empty text): rows {shown}"
        )
    return records
