"""kill -9 at a chosen point where something reaches the disk."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from llm_unlearn import files
from llm_unlearn.exact import ledger
from llm_unlearn.exact.ledger import Ledger

Place = tuple[object, str]
"""A function that changes something: its owner, and its name there."""

CHANGES: tuple[Place, ...] = (
    (os, "replace"), (os, "rename"), (os, "symlink"), (os, "link"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
    (os, "pwrite"),
    (files, "write_bytes"), (files, "remove"), (files, "publish_link"), (files, "publish_directory"),
    (Path, "write_bytes"), (Path, "rename"), (Path, "unlink"), (Ledger, "acknowledge"), (Ledger, "finish"),
    (Ledger, "append"), (Ledger, "_append"), (ledger, "advance_head"),
)  # fmt: skip
"""Everything that a run does to the disk."""


def in_child(work: Callable[[], object]) -> int | None:
    """Run `work` in a fork; its exit code, or None if it was killed."""
    pid = start(work)
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def start(work: Callable[[], object]) -> int:
    """Run `work` in a fork beside this process; its process id. It exits with 1 if `work` raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_at(point: int, places: Sequence[Place] = CHANGES) -> None:
    """Kill this process at the `point`-th change, before or after it."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: object, **options: object) -> object:
            tick()
            result = original(*arguments, **options)
            tick()
            return result

        setattr(owner, name, wrapped)

    for owner, name in places:
        wrap(owner, name)
