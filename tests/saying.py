"""What `llm-unlearn` says: the fixture `say` runs it, and these read its answer."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Said(NamedTuple):
    """Exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Say = Callable[..., Said]


def in_json(answer: Said, code: int = 0) -> Any:
    """The JSON on standard output, which holds nothing else."""
    assert answer.code == code, answer
    return json.loads(answer.out)


def one_line(answer: Said, code: int) -> str:
    """The error of a failed command: one line on standard error."""
    assert answer.code == code, answer
    error = answer.err.removeprefix("\n")  # where a progress bar was
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error
