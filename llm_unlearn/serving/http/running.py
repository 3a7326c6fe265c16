"""The server's process: its port, loading behind it, signals, and an end that loses no answer."""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.serving.http.api import make_app
from llm_unlearn.serving.http.service import Opened, Service

FLUSH_SECONDS = 5.0  # in which the last answers must have been read
log = logging.getLogger("llm_unlearn.serving")


def bind(host: str, port: int) -> socket.socket:
    """The listening socket; port 0 takes any that is free.

    Raises:
        RunError: the port is taken.
        UserError: no such address on this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise RunError(
                f"port {port} of {host} is in use: stop what listens there, or choose another --port"
            ) from None
        if isinstance(error, OSError) and error.errno == errno.EACCES:
            raise UserError(f"--port {port} needs rights: choose one above 1023") from None
        raise UserError(f"cannot listen on --host {host} --port {port}: {error}") from None


def _ensure_tls(tls: tuple[Path, Path] | None) -> None:
    """
    Raises:
        UserError: the certificate or its key cannot be used.
    """
    if tls is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*tls)
    except (OSError, ValueError) as error:  # of OpenSSL's errors too
        words = f"--tls-certificate {tls[0]} --tls-key {tls[1]} cannot be used: expected PEM files"
        raise UserError(f"{words} of a certificate and its key ({error})") from None


class Server(uvicorn.Server):
    """One server of one run, until a signal or an engine that cannot be opened ends it.

    At SIGTERM or SIGINT it is not ready any more and takes no new query, lets the running ones end
    for up to `drain` seconds, and tells the others to ask elsewhere. A second signal ends it at once.

    Args:
        opening: loads the model; in a thread of its own.
        on_ready: called when it is loaded.
        tls: files of a certificate and its key.
    """

    def __init__(
        self,
        service: Service,
        opening: Callable[[], Opened],
        on_ready: Callable[[], None],
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        certificate, key = tls or (None, None)
        _ensure_tls(tls)
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_config=None,
                access_log=False,  # addresses and query strings are what people wrote
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="off",
                ssl_certfile=certificate,
                ssl_keyfile=key,
                timeout_graceful_shutdown=int(FLUSH_SECONDS),
            )
        )
        self.service = service
        self.opening = opening
        self.on_ready = on_ready
        self.failure: BaseException | None = None
        self._opened: Opened | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def run_on(self, listening: socket.socket) -> None:
        """Serve until the end; then everything is closed.

        Raises:
            UserError: the model cannot be loaded.
        """
        try:
            self.run(sockets=[listening])
        finally:
            listening.close()
            if self._opened is not None:
                (self._opened.close or self._opened.engine.close)()
            self.service.audit.close()
        if self.failure is not None:
            raise self.failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        # A daemon: a model that loads for minutes must not hold up the end.
        threading.Thread(target=self._open, name="opening", daemon=True).start()

    def _open(self) -> None:
        assert self._loop is not None
        try:
            opened = self.opening()
        except BaseException as error:
            self.failure = error
            self._tell(self._leave)
            return
        self._opened = opened
        self._tell(lambda: self._is_open(opened))

    def _tell(self, what: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is left to be told
            self._loop.call_soon_threadsafe(what)

    def _is_open(self, opened: Opened) -> None:
        self.service.open(opened)
        if not self.service.is_draining:
            self.on_ready()

    def _leave(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's: that closes the port at once, and dies of the signal after a good end."""
        if self.service.is_draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self.service.is_draining = True
        self._tell(lambda: self._tasks.append(asyncio.ensure_future(self._drain())))

    async def _drain(self) -> None:
        if self._opened is not None:
            seconds = self.service.settings.drain
            if not await asyncio.to_thread(self._opened.engine.drain, seconds):
                log.warning("not every query was answered within %g s", seconds)
        self.service.stop_waiting()
        self._leave()
