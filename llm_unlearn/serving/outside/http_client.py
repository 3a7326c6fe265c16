"""Questions to a server that may be anything: bounded in time and size, never led elsewhere.

Redirects are not followed and proxies are not used, so a token goes to the address that was given and
nowhere else; over a network it goes encrypted, or not at all.
"""

import contextlib
import http.client
import json
import os
import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm_unlearn.errors import RunError, UserError

TOKEN_VARIABLE = "LLM_UNLEARN_TOKEN"
SECONDS = 30.0
MOST_BYTES = 32 * 2**20
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Reply:
    """What a server answered: a status and at most `MOST_BYTES` of body."""

    status: int
    body: bytes
    date: str | None = None

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ValueError: it is none.
        """
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("too deeply nested") from None

    @property
    def message(self) -> str:
        """What an error says, in one short line."""
        try:
            error = self.json()["error"]
            said = error["message"] if isinstance(error, dict) else error
        except (ValueError, KeyError, TypeError):
            said = self.text
        line = " ".join(str(said).split())[:200]
        return f"{self.status} {''.join(c for c in line if c.isprintable())}".strip()


def read_token(path: Path | None) -> str | None:
    """A bearer token from a file, or else from LLM_UNLEARN_TOKEN; None where there is none.

    Raises:
        UserError: the file cannot be read, or holds something else than one token.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token_file {path} cannot be read: {error}") from None
    if not token or len(token.split()) != 1:
        raise UserError(f"--token_file {path} does not hold one token")
    return token


class Server:
    """A server at an address.

    Args:
        url: http or https, with a path before `/v1` if there is one.
        token: bearer token.
        seconds: for one question, connecting and reading included.

    Raises:
        UserError: not such an address, or a token that would travel in clear.
    """

    def __init__(self, url: str, token: str | None = None, seconds: float = SECONDS):
        try:
            parts = urlsplit(url)
            self.host, port = parts.hostname, parts.port
        except ValueError:
            raise UserError(f"{url!r} is not the address of a server") from None
        if parts.scheme not in ("http", "https") or not self.host or parts.query or parts.fragment:
            raise UserError(f"{url!r} is not the address of a server: give http(s)://HOST:PORT")
        if "@" in parts.netloc:
            raise UserError("the address holds a password: give a token by --token_file instead")
        if token is not None and parts.scheme == "http" and self.host not in LOOPBACK:
            raise UserError(
                f"a token would go to {self.host} in clear: use https, or ask on the server's own machine"
            )
        self.is_secure = parts.scheme == "https"
        self.port = port or (443 if self.is_secure else 80)
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.path}"
        self.token, self.seconds = token, seconds

    def get(self, path: str) -> Reply:
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Reply:
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> Reply:
        """One question on a connection of its own.

        Raises:
            RunError: no answer in time, a redirect, too long an answer, or none of HTTP.
        """
        connection, late = self._connection(), threading.Event()
        watchdog = None
        headers = {"Accept": "application/json", "Connection": "close"}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        headers |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            connection.connect()
            watchdog = threading.Timer(self.seconds, _hang_up, (connection.sock, late))
            watchdog.daemon = True
            watchdog.start()
            connection.request(method, self.path + path, body, headers)
            response = connection.getresponse()
            data = response.read(MOST_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            is_late = late.is_set() or isinstance(error, TimeoutError)
            raise self._unanswered(path, self._too_late if is_late else reason) from None
        finally:
            if watchdog is not None:
                watchdog.cancel()
            connection.close()
        if late.is_set():
            raise self._unanswered(path, self._too_late)
        if len(data) > MOST_BYTES:
            raise self._unanswered(path, "it answers without end")
        if 300 <= response.status < 400:
            raise RunError(
                f"{self.url}{path} leads elsewhere ({response.status}), which is not followed: give the "
                "address of the server itself"
            )
        return Reply(response.status, data, response.headers.get("Date"))

    @property
    def _too_late(self) -> str:
        return f"no answer within {self.seconds:g} s"

    def _unanswered(self, path: str, reason: str) -> RunError:
        return RunError(f"{self.url}{path} cannot be asked: {reason}")

    def _connection(self) -> http.client.HTTPConnection:
        assert self.host is not None
        if self.is_secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=self.seconds, context=context
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=self.seconds)


def _hang_up(held: socket.socket, late: threading.Event) -> None:
    """End a question that takes too long, however slowly its answer drips."""
    late.set()
    with contextlib.suppress(OSError):  # it had ended meanwhile
        held.shutdown(socket.SHUT_RDWR)
