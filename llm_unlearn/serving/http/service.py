"""What the handlers share: the engine, who may ask, what is counted and logged, and whether it drains."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyio import CapacityLimiter

from llm_unlearn.errors import UserError
from llm_unlearn.exact.ledger import Request
from llm_unlearn.serving.http.audit import AuditLog
from llm_unlearn.serving.http.auth import ANYBODY, Token, Tokens
from llm_unlearn.serving.http.deletions import Deletions
from llm_unlearn.serving.http.limits import Buckets
from llm_unlearn.serving.http.metrics import Metrics
from llm_unlearn.serving.http.refusals import STOPS, Refusal
from llm_unlearn.serving.queries import Engine, EngineState

MOST_FILING = 4
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Settings:
    """How the HTTP side behaves; times in seconds.

    Attributes:
        name: of the ensemble, as `model`.
        handling: of what cannot be certified, for the audit log.
        constant_time: an answer leaves at the next multiple of it after its arrival; None: at once.
        most_body: bytes.
        asks_per_minute: of each token, in prompts; 0 for no limit.
        deletions_per_hour: of each token, in subjects; 0 for no limit.
        requests_per_subject: how often one subject may be named in an hour; 0 for no limit.
        allowed_hosts: values of the Host header that are accepted; None for any.
    """

    name: str
    handling: str = "clean"
    timeout: float = 120.0
    drain: float = 30.0
    constant_time: float | None = None
    most_body: int = 4_000_000
    asks_per_minute: float = 600.0
    deletions_per_hour: float = 100.0
    requests_per_subject: float = 10.0
    allowed_hosts: tuple[str, ...] | None = None


@dataclass
class Opened:
    """What is there once the model is loaded.

    Attributes:
        render: a conversation as the model reads it.
        asked_in: the part of a conversation that decides who answers; None: all of it.
        have_left: whether no server of the run holds what a request deletes; None: only what this
            one says is known.
        close: ends everything; by default the engine.
        problem: what keeps this server from executing what is pending; None for nothing.
    """

    engine: Engine
    render: Callable[[Messages], str]
    asked_in: Callable[[Messages], str | None] = field(default=lambda messages: None)
    have_left: Callable[[Request], bool] | None = None
    close: Callable[[], None] | None = None
    problem: Callable[[], str | None] = field(default=lambda: None)


class Service:
    """One server's state. Used from the event loop's thread, except where it says otherwise.

    Args:
        tokens: None, or a file that is missing and may be, lets anybody do everything: for a server
            that only this machine reaches.
        clock: of the rate limits.
    """

    def __init__(
        self,
        settings: Settings,
        deletions: Deletions,
        audit: AuditLog,
        tokens: Tokens | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.deletions = deletions
        self.audit = audit
        self.tokens = tokens
        self.created = int(time.time())
        self.asks = Buckets(settings.asks_per_minute, 60.0, clock)
        self.filings = Buckets(settings.deletions_per_hour, 3600.0, clock)
        self.subjects = Buckets(settings.requests_per_subject, 3600.0, clock)
        self.metrics = Metrics(
            self.state, lambda: deletions.count(self.state()), lambda: self.problem is None
        )
        # Filings wait for the run's lock, in threads that must not be those of the queries.
        self.filing = CapacityLimiter(MOST_FILING)
        self.is_draining = False
        self.stopping = asyncio.Event()
        self._opened: Opened | None = None

    def open(self, opened: Opened) -> None:
        """The model is loaded: queries are answered from now on."""
        self.deletions.is_withdrawn = opened.have_left
        self._opened = opened

    @property
    def opened(self) -> Opened:
        """The engine and what goes with it.

        Raises:
            Refusal: it is loading, or the server is about to stop.
        """
        if self.is_draining:
            raise Refusal(503, "draining", STOPS, retry_after=5)
        if self._opened is None:
            raise Refusal(503, "loading", "the model is being loaded: try again", retry_after=5)
        return self._opened

    @property
    def engine(self) -> Engine:
        return self.opened.engine

    @property
    def readiness(self) -> str:
        if self.is_draining:
            return "draining"
        if self._opened is None:
            return "loading"
        return "ready" if self._opened.engine.state().is_ready else "not ready"

    def state(self) -> EngineState | None:
        """Of the engine; None while the model is being loaded."""
        return self._opened.engine.state() if self._opened else None

    @property
    def problem(self) -> str | None:
        """What an operator has to look at; None for nothing. It names files."""
        return self._opened.problem() if self._opened else None

    def notice(self) -> None:
        """The ledger has changed. An engine that is not there yet reads it when it comes."""
        if self._opened is not None:
            self._opened.engine.notice()

    def holder(self, presented: str | None) -> Token:
        """Whose token came with a request.

        Raises:
            Refusal: none did, or it is nobody's, or the tokens cannot be read.
        """
        if self.tokens is None or self.tokens.are_missing:
            return ANYBODY
        challenge = {"WWW-Authenticate": "Bearer"}
        if presented is None:
            words = "a token is needed: send it as `Authorization: Bearer TOKEN`"
            raise Refusal(401, "no_token", words, headers=challenge)
        try:
            token = self.tokens.holder(presented)
        except UserError:
            # Whoever broke the file may have meant to revoke: nobody is let in by its old state.
            raise Refusal(
                503, "tokens_unreadable", "the server cannot read its tokens", retry_after=5
            ) from None
        if token is None:
            words = "the token is not known here, or was revoked"
            raise Refusal(401, "wrong_token", words, headers=challenge)
        return token

    def limit_asks(self, token: Token, prompts: int) -> None:
        """Refuse what goes over a token's limit (429)."""
        wait = self.asks.take(token.name, prompts, token.asks_per_minute)
        if wait:
            words = "too many prompts in a minute (--asks-per-minute, or the limit of the token)"
            raise Refusal(429, "too_many_asks", words, retry_after=wait)

    def limit_deletions(self, token: Token, pseudonyms: Sequence[str]) -> None:
        """Refuse a flood of deletions (429): with everything affected, nothing is certified."""
        wait = self.filings.take(token.name, len(pseudonyms), token.deletions_per_hour)
        if not wait:
            wait = max(self.subjects.take(pseudonym) for pseudonym in pseudonyms)
        if wait:
            words = "too many deletions were asked for"
            raise Refusal(429, "too_many_deletions", words, retry_after=wait)

    def record(self, kind: str, **told: Any) -> None:
        """A line in the audit log.

        Raises:
            Refusal: it cannot be written; what it tells of may not leave.
        """
        try:
            self.audit.write(kind, **told)
        except OSError:
            raise Refusal(
                503,
                "no_audit",
                "the server cannot write its audit log, and answers nothing without it",
                retry_after=30,
            ) from None

    def stop_waiting(self) -> None:
        """Everybody who still waits is told that the server stops."""
        self.stopping.set()
