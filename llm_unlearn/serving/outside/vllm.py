"""Keeps a vLLM server in step with a run.

What is deleted stops answering first: its names are unloaded before anything is written or loaded. Then
what is served now is exported, each adapter as a copy of its own under a name with its digest, and loaded; then
what was replaced is unloaded; then the files of what is confirmed not to answer go, and the register learns of it.
Each step looks at what is there, so a killed run is repeated from the start.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.adapters import NAME
from llm_unlearn.exact.copies import Copy, known, mark_gone, register
from llm_unlearn.exact.copy_actions import delete_export
from llm_unlearn.exact.settling import settle
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.export.choosing import Part
from llm_unlearn.export.making import Say, export
from llm_unlearn.serving.outside.http_client import SECONDS, Server, read_token
from llm_unlearn.serving.outside.vllm_server import (
    MEMORY,
    Refused,
    VllmServer,
    in_memory_of,
    place_in_memory,
)
from llm_unlearn.serving.probe.clean import Clean, retired_names
from llm_unlearn.serving.probe.expected import exported_names

KIND = "vllm"
ATTEMPTS = 4
RECHECK_SECONDS = 60.0  # a server that was started again has forgotten, or remembers too much
CLOCK_SECONDS = 2.0  # what dates in HTTP and clocks are exact to
UNLOADED, RESTARTED = "unloaded and deleted", "the server was started again since"
REFUSED = "the server did not load it"


class Moved(RunError):
    """The run changed while the server was brought in step with it."""


@dataclass(frozen=True)
class Synced:
    """What was done. `to_dict` is what `--json` prints.

    Attributes:
        epoch: entries of the ledger that the server is in step with.
        others: adapters on the server that are not from this run; they were left alone.
        in_memory: deleted adapters that can still be in the server's memory.
    """

    epoch: int
    loaded: tuple[str, ...]
    unloaded: tuple[str, ...]
    kept: tuple[str, ...]
    others: tuple[str, ...]
    in_memory: tuple[str, ...]

    @property
    def has_changed(self) -> bool:
        return bool(self.loaded or self.unloaded)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Follower:
    """One run and one vLLM server.

    Args:
        directory: where the adapters go: on this machine, outside of the run.
        seen_as: what the server calls that directory.
    """

    def __init__(
        self, run: RunDirectory, vllm: VllmServer, directory: Path, seen_as: str | None = None
    ):
        self.run = run
        self.vllm = vllm
        self.directory = directory.resolve()
        self.seen_as = seen_as.rstrip("/") if seen_as else str(self.directory)
        self._names: dict[str, str] = {}
        self._looked = (-1, 0)
        self._loaded: dict[str, None] = {}
        self._unloaded: dict[str, None] = {}
        if self.directory.is_relative_to(run.path.resolve()):
            raise UserError(f"--export {directory} is within the run: choose another directory")

    @classmethod
    def of(
        cls,
        run: Path,
        url: str,
        directory: Path | None = None,
        seen_as: str | None = None,
        token_file: Path | None = None,
        seconds: float = SECONDS,
    ) -> "Follower":
        """
        Args:
            directory: beside the run by default.
            seconds: for one question to the server.

        Raises:
            UserError: no run, no address, or a directory that cannot be used.
        """
        opened = RunDirectory.open(run)
        server = Server(url, read_token(token_file), seconds)
        beside = run.resolve().with_name(f"{run.resolve().name}-vllm")
        return cls(opened, VllmServer(server), directory or beside, seen_as)

    def sync(self, say: Say | None = None) -> Synced:
        """Bring the server in step with the run as it is now.

        Raises:
            RunError: the server cannot be asked, refuses, or still answers for what is deleted; what
                was confirmed is done and noted, and the same call goes on.
            UserError: nothing is served yet.
        """
        say = say or (lambda _what: None)
        self._loaded, self._unloaded = {}, {}
        for _ in range(ATTEMPTS):
            before = self._moment()
            try:
                done = self._sync(say)
            except Moved:
                continue
            except (RunError, OSError):
                if self._moment() == before:
                    raise
                continue
            if self._moment() == before:
                return done
        raise RunError(f"{self.run.path} changes all the time: try again when it is done")

    def watch(
        self,
        interval: float,
        tell: Callable[[Synced], None],
        warn: Callable[[str], None],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Follow the ledger. A server that is down, or refuses, is tried again until it is in step.

        Args:
            interval: seconds between two looks at the ledger.
            tell: of every change.
        """
        seen, checked, failure = None, 0.0, None
        while not is_over():
            moment = self._moment()
            if moment != seen or failure or time.monotonic() - checked > RECHECK_SECONDS:
                try:
                    done = self.sync()
                except (RunError, OSError) as error:
                    if str(error) != failure:  # the same again is no news
                        warn(str(error))
                    failure = str(error)
                else:
                    if done.has_changed or seen is None or failure:
                        tell(done)
                    seen, checked, failure = moment, time.monotonic(), None
            time.sleep(interval)

    def _moment(self) -> int:
        """Entries of the ledger that are not about copies, which syncing itself writes."""
        epoch = self.run.ledger.epoch()
        if epoch != self._looked[0]:
            copying = [self.run.ledger.events(kind) for kind in ("copied", "copy gone")]
            before = sum(event.sequence < epoch for events in copying for event in events)
            self._looked = epoch, epoch - before
        return self._looked[1]

    def _sync(self, say: Say) -> Synced:
        epoch, clean = self.run.ledger.count(), Clean.of(self.run)
        self._note_a_restart()
        listed = self.vllm.listed()
        ours = self._ours(listed)
        deleted = [name for name, nodes in ours.items() if nodes is None or clean.problem_of(nodes)]
        self._unload(deleted, say)
        with self.run.changing("finishing a deletion in it"):
            settle(self.run)
        wanted = exported_names(self.run, self._names)
        misplaced = [n for n in wanted if n in listed and listed[n] != self._seen(n)]
        self._unload(misplaced, say)
        missing = [n for n in wanted if listed.get(n) != self._seen(n) or n in deleted]
        refusal = self._load_all({name: wanted[name] for name in missing}, clean, say)
        for name in sorted(wanted.keys() - self._noted(wanted) - {*missing}):
            self._export(name, wanted[name])  # the server may read it again
            self._note_in_memory(name)
        replaced = [n for n in ours if n not in wanted and n not in deleted]
        if refusal is None:  # otherwise what is older and clean goes on answering
            self._unload(replaced, say)
        self._remove_files([*wanted, *(replaced if refusal else ())])
        if refusal is not None:
            raise refusal
        others = [name for name in listed if name not in ours and name not in wanted]
        left = tuple(self._deleted_in_memory())
        loaded = tuple(name for name in self._loaded if name in wanted)
        kept = tuple(name for name in wanted if name not in self._loaded)
        return Synced(epoch, loaded, tuple(self._unloaded), kept, tuple(others), left)

    def _ours(self, listed: dict[str, str]) -> dict[str, tuple[str, ...] | None]:
        """Adapters on the server that are from this run, with their nodes; None where those are unknown."""
        copies = [copy for copy in known(self.run) if copy.is_local]
        before = set(retired_names(self.run, ()))
        found: dict[str, tuple[str, ...] | None] = {}
        for name, root in listed.items():
            here = Path(self._here(root))
            held = [copy for copy in copies if here.is_relative_to(copy.place)]
            if held:
                found[name] = held[-1].nodes
            elif name in before:
                found[name] = None
        return found

    def _unload(self, names: Iterable[str], say: Say) -> None:
        """Unload all that can be, and then say of which it could not."""
        failure: RunError | None = None
        for name in names:
            say(f"unloading {name}")
            try:
                self.vllm.unload(name)
                if not self.vllm.is_gone(name):
                    raise RunError(
                        f"{self.vllm.url} says that it unloaded {name}, which still answers: restart it"
                    )
                self._unloaded[name] = None
            except RunError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _load_all(self, parts: dict[str, Part], clean: Clean, say: Say) -> Refused | None:
        """Load what the server takes; returns the first refusal.

        Raises:
            RunError: the server cannot be asked, or does not list what it says that it loaded.
        """
        refusal = None
        for name, part in parts.items():
            try:
                self._load(name, part, clean, say)
            except Refused as error:
                refusal = refusal or error
        listed = self.vllm.listed() if self._loaded else {}
        for name in self._loaded:
            if name in parts and listed.get(name) != self._seen(name):
                raise RunError(f"{self.vllm.url} says that it loaded {name}, and does not list it")
        return refusal

    def _load(self, name: str, part: Part, clean: Clean, say: Say) -> None:
        """Export an adapter, unless it is there, and load it; on the ledger before each."""
        say(f"exporting {name}")
        self._export(name, part)
        if self._has_moved(clean):
            raise Moved(f"{self.run.path} changed")
        copy = self._note_in_memory(name)
        say(f"loading {name}")
        try:
            self.vllm.load(name, self._seen(name))
        except Refused:
            mark_gone(self.run, copy.id, REFUSED)
            raise
        self._loaded[name] = None

    def _has_moved(self, clean: Clean) -> bool:
        """Was something asked for since?"""
        return len(self.run.ledger.requests()) != len(clean.requests)

    def _export(self, name: str, part: Part) -> None:
        place = self.directory / name
        if self._copy_at(place) is not None and (place / name).is_dir():
            return
        done = export(self.run, KIND, place, part=part.name)
        if done.adapters != [name]:
            delete_export(self.run, done.id, even_current=True)
            raise Moved(f"{self.run.path} changed")

    def _copy_at(self, place: Path) -> Copy | None:
        return next((copy for copy in known(self.run) if copy.is_at(str(place))), None)

    def _noted(self, names: Iterable[str]) -> set[str]:
        """Those whose files and whose place in the server's memory the register has, by one look at it."""
        exported = {copy.place for copy in known(self.run) if copy.is_at(copy.place)}
        loaded = {copy.place for copy in in_memory_of(self.run, self.vllm.url)}
        return {
            name
            for name in names
            if str(self.directory / name) in exported
            and (self.directory / name / name).is_dir()
            and place_in_memory(self.vllm.url, name) in loaded
        }

    def _note_in_memory(self, name: str) -> Copy:
        """Register what is in the server's memory, unless it is; a later deletion then counts it."""
        place = place_in_memory(self.vllm.url, name)
        for copy in in_memory_of(self.run, self.vllm.url):
            if copy.place == place:
                return copy
        exported = self._copy_at(self.directory / name)
        if exported is None:
            raise Moved(f"{self.directory / name} is not there any more")
        return register(self.run, MEMORY, place, exported, is_local=False)

    def _note_a_restart(self) -> None:
        """What was loaded before the server was started is not in its memory any more."""
        held = in_memory_of(self.run, self.vllm.url)
        started = self.vllm.started_at() if held else None
        for copy in held:
            if started is not None and copy.made_at + CLOCK_SECONDS < started:
                mark_gone(self.run, copy.id, RESTARTED)

    def _deleted_in_memory(self) -> list[str]:
        clean = Clean.of(self.run)
        held = in_memory_of(self.run, self.vllm.url)
        return [copy.place.split(" ")[-1] for copy in held if clean.problem_of(copy.nodes)]

    def _remove_files(self, wanted: Iterable[str]) -> None:
        """Remove exports that are not wanted, once the server does not answer for them.

        Raises:
            RunError: it still does, or that cannot be told; all others are removed.
        """
        keep, failure = set(wanted), None
        for copy in known(self.run):
            name = Path(copy.place).name
            is_own = copy.kind == KIND and Path(copy.place).parent == self.directory
            if copy.gone is not None or not is_own or not NAME.fullmatch(name) or name in keep:
                continue
            if not self.vllm.is_gone(name):
                failure = failure or RunError(
                    f"{self.vllm.url} still answers for {name}: restart it"
                )
            elif copy.has_vanished:
                mark_gone(self.run, copy.id, UNLOADED)
            else:
                delete_export(self.run, copy.id, even_current=True)
        if failure is not None:
            raise failure

    def _seen(self, name: str) -> str:
        """The path of an adapter as the server knows it."""
        return f"{self.seen_as}/{name}/{name}"

    def _here(self, root: str) -> str:
        """The path of an adapter on this machine, from what the server says."""
        below = root.removeprefix(f"{self.seen_as}/")
        return root if below == root else str(self.directory / below)
