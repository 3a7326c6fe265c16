"""What cannot be read: noted and gone past, so that one broken file does not hide all the rest."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llm_unlearn.errors import UserError

ERRORS = (UserError, OSError, ValueError, TypeError, KeyError, AttributeError)


class Damage:
    """Collects one line for each thing that is damaged, without the paths of this machine.

    Args:
        run: the run directory; where a message names it, its own name is left.
    """

    def __init__(self, run: Path):
        self.problems: list[str] = []
        self._prefixes = sorted({str(run), str(run.resolve())}, key=len, reverse=True)
        self._name = run.resolve().name

    def add(self, what: str, problem: object) -> None:
        self.say(f"{what}: {problem}")

    def say(self, line: str) -> None:
        """A line that says itself what it is about."""
        for prefix in self._prefixes:
            line = line.replace(f"{prefix}/", f"{self._name}/")
        if line not in self.problems:
            self.problems.append(line)

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Note damage that the body stumbles over, and go on after it."""
        try:
            yield
        except KeyError as error:
            self.add(what, f"lacks the entry {error}")
        except ERRORS as error:
            self.add(what, error)
