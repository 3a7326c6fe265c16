"""What is on disk: everything in a run and known outside of it, by content."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llm_unlearn import files
from llm_unlearn.errors import RunError
from llm_unlearn.exact import residues
from llm_unlearn.exact.adapters import NAME, WEIGHTS_NAME, file_digest
from llm_unlearn.exact.copies import Copy, CopyStatus, statuses
from llm_unlearn.exact.served import read_lineage
from llm_unlearn.exact.settling import count_remaining
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.probe.clean import Clean, read_adapter, served_now
from llm_unlearn.serving.probe.looks import LiveAdapter, Look

SETTLING_SECONDS = 0.3
LIVE_SECONDS = 60.0  # a heartbeat that is older is of a server that has gone
FOLDERS = ("records", "nodes", "generations", "cache", "trainer", "serving")


class Disk:
    """Looks at one run at one moment. `adapters` fills while the looks are taken."""

    def __init__(self, run: RunDirectory, clean: Clean):
        self.run = run
        self.clean = clean
        self.adapters: list[LiveAdapter] = []

    def looks(self) -> Iterator[Look]:
        """One after the other, in the order in which a person would want to read them."""
        every: tuple[Callable[[Look], None], ...] = (
            self.records, self.nodes, self.served, self.generations, self.caches, self.temporary,
            self.serving, self.unknown, self.copies, self.siblings, self.names_elsewhere,
        )  # fmt: skip
        titles = {
            "generations": "earlier generations",
            "caches": "caches and trainer folders",
            "temporary": "temporary files",
            "serving": "files of servers",
            "unknown": "files of no known kind",
            "copies": "exports and copies",
            "siblings": "directories beside the run",
            "names_elsewhere": "hard links",
        }
        for look_at in every:
            look = Look(titles.get(look_at.__name__, look_at.__name__))
            try:
                look_at(look)
            except (RunError, OSError, ValueError, KeyError, TypeError) as error:
                look.unseen.append(f"cannot be looked at: {error}")
            yield look

    def records(self, look: Look) -> None:
        look.examined = len(self.run.slices.names)
        for name, left in count_remaining(self.run, self.clean.requests).items():
            if left:
                look.problems.append(
                    f"shard {name.shard}, slice {name.slice} holds {left} deleted records"
                )
        for name in self.run.slices.names:
            for path in self.run.slices.stale_texts(self.run.slices.header(name)):
                look.problems.append(f"{self._shown(path)}: digests of what a slice held before")
        pending = {r.id for r in self.clean.requests if r.finished_at is None}
        for path in (self.run.path / "records" / "pending").glob("*"):
            if path.stem not in pending:
                look.problems.append(f"{self._shown(path)} belongs to no pending request")

    def nodes(self, look: Look) -> None:
        for key in self.run.nodes.keys():
            look.examined += 1
            if problem := self.clean.problem_of([key]):
                look.problems.append(f"nodes/{key[:12]} {problem}")
                continue
            try:
                held = self.clean.weights.get(self.run.nodes.digest(key, WEIGHTS_NAME))
            except (RunError, OSError) as error:
                look.unseen.append(f"nodes/{key[:12]} cannot be read: {error}")
                continue
            if held is not None:
                look.problems.append(
                    f"nodes/{key[:12]} holds other weights: it {self.clean.problem_of([held])}"
                )

    def served(self, look: Look) -> None:
        for adapter in served_now(self.run, self.clean):
            self._judge(look, adapter)

    def generations(self, look: Look) -> None:
        current = self.run.served.resolve() if self.run.served.is_symlink() else None
        folder = self.run.path / "generations"
        for generation in sorted(folder.iterdir()) if folder.is_dir() else ():
            if generation.resolve() != current:
                self._adapters_in(look, generation)

    def caches(self, look: Look) -> None:
        """What was computed from records. A deletion empties these folders, so what is older is residue."""
        for name in residues.EMPTIED.values():
            for path in self._files(self.run.path / name):
                look.examined += 1
                if self._is_before_the_last(path):
                    look.problems.append(f"{self._shown(path)} is older than the last deletion")
                else:
                    self._by_content(look, path)

    def temporary(self, look: Look) -> None:
        seen = self._half_written()
        if seen:  # something may just be written: a crash leaves what stays
            time.sleep(SETTLING_SECONDS)
        for path in sorted(seen & self._half_written()):
            look.examined += 1
            look.problems.append(
                f"{self._shown(path)} is half written, by a crash or right now: run `llm-unlearn rebuild`"
            )

    def serving(self, look: Look) -> None:
        """Heartbeats and logs of servers: a live one that names what is not served (any more) is told."""
        served = {adapter.name for adapter in self.adapters}
        for path in self._files(self.run.path / "serving"):
            look.examined += 1
            text = path.read_text("utf-8", "replace") if path.suffix == ".json" else ""
            is_live = time.time() - path.stat().st_mtime < LIVE_SECONDS
            gone = {found.group() for found in NAME.finditer(text)} - served
            if gone and is_live:
                look.problems.append(
                    f"{self._shown(path)}: a live server names {', '.join(sorted(gone))}"
                )
            self._by_content(look, path)

    def unknown(self, look: Look) -> None:
        for path in residues.unrecognised(self.run):
            for file in self._files(path) if path.is_dir() else (path,):
                look.examined += 1
                if not self._by_content(look, file):
                    look.unseen.append(
                        f"{self._shown(file)} is of no known kind: what is in it is not known"
                    )

    def copies(self, look: Look) -> None:
        for status in statuses(self.run, self.clean.nodes):
            look.examined += 1
            copy = status.copy
            what = f"copy {copy.id} ({copy.kind}) at {copy.place}"
            if status.state == "gone":
                if _is_there(copy):
                    look.problems.append(f"{what} is noted as gone and still there")
            elif status.state == "stale":
                look.problems.append(f"{what} {self.clean.problem_of(copy.nodes)}")
            elif not copy.is_local:
                look.unseen.append(f"{what} is not on this machine")
            self._exported(look, status)

    def _exported(self, look: Look, status: CopyStatus) -> None:
        """The adapters in a copy on this machine; those of a stale one are told with it."""
        if not status.copy.is_local or not Path(status.copy.place).is_dir():
            return
        own = look if status.state == "current" else Look("told already")
        for folder, _, held in os.walk(status.copy.place):
            if WEIGHTS_NAME in held:
                self._judge(own, read_adapter(Path(folder), folder, self.clean))

    def siblings(self, look: Look) -> None:
        """Backups of the run beside it know it by the id of its key."""
        own = self.run.path.resolve()
        for path in sorted(own.parent.iterdir()):
            if path == own or not path.is_dir():
                continue
            look.examined += 1
            if _salt_of(path) == self.run.key.salt_id:
                self._copy_of_the_run(look, path)
        look.notes.append(
            "copies of the run elsewhere (backups, snapshots) cannot be seen from here"
        )

    def _copy_of_the_run(self, look: Look, path: Path) -> None:
        folder = path / "nodes"
        held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        deleted = held & self.clean.deleted.keys()
        if deleted:
            told = self.clean.problem_of(sorted(deleted))
            look.problems.append(
                f"{path} is a copy of the run and holds {len(deleted)} deleted nodes: it {told}"
            )
        elif unknown := held - self.clean.nodes:
            look.unseen.append(
                f"{path} has the run's key and {len(unknown)} nodes that this run does not know"
            )
        else:
            look.unseen.append(
                f"{path} has the run's key: its records and what it serves were not looked at"
            )

    def names_elsewhere(self, look: Look) -> None:
        """Files with more names than the run has for them outlive their deletion under the others."""
        names: dict[tuple[int, int], list[Path]] = {}
        links: dict[tuple[int, int], int] = {}
        for folder in FOLDERS:
            for path in self._files(self.run.path / folder):
                status = path.lstat()
                look.examined += 1
                names.setdefault((status.st_dev, status.st_ino), []).append(path)
                links[status.st_dev, status.st_ino] = status.st_nlink
        outside = [held[0] for inode, held in names.items() if links[inode] > len(held)]
        if outside:
            look.unseen.append(
                f"{len(outside)} files have names outside of the run too, which a deletion does not remove "
                f"(find / -xdev -samefile {outside[0]})"
            )

    def _adapters_in(self, look: Look, generation: Path) -> None:
        for folder, _, held in os.walk(generation):
            if WEIGHTS_NAME in held:
                path = Path(folder)
                self._judge(look, read_adapter(path, self._shown(path), self.clean))
            else:
                for name in held:
                    look.examined += 1
                    self._by_content(look, Path(folder, name))

    def _judge(self, look: Look, adapter: LiveAdapter) -> None:
        look.examined += 1
        self.adapters.append(adapter)
        if adapter.problem:
            look.problems.append(f"{adapter.place} {adapter.problem}")

    def _by_content(self, look: Look, path: Path) -> bool:
        """Is it, under whatever name, the weights of a deleted node?"""
        key = self.clean.weights.get(file_digest(path))
        if key is not None:
            look.problems.append(f"{self._shown(path)} {self.clean.problem_of([key])}")
        return key is not None

    def _is_before_the_last(self, path: Path) -> bool:
        return self.clean.last is not None and path.stat().st_mtime <= self.clean.last

    def _half_written(self) -> set[Path]:
        return {
            Path(folder, name)
            for folder, directories, held in os.walk(self.run.path)
            for name in (*directories, *held)
            if name.startswith(files.TEMPORARY_PREFIX)
        }

    def _files(self, folder: Path) -> list[Path]:
        return [Path(where, name) for where, _, held in os.walk(folder) for name in held]

    def _shown(self, path: Path) -> str:
        return (
            str(path.relative_to(self.run.path))
            if path.is_relative_to(self.run.path)
            else str(path)
        )


def _salt_of(path: Path) -> str | None:
    """Id of the key of a run in a directory; None where there is none to be read."""
    try:
        return json.loads((path / "run.json").read_bytes())["salt_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_there(copy: Copy) -> bool:
    """Does a copy that is noted as gone lie at its place, by its own words?"""
    lineage = read_lineage(Path(copy.place)) if copy.is_local else None
    return isinstance(lineage, dict) and lineage.get("copy") == copy.id


def digest_of_stream(path: Path) -> str | None:
    """SHA-256 of what can be read at a path; None where nothing can."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None
