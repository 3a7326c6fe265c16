"""`llm-unlearn`: every command calls one function of the library and prints what it returns."""

from llm_unlearn import console
from llm_unlearn.cli.application import app

# In the order in which the help shows them.
# isort: off
from llm_unlearn.cli import runs
from llm_unlearn.cli import simulating
from llm_unlearn.cli import deleting
from llm_unlearn.cli import certificates
from llm_unlearn.cli import copying
from llm_unlearn.cli import reporting
from llm_unlearn.cli import publishing
from llm_unlearn.cli import serving
from llm_unlearn.cli import evaluations
from llm_unlearn.cli import probing
from llm_unlearn.cli import memorizing
# isort: on

__all__ = [
    "app",
    "certificates",
    "copying",
    "deleting",
    "evaluations",
    "main",
    "memorizing",
    "probing",
    "publishing",
    "reporting",
    "runs",
    "serving",
    "simulating",
]


def main() -> None:
    """Entry point: errors that a user can mend are one line."""
    console.run_and_exit(app)
