"""Who serves a run: one file for each server, by which all know how far each has followed the ledger.

That no answer reads what was deleted does not rest on these files: every server asks the ledger before it
begins an answer. They say when a deletion has reached every server's memory, also one that nobody asks.
"""

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from llm_unlearn import files
from llm_unlearn.exact.store import RunDirectory

FOLDER = "serving"
BEAT_SECONDS = 2.0
SILENT_SECONDS = 15.0

State = Literal["acknowledged", "not served", "erased"]


@dataclass(frozen=True)
class Beat:
    """What a server said last.

    Attributes:
        beat: when, in seconds since the epoch.
        epoch: entries of the ledger that its memory and all its answers follow.
    """

    id: str
    host: str
    pid: int
    beat: float
    epoch: int

    @property
    def is_silent(self) -> bool:
        return time.time() - self.beat > SILENT_SECONDS

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended, as far as that can be known from here."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class Replicas:
    """The servers of one run, and this process as one of them."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self.id = secrets.token_hex(4)
        self.folder = run.path / FOLDER / "replicas"

    def beat(self, epoch: int) -> None:
        """Say how far this server has followed the ledger."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        said = Beat(self.id, socket.gethostname(), os.getpid(), time.time(), epoch)
        files.write_bytes(self._path(self.id), json.dumps(asdict(said)).encode())

    def leave(self) -> None:
        """This server has ended: its memory is gone with it."""
        self._path(self.id).unlink(missing_ok=True)

    def _path(self, identity: str) -> Path:
        return self.folder / f"{identity}.json"

    def beats(self) -> list[Beat]:
        """What every server said last. Files of those that have ended are removed."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                said = Beat(**json.loads(path.read_bytes()))
            except (OSError, ValueError, TypeError):
                continue  # it was removed or is no such file: nobody's memory
            if said.is_gone:
                path.unlink(missing_ok=True)
            else:
                found.append(said)
        return found

    def epoch(self) -> int | None:
        """How far all servers have followed the ledger; None if there is none.

        A server that is silent counts with what it said last: its memory may still hold what was
        deleted, though it answers nothing before it has asked the ledger.
        """
        return min((beat.epoch for beat in self.beats()), default=None)

    def states(self) -> dict[str, State]:
        """How far every request has come, by its id.

        `not served`: no server holds what it deletes, in memory or in an answer under way. `erased`: its files
        are gone too.
        """
        followed = self.epoch()
        reached = {
            event.payload["request"]
            for event in self.run.ledger.events("request")
            if followed is None or event.sequence < followed
        }
        found: dict[str, State] = {}
        for request in self.run.ledger.requests():
            if request.id not in reached:
                found[request.id] = "acknowledged"
            else:
                found[request.id] = "erased" if request.finished_at else "not served"
        return found
