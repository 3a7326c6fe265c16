"""The HTTP application: its addresses, what stands before them, and their description."""

from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from llm_unlearn.errors import RunError
from llm_unlearn.serving.http import (
    chat,
    classify,
    completions,
    deletion_routes,
    health,
    listing,
)
from llm_unlearn.serving.http.limits import BoundedBodies
from llm_unlearn.serving.http.refusals import (
    LastResort,
    answer_invalid,
    answer_refusal,
    answer_unforeseen,
    answer_unusable,
    error_body,
)
from llm_unlearn.serving.http.service import Service

DESCRIPTION = """Answers from an ensemble of shards while deletions are pending. What is served never saw
deleted data; `unlearning` in an answer says whether it also is what will be answered when every pending
deletion has been executed."""


def make_app(service: Service) -> ASGIApp:
    """The application of one server; `application` without what stands before it is `.app` of it."""
    app = application(service)
    bounded = BoundedBodies(app, service.settings.most_body, service.stopping)
    return LastResort(KnownHosts(bounded, service.settings.allowed_hosts))


def application(service: Service) -> FastAPI:
    """The addresses, without the layers before them."""
    app = FastAPI(
        title="llm-unlearn",
        version="1",
        description=DESCRIPTION,
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for module in (completions, chat, classify, listing, deletion_routes, health):
        app.include_router(module.router)
    app.add_exception_handler(HTTPException, answer_refusal)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(RunError, answer_unusable)
    app.add_exception_handler(Exception, answer_unforeseen)
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        return _without_422(describe())

    app.openapi = openapi
    return app


def _without_422(description: dict[str, Any]) -> dict[str, Any]:
    """What is not as described is answered with 400 here, as by OpenAI."""
    for path in description["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        description["components"]["schemas"].pop(name, None)
    return description


class KnownHosts:
    """Refuses names that a server on this machine does not have, and pages of other places.

    Any page that a browser of this machine shows may send requests to its loopback address, and a
    name of its own may lead there (DNS rebinding).

    Args:
        hosts: as they stand in the Host header, without port; None for any.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None):
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.hosts is None:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        host = headers.get("host", "")
        if not self._is_known(host):
            body = error_body(403, "unknown_host", "the server is not known under this name")
        elif origin is not None and origin.partition("://")[2] != host:
            body = error_body(403, "other_origin", "requests from other pages are not answered")
        else:
            await self.app(scope, receive, send)
            return
        await JSONResponse(body, 403)(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name in (self.hosts or ())
