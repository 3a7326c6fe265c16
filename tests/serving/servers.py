"""Servers of stub runs with the stand-in engine: as an application, and on a real port."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from llm_unlearn.serving.http.api import make_app
from llm_unlearn.serving.http.audit import AuditLog
from llm_unlearn.serving.http.auth import Tokens
from llm_unlearn.serving.http.chat import Renderer
from llm_unlearn.serving.http.deletions import Deletions
from llm_unlearn.serving.http.running import Server, bind
from llm_unlearn.serving.http.service import Opened, Service, Settings
from tests.serving.stand_in import StandIn
from tests.tiny import (
    make_tiny_tokenizer,
    make_trained_stub,
)

NAME = "people"


def make_trained_run(path: Path) -> Path:
    return make_trained_stub(path, num_shards=3)


_made: list["Served"] = []


@contextlib.contextmanager
def closed_afterwards() -> Iterator[None]:
    """Every service that is made in here leaves no thread and no open file."""
    before = len(_made)
    try:
        yield
    finally:
        while len(_made) > before:
            _made.pop().close()


class Served:
    """A service with everything around it.

    Args:
        options: of `Settings`.
    """

    def __init__(
        self,
        run: Path,
        tokens: Tokens | None = None,
        engine: StandIn | None = None,
        clock: Any = time.monotonic,
        **options: Any,
    ) -> None:
        from llm_unlearn.exact.run import S3TRun

        self.run = S3TRun.open(run).directory
        self.engine = engine or StandIn(epoch=self.run.ledger.count)
        defaults = {"asks_per_minute": 0, "deletions_per_hour": 0, "requests_per_subject": 0}
        settings = Settings(**{"name": NAME, **defaults, **options})
        self.servers: list[Server] = []
        self.service = Service(settings, Deletions(self.run), AuditLog(run, "here"), tokens, clock)

        _made.append(self)

    def close(self) -> None:
        self.engine.close()
        self.service.audit.close()

    def opened(self) -> Opened:
        asked = lambda messages: messages[-1]["content"]  # noqa: E731
        return Opened(self.engine, Renderer(make_tiny_tokenizer()), asked)

    def app(self) -> Any:
        self.service.open(self.opened())
        return make_app(self.service)

    def client(self, token: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = httpx.ASGITransport(self.app(), raise_app_exceptions=True)
        return httpx.AsyncClient(transport=transport, base_url="http://testserver", headers=headers)

    def stop(self) -> None:
        """What a SIGTERM does."""
        self.servers[-1].handle_exit(signal.SIGTERM, None)

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """On a free port, ready; the end is that of a SIGTERM."""
        listening = bind("127.0.0.1", 0)
        url = address_of(listening)
        ready = threading.Event()
        server = Server(self.service, self.opened, ready.set)
        self.servers.append(server)
        thread = threading.Thread(target=server.run_on, args=(listening,))
        thread.start()
        try:
            assert ready.wait(20)
            yield url
        finally:
            if not self.service.is_draining:
                self.stop()
            thread.join(20)
            assert not thread.is_alive()


def address_of(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"
