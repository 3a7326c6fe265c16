"""Files of a run and its exports that are deleted and still open: their blocks are freed when the last process lets go.

Linux tells by `/proc/PID/fd` and `/proc/PID/maps`, of one's own processes or, to root, of all in the same
process namespace.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llm_unlearn.exact.adapters import WEIGHTS_NAME, file_digest
from llm_unlearn.exact.copies import known
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.probe.clean import Clean
from llm_unlearn.serving.probe.disk import FOLDERS, digest_of_stream
from llm_unlearn.serving.probe.looks import Look

PROC = Path("/proc")
GONE = " (deleted)"
MAPPED = re.compile(r"([0-9a-f]+-[0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*)")


class Held(NamedTuple):
    """A deleted file that a process holds: its last path, and where its content can be read."""

    process: Path
    path: str
    content: Path


def look_at_open_files(run: RunDirectory, clean: Clean, proc: Path = PROC) -> Look:
    """Deleted files of the run that processes still hold."""
    look = Look("open files")
    if not (proc / "self" / "fd").is_dir():
        look.unseen.append(f"{proc} does not tell here which files are open")
        return look
    root = run.path.resolve()
    exported = [copy for copy in known(run) if copy.is_local]
    places = [root / folder for folder in FOLDERS]
    places += [place for copy in exported for place in (Path(copy.place), copy.half_written)]
    below = tuple(f"{place}/" for place in places)
    current = _current_weights(run, clean)
    hidden = 0
    for process in (path for path in proc.iterdir() if path.name.isdigit()):
        try:
            held = list(_held(process, below))
        except PermissionError:
            hidden += 1
            continue
        except OSError:
            continue  # it has ended
        look.examined += 1
        # What is mapped is mostly open too, and read more easily there.
        for one in {one.path: one for one in reversed(held)}.values():
            _judge(look, one, clean, current)
    if hidden:
        look.unseen.append(f"{hidden} processes of other users: ask again as root")
    look.notes.append("processes in other containers or on other machines cannot be seen from here")
    return look


def _held(process: Path, below: Sequence[str]) -> Iterator[Held]:
    """Open deleted files of one process, and mapped ones.

    Raises:
        PermissionError: it belongs to somebody else.
    """
    for descriptor in sorted((process / "fd").iterdir()):
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:
            continue  # closed meanwhile
        if target.endswith(GONE) and target.startswith(tuple(below)):
            yield Held(process, target.removesuffix(GONE), descriptor)
    for line in (process / "maps").read_text("utf-8", "replace").splitlines():
        found = MAPPED.match(line)
        if found and found[2].endswith(GONE) and found[2].startswith(tuple(below)):
            yield Held(process, found[2].removesuffix(GONE), process / "map_files" / found[1])


def _judge(look: Look, held: Held, clean: Clean, current: set[str]) -> None:
    """By content where it can be read. Before the first deletion, nothing can be residue."""
    found = digest_of_stream(held.content)
    if clean.last is None or found in current:
        return
    try:
        name = (held.process / "comm").read_text().strip()
    except OSError:
        name = "?"
    who = f"process {held.process.name} ({name}) holds {held.path}, which is deleted"
    if found in clean.weights:
        look.problems.append(f"{who}: it {clean.problem_of([clean.weights[found]])}")
    else:
        look.problems.append(
            f"{who}: what is in it cannot be told, and a request may have taken it"
        )


def _current_weights(run: RunDirectory, clean: Clean) -> set[str]:
    """SHA-256 of the weights that may be held: of nodes, and of what is served."""
    paths = [run.nodes.directory / key / WEIGHTS_NAME for key in clean.nodes]
    if run.served.exists():
        paths += [folder / WEIGHTS_NAME for folder in run.served.iterdir()]
    return {file_digest(path) for path in paths if path.is_file()}
