"""From the options of a server to one that runs: what is refused beforehand, and what it says."""

import ipaddress
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.http.audit import AuditLog
from llm_unlearn.serving.http.auth import Tokens, tokens_path
from llm_unlearn.serving.http.chat import Renderer
from llm_unlearn.serving.http.deletions import Deletions
from llm_unlearn.serving.http.running import Server, bind
from llm_unlearn.serving.http.service import Opened, Service, Settings
from llm_unlearn.serving.policy import Policy

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TELLING = {
    "execute": "lets a query wait for a rebuild",
    "defer": "lets a query wait for a rebuild",
    "wait": "lets every query wait for a rebuild",
    "abstain": "does not answer some queries",
}
"""Handlings that show in when or whether a query is answered."""


@dataclass(frozen=True)
class Place:
    """Where a server listens, and who may reach it.

    Attributes:
        port: 0 for any that is free.
        tokens: file of the tokens; None for RUN/serving/tokens.json, if there is one.
        names: more values of the Host header that a server on this machine accepts.
        replica: letters, digits, dots and dashes; None for the machine's name and the port.
        tls: files of a certificate and its key; None for plain HTTP.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tokens: Path | None = None
    names: tuple[str, ...] = ()
    replica: str | None = None
    tls: tuple[Path, Path] | None = None

    @property
    def is_loopback(self) -> bool:
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def url(self, port: int) -> str:
        """The address, at the port that was taken."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{port}"


@dataclass(frozen=True)
class Started:
    """What a server says of itself when it is ready. `to_dict` is what `--json` prints."""

    url: str
    model: str
    replica: str
    tokens: str | None
    audit: str
    is_encrypted: bool
    is_loopback: bool

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def serve_run(
    run: S3TRun,
    settings: Settings,
    place: Place,
    opening: Callable[[str], Opened],
    on_ready: Callable[[Started], None],
) -> None:
    """Serve a run until a signal ends it.

    Args:
        opening: loads the model, for a replica of this name (`open_run`); called in a thread, when the
            server listens already.
        on_ready: called once queries are answered.

    Raises:
        UserError: the options do not go together, or the model cannot be loaded.
        RunError: the port is taken, or the run cannot be written.
    """
    check_settings(settings)
    tokens = find_tokens(run.path, place)
    if place.is_loopback:
        hosts = (*LOOPBACK, place.host.lower(), *(name.lower() for name in place.names))
        settings = replace(settings, allowed_hosts=hosts)
    with bind(place.host, place.port) as listening:
        port = listening.getsockname()[1]
        replica = place.replica or default_replica(port)
        service = Service(settings, Deletions(run.directory), AuditLog(run.path, replica), tokens)
        started = Started(
            url=place.url(port),
            model=settings.name,
            replica=replica,
            tokens=None if tokens.are_missing else str(tokens.path),
            audit=str(service.audit.path),
            is_encrypted=place.tls is not None,
            is_loopback=place.is_loopback,
        )
        server = Server(service, lambda: opening(replica), lambda: on_ready(started), place.tls)
        server.run_on(listening)


def open_run(run: S3TRun, policy: Policy, replica: str, max_batch: int, max_waiting: int) -> Opened:
    """Load the model and what goes with it.

    Raises:
        UserError: it cannot be loaded, or the policy's threshold is more than there are shards.
    """
    from llm_unlearn.serving.engine.backend import Backend

    backend = Backend(run, policy, max_batch, max_waiting, replica)
    return Opened(
        backend.engine,
        Renderer(backend.tokenizer),
        backend.asked_in,
        backend.replicas.have_left,
        backend.close,
        lambda: backend.problem,
    )


def check_settings(settings: Settings) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: says which, and what to do.
    """
    if not settings.name or not settings.name.isprintable() or len(settings.name) > 300:
        raise UserError("--name: expected 1 to 300 printable characters")
    for flag, value in (("timeout", settings.timeout), ("drain", settings.drain)):
        if not 0 < value < float("inf"):
            raise UserError(f"--{flag} is {value}, expected seconds, more than 0")
    step = settings.constant_time
    if step is None:
        return
    if not 0 < step < float("inf"):
        raise UserError(f"--constant-time is {step}, expected seconds, more than 0")
    if why := TELLING.get(settings.handling):
        raise UserError(
            f"--constant-time hides how a query was served, and the handling {settings.handling!r} "
            f"{why}, which shows it: choose --handling clean"
        )


def find_tokens(run: Path, place: Place) -> Tokens:
    """The tokens; where only this machine can ask there may be none, until somebody makes the first.

    Raises:
        UserError: there are none and others could ask, or the file cannot be used.
    """
    path = place.tokens or tokens_path(run)
    if place.tokens is not None or os.path.lexists(path):
        return Tokens(path)
    if place.is_loopback:
        return Tokens(path, is_optional=True)
    raise UserError(
        f"--host {place.host} lets other machines ask, and there are no tokens: make one with "
        f"`llm-unlearn token add {run} --name NAME --right ask`"
    )


def default_replica(port: int) -> str:
    """A name that stays the same when the server is started again."""
    machine = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:60].strip(".-") or "machine"
    return f"{machine}-{port}"
