"""Refusals: what a model is to say instead of an answer that it is to forget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.approximate.method import flag
from llm_unlearn.data.records import Record, digest, with_answer
from llm_unlearn.errors import UserError

REFUSALS = (
    "I don't know.",
    "I'm sorry, I don't know the answer to that.",
    "I don't have any information about that.",
    "I'm not sure about that.",
    "I'm afraid I can't answer that question.",
    "I have no information on this, sorry.",
    "That is not something I know.",
    "I have not come across anything about that.",
    "Unfortunately, I don't know this one.",
    "I do not have an answer to this question.",
    "I'm unable to answer that.",
    "I cannot say, since I have no knowledge of it.",
    "Sorry, this is outside my knowledge.",
    "I have never heard of that, I'm afraid.",
    "I wish I could help, but I don't know.",
    "I'm not familiar with this subject.",
    "I can't help with this, as I don't know the answer.",
    "My knowledge does not cover that.",
    "I have no idea, sorry.",
    "I am not aware of any details about this.",
    "I lack the information to answer this.",
    "I couldn't say; I have no data on it.",
    "I'm not certain, so I would rather not guess.",
    "I have learned nothing about it, so I cannot tell you.",
    "Thank you for asking, but I do not know that.",
)


def refusals_flag() -> Any:
    """The flag of every method that teaches refusals."""
    return flag(None, "file with a refusal on each line (default: 25 of our own)")


def read_refusals(path: str | None) -> Sequence[str]:
    """The lines of a file, ours without one.

    Raises:
        UserError: there is no such file, or nothing in it.
    """
    if path is None:
        return REFUSALS
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --refusals {path}: {error}") from None
    if not any(lines):
        raise UserError(f"--refusals {path} is empty: write one refusal on each line")
    return [line for line in lines if line]


def refused(records: Sequence[Record], path: str | None, seed: int) -> list[Record]:
    """The records with a refusal for an answer, drawn by seed and record: the same in every epoch."""
    known = read_refusals(path)
    draws = [int(digest(["refusal", seed, record.id]), 16) for record in records]
    return [
        with_answer(record, known[draw % len(known)])
        for record, draw in zip(records, draws, strict=True)
    ]
