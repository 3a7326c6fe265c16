"""What every handler begins with: the service, and a token with the right that is needed."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from llm_unlearn.serving.http.auth import ASK, DELETE, OPERATE, Token
from llm_unlearn.serving.http.refusals import Refusal
from llm_unlearn.serving.http.schemas import ErrorAnswer
from llm_unlearn.serving.http.service import Service

bearer = HTTPBearer(auto_error=False, description="A token of `llm-unlearn token add`.")


def service_of(request: Request) -> Service:
    return request.app.state.service


def _needs(*rights: str) -> Callable[..., Awaitable[Token]]:
    async def holder(
        request: Request,
        sent: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> Token:
        token = service_of(request).holder(sent.credentials if sent else None)
        if not any(token.may(right) for right in rights):
            words = f"the token has not the right {' or '.join(map(repr, rights))}"
            raise Refusal(403, "no_right", words)
        return token

    return holder


TheService = Annotated[Service, Depends(service_of)]
MayAsk = Annotated[Token, Depends(_needs(ASK))]
MayDelete = Annotated[Token, Depends(_needs(DELETE))]
MayFollow = Annotated[Token, Depends(_needs(DELETE, OPERATE))]
MayOperate = Annotated[Token, Depends(_needs(OPERATE))]


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Descriptions of the errors that an address answers with."""
    words = {
        400: "The request is not as described, or can never be answered.",
        401: "No token, or one that is not known.",
        403: "The token may not do this.",
        404: "There is no such thing, or the token may not see it.",
        408: "The body took too long to come.",
        409: "It contradicts something that was asked for before.",
        413: "The body is too long.",
        429: "Too much at once; `Retry-After` says when to try again.",
        503: "Not now; `Retry-After` says when to try again.",
        504: "No answer in time.",
    }
    common = {400, 401, 403, 503, *statuses}
    return {
        status: {"description": words[status], "model": ErrorAnswer} for status in sorted(common)
    }


ASKING = refused(404, 408, 413, 429, 504)
STREAMING: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, in chunks as server-sent events.",
        "content": {"text/event-stream": {}},
    },
    **ASKING,
}
