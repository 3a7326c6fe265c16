"""A server on this machine that answers what a test tells it to, over HTTP."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Question:
    method: str
    path: str
    body: Any
    token: str | None


@dataclass(frozen=True)
class Said:
    """A status, JSON or bytes, and headers; `chunks` without end instead of a body."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    chunks: Iterator[bytes] | None = None


Handle = Callable[[Question], Said]


@contextmanager
def running(handle: Handle) -> Iterator[str]:
    """Its address, as long as the context is open."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            return

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(length)
            token = self.headers.get("Authorization")
            body = json.loads(data) if data else None
            said = handle(Question(self.command, self.path, body, token))
            try:
                self.send(said)
            except (BrokenPipeError, ConnectionResetError):
                return  # the client has seen enough

        def send(self, said: Said) -> None:
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            data = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            if said.chunks is None:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for chunk in said.chunks or (data,):
                self.wfile.write(chunk)
                self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
