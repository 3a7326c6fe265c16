"""`llm-unlearn`: every command calls one function of the library and prints what it returns."""

from llm_unlearn import console
from llm_unlearn.cli import deleting, evaluations, publishing, runs
from llm_unlearn.cli.application import app

__all__ = ["app", "deleting", "evaluations", "main", "publishing", "runs"]


def main() -> None:
    """Entry point: errors that a user can mend are one line."""
    console.run_and_exit(app)
