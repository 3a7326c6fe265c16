"""kill -9 at a chosen point where something reaches the disk."""

import hashlib
import json
import os
import shutil
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

    _around(places, tick)


def copy_anew(reference: Path, path: Path) -> None:
    """Put a copy of a run where another copy of it was changed."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(reference, path, symlinks=True)


def every_point(
    prepare: Callable[[], object],
    work: Callable[[], object],
    check: Callable[[], object],
    path: Path,
    places: Sequence[Place] = CHANGES,
) -> int:
    """Kill `work`, which changes only what is below `path`, at each point in turn, checking after
    each, and let it through at last; returns at how many points it left something else there."""
    prepare()
    points = _different_points(work, path, places)
    for point in points:
        prepare()

        def doomed(point: int = point) -> None:
            kill_at(point, places)
            work()

        assert in_child(doomed) is None, f"the child was not killed at point {point}"
        check()
    prepare()
    assert in_child(work) == 0
    check()
    return len(points)


def _different_points(work: Callable[[], object], path: Path, places: Sequence[Place]) -> list[int]:
    """Where `kill_at` leaves something else below `path` than one point earlier, if that is all that
    `work` changes: a killed process leaves nothing but its files. `work` is done, in a fork."""
    reading, writing = os.pipe()

    def watched() -> None:
        states: list[str] = []
        _around(places, lambda: states.append(_state_of(path)))
        work()
        found = [1 + i for i, state in enumerate(states) if [state] != states[max(i - 1, 0) : i]]
        os.write(writing, json.dumps(found).encode())

    assert in_child(watched) == 0
    os.close(writing)
    with open(reading, "rb") as told:
        return json.loads(told.read())


def _state_of(path: Path) -> str:
    """Digest of all that is below a directory, and of what the directory itself is."""
    state = hashlib.sha256()
    for entry in [path, *sorted(path.rglob("*"))]:
        if not os.path.lexists(entry):
            continue  # `path`, before it is made
        kind = os.lstat(entry).st_mode
        state.update(f"{entry} {kind} ".encode())
        if entry.is_symlink():
            state.update(os.readlink(entry).encode())
        elif entry.is_file():
            state.update(hashlib.sha256(entry.read_bytes()).digest())
    return state.hexdigest()


def _around(places: Sequence[Place], tick: Callable[[], object]) -> None:
    """From now on call `tick` before and after each call of these functions."""

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
