"""What is said instead of an answer: errors in OpenAI's shape, one sentence each, never a traceback."""

import asyncio
import logging
import re
import traceback
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_unlearn.errors import RunError

log = logging.getLogger("llm_unlearn.serving")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
CLIENT_GONE = 499
STOPS = "the server is stopping: ask another"
UNFORESEEN = "something went wrong on the server; its log names the place"
LOGGED = "llm_unlearn.logged"
MOST_NAMED = 5  # fields that are wrong
PLACES = ("body", "query", "header", "path")
BRANCH = re.compile(r"constrained-str|[a-z-]+\[.*\]")  # pydantic's names of a field's types
WORDS = {
    "extra_forbidden": "this server does not know the field, and does nothing with it",
    "none_required": "this server supports only null",
    "json_invalid": "not JSON",
    "model_attributes_type": "expected a JSON object, with Content-Type: application/json",
    "date": "expected text in ISO 8601, such as 2026-12-31",
}


class Refusal(HTTPException):
    """No answer, and why; sent as `{"error": {"message", "type", "code", "param"}}`.

    Attributes:
        code: a word for programs.
        retry_after: seconds, where trying again helps.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ):
        headers = dict(headers or {})
        if retry_after is not None:
            headers["Retry-After"] = str(max(1, round(retry_after + 0.5)))
        super().__init__(status, message, headers or None)
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.code, self.detail, self.param)


class ClientGone(Refusal):
    """Whoever asked does not wait any more."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "client_gone", "the client closed the connection")


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    told = {"message": message, "type": TYPES.get(status, "server_error")}
    return {"error": told | {"code": code, "param": param}}


async def answer_refusal(request: Request, refusal: Exception) -> Response:
    """An exception handler for what the router and the handlers refuse."""
    assert isinstance(refusal, HTTPException)
    request.app.state.service.metrics.rejected.labels(refusal_code(refusal)).inc()
    if isinstance(refusal, Refusal):
        body = refusal.body()
    else:
        body = error_body(refusal.status_code, refusal_code(refusal), str(refusal.detail))
    headers = dict(refusal.headers or {})
    if refusal.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return JSONResponse(body, refusal.status_code, headers)


def _methods(request: Request) -> set[str]:
    """What an address takes; Starlette names the methods of one of its routes only."""
    found: set[str] = set()
    for path, operations in request.app.openapi()["paths"].items():
        if compile_path(path)[0].match(request.scope["path"]):
            found |= {method.upper() for method in operations}
    return found


def refusal_code(refusal: HTTPException) -> str:
    if isinstance(refusal, Refusal):
        return refusal.code
    return {404: "no_such_address", 405: "method_not_allowed"}.get(
        refusal.status_code, "invalid_request"
    )


async def answer_invalid(request: Request, error: Exception) -> Response:
    """An exception handler for requests that are not as described. What was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    request.app.state.service.metrics.rejected.labels("invalid_request").inc()
    wrong = error.errors()
    message, first = describe(wrong), _place(wrong[0]) if wrong else None
    return JSONResponse(error_body(400, "invalid_request", message, first), 400)


def describe(wrong: Sequence[Any]) -> str:
    """What is wrong with which fields, without what they held."""
    told = []
    for entry in wrong[:MOST_NAMED]:
        told.append(f"{_place(entry) or 'body'}: {_words(entry)}")
    more = f"; and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    return "; ".join(dict.fromkeys(told)) + more


def _words(entry: Any) -> str:
    kind = str(entry["type"])
    if kind == "literal_error":
        return f"this server supports only {entry['ctx']['expected']}"
    if kind.startswith(("date_", "datetime_")):
        return WORDS["date"]
    if kind == "model_attributes_type" and _place(entry) is not None:
        return "expected an object"
    return WORDS.get(kind, str(entry["msg"]).removeprefix("Value error, "))


def _place(entry: Any) -> str | None:
    """The path of a field; names that were made up by whoever asks are cut."""
    if entry["type"] == "json_invalid":
        return None
    parts = [str(part)[:60] for part in entry["loc"] if part not in PLACES]
    own = (part for part in parts if part.isprintable() and not BRANCH.fullmatch(part))
    return ".".join(own)[:200] or None


async def answer_unusable(request: Request, error: Exception) -> Response:
    """An exception handler for a run, or a ledger, that cannot be read or changed now."""
    assert isinstance(error, RunError)
    log.warning("%s", error)  # names files and servers, and nobody
    words = "the run cannot be read now: try again"
    return await answer_refusal(request, Refusal(503, "run_busy", words, retry_after=5.0))


async def answer_unforeseen(request: Request, error: Exception) -> Response:
    """An exception handler for mistakes of ours."""
    _log(error)
    request.scope[LOGGED] = True
    request.app.state.service.metrics.rejected.labels("internal_error").inc()
    return JSONResponse(error_body(500, "internal_error", UNFORESEEN), 500)


def _log(error: Exception) -> None:
    """The place in the code, and not the message, which may hold what somebody wrote."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    log.error("%s in %s:%s", type(error).__name__, place.filename, place.lineno)


class LastResort:
    """The outermost layer: what nobody foresaw becomes one sentence, and one line in the log."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            if LOGGED not in scope:
                _log(error)
            if not has_begun:
                body = error_body(500, "internal_error", UNFORESEEN)
                await JSONResponse(body, 500)(scope, receive, send)
        except asyncio.CancelledError:
            # The server ends, and this client did not read in time; uvicorn would print a traceback.
            log.warning("a client that does not read was given up")
