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

from llm_unlearn import files
from llm_unlearn.errors import RunError
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.store import RunDirectory

FOLDER = "serving"
BEAT_SECONDS = 2.0
FRESH_SECONDS = 10.0  # a heartbeat that is older is of a server that has ended, or stands still
LOOK_SECONDS = 0.2


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

    def __post_init__(self) -> None:
        kinds = {"id": str, "host": str, "pid": int, "beat": (int, float), "epoch": int}
        if not all(isinstance(getattr(self, name), kind) for name, kind in kinds.items()):
            raise TypeError("this is not what a server says")

    @property
    def age(self) -> float:
        return time.time() - self.beat

    @property
    def is_another(self) -> bool:
        return (self.host, self.pid) != (socket.gethostname(), os.getpid())

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended, as far as that can be known from here."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # no process has such a number
            return True
        except PermissionError:
            return False
        return False


class Replicas:
    """The servers of one run, and this process as one of them.

    Args:
        name: of this one; by default a random one.
    """

    def __init__(self, run: RunDirectory, name: str | None = None):
        self.run = run
        self.id = name or secrets.token_hex(4)
        self._sequences: dict[str, int] = {}
        self._followed: tuple[float, int | None] = (0.0, None)
        self.folder = run.path / FOLDER / "replicas"

    def claim(self) -> None:
        """Take the name; it is free again when its server has ended.

        Raises:
            RunError: another live server has it: each would speak for the other's memory.
        """
        for said in self.beats():
            if said.id == self.id and said.is_another and said.age < FRESH_SECONDS:
                raise RunError(
                    f"--replica {self.id} is a server that runs (process {said.pid} on {said.host}): "
                    f"choose another name, or try again {FRESH_SECONDS:.0f} s after its end"
                )

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
            except (OSError, ValueError, TypeError, RecursionError):
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

    def have_left(self, request: Request) -> bool:
        """Whether no server holds what a request deletes, in memory or in an answer under way."""
        moment, followed = self._followed
        if time.monotonic() - moment > LOOK_SECONDS:
            followed = self.epoch()
            self._followed = (time.monotonic(), followed)
        if followed is None:
            return True
        if request.id not in self._sequences:
            events = self.run.ledger.events("request")
            self._sequences = {event.payload["request"]: event.sequence for event in events}
        return self._sequences[request.id] < followed
