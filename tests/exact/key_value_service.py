"""A loopback key service: HashiCorp Vault's key-value engine, version 2, as far as its API page says.

https://developer.hashicorp.com/vault/api-docs/secret/kv/kv-v2
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hvs.test-token"


@dataclass
class KeyValueService:
    """What the service holds and how it behaves; a test changes it at will.

    Attributes:
        secrets: the versions of each secret by its path; None where one was deleted softly.
        asked: method and path of every request.
        refuses: operations (`create`, `read`, `list`, `delete`) that the token may not do.
        answers_left: how many more requests are answered before it goes down; None for all.
        broken: `sealed`, `garbage` or `soft` (its deletions can be undone).
    """

    mount: str = "secret"
    secrets: dict[str, list[dict[str, Any] | None]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    refuses: set[str] = field(default_factory=set)
    answers_left: int | None = None
    broken: str | None = None
    address: str = ""

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON for a request that carries the right token."""
        path, _, query = path.removeprefix("/v1/").partition("?")
        mount, _, rest = path.partition("/")
        kind, _, name = rest.partition("/")
        if mount != self.mount or kind not in ("data", "metadata"):
            return 404, {"errors": [f"no handler for route {path!r}"]}
        if method == "GET" and kind == "metadata" and "list=true" in query:
            method = "LIST"
        operation = {"POST": "create", "PUT": "create", "GET": "read"}.get(method, method.lower())
        if operation in self.refuses:
            return 403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]}
        do = getattr(self, f"_{operation}_{kind}", None)
        return do(name.strip("/"), body) if do else (405, {"errors": ["unsupported operation"]})

    def _create_data(self, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        versions = self.secrets.setdefault(name, [])
        wanted = body.get("options", {}).get("cas")
        if wanted is not None and wanted != len(versions):
            return 400, {"errors": ["check-and-set parameter did not match the current version"]}
        versions.append(body["data"])
        return 200, {"data": {"version": len(versions)}}

    def _read_data(self, name: str, _body: object) -> tuple[int, Any]:
        if name not in self.secrets:
            return 404, {"errors": []}
        data = self.secrets[name][-1]
        metadata = {"version": len(self.secrets[name])}
        return (200 if data else 404), {"data": {"data": data, "metadata": metadata}}

    def _delete_data(self, name: str, _body: object) -> tuple[int, Any]:
        self.secrets.get(name, []).append(None)
        return 204, None

    def _delete_metadata(self, name: str, _body: object) -> tuple[int, Any]:
        if self.broken == "soft":
            return self._delete_data(name, _body)
        self.secrets.pop(name, None)
        return 204, None

    def _list_metadata(self, name: str, _body: object) -> tuple[int, Any]:
        below = [
            held.removeprefix(f"{name}/") for held in self.secrets if held.startswith(f"{name}/")
        ]
        keys = sorted({part.split("/")[0] + ("/" if "/" in part else "") for part in below})
        return (200, {"data": {"keys": keys}}) if keys else (404, {"errors": []})

    def values(self) -> list[str]:
        """Every key that any version of any secret still holds."""
        return [held["key"] for versions in self.secrets.values() for held in versions if held]


@contextlib.contextmanager
def serving(mount: str = "secret") -> Iterator[KeyValueService]:
    """The service on a free port of the loopback interface."""
    service = KeyValueService(mount)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            service.asked.append((self.command, self.path))
            if service.answers_left is not None:
                service.answers_left -= 1
            if service.broken == "garbage":
                return self.send(200, b"<html>a proxy</html>", "text/html")
            if service.broken == "sealed" or (service.answers_left or 0) < 0:
                return self.send(503, b'{"errors": ["Vault is sealed"]}')
            if self.headers.get("X-Vault-Token") != TOKEN:
                return self.send(403, b'{"errors": ["permission denied"]}')
            status, answer = service.answer(self.command, self.path, body)
            self.send(status, b"" if answer is None else json.dumps(answer).encode())

        do_GET = do_POST = do_PUT = do_DELETE = do_LIST = handle_one

        def send(self, status: int, data: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    service.address = f"vault+http://127.0.0.1:{server.server_port}/{mount}/runs/mine"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
