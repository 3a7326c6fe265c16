"""Names that go into addresses: checked before anything is sent."""

import re
from pathlib import Path

from llm_unlearn.errors import UserError

MOST_CHARACTERS = 96  # of each part, as on the Hub
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]{0,198}[A-Za-z0-9_])?")


def is_repository(name: str) -> bool:
    """Is this a name that a repository can have: `name` or `namespace/name`, in ASCII?"""
    parts = name.split("/")
    return (
        len(parts) <= 2
        and all(len(part) <= MOST_CHARACTERS and _PART.fullmatch(part) for part in parts)
        and not re.search(r"--|\.\.|\.git$", name)
    )


def check_repository(name: str) -> str:
    """A repository's name as it was given.

    Raises:
        UserError: it cannot be one.
    """
    if not is_repository(name):
        raise UserError(
            f"{_shown(name)} is no repository on the Hub: expected NAMESPACE/NAME of ASCII letters, digits "
            f"and single - _ . inside, at most {MOST_CHARACTERS} characters each"
        )
    return name


def check_revision(name: str) -> str:
    """A branch, tag or commit as it was given.

    Raises:
        UserError: it cannot be one.
    """
    if not _REVISION.fullmatch(name) or ".." in name or "//" in name:
        raise UserError(f"{_shown(name)} is no revision: give a branch, a tag or a commit")
    return name


def is_local(name: str) -> bool:
    """Is a model's name a path on this machine, or anything else that the Hub cannot know?"""
    return not is_repository(name) or Path(name).exists()


def check_base(name: str, given: str | None) -> str:
    """The base model's name on the Hub.

    Args:
        name: what the run calls its base model.
        given: what the person says it is called on the Hub.

    Raises:
        UserError: it is a path on this machine and nothing else was given.
    """
    if given is not None:
        return check_repository(given)
    if is_local(name):
        raise UserError(
            "the base model was loaded from a directory, which nobody else has: say what it is called on "
            "the Hub with --base_model NAMESPACE/NAME"
        )
    return name


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 60 else f"{name[:60]}...")
