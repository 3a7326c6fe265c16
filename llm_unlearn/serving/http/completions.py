"""`/v1/completions`, as OpenAI's."""

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llm_unlearn.serving.http.access import STREAMING, MayAsk, TheService
from llm_unlearn.serving.http.answering import (
    DEFAULT_TOKENS,
    Prompt,
    make_asked,
    respond,
)
from llm_unlearn.serving.http.asking import ask
from llm_unlearn.serving.http.schemas import Completion, CompletionRequest
from llm_unlearn.serving.http.streaming import Stream, stream

router = APIRouter(tags=["asking"])


@router.post("/v1/completions", response_model=Completion, responses=STREAMING)
async def complete(
    body: CompletionRequest, request: Request, service: TheService, token: MayAsk
) -> Response:
    """Go on with a text, or with several. With `stream` the answer comes as server-sent events."""
    arrived = time.monotonic()
    prompts = [Prompt(text) for text in body.prompts()]
    asked = make_asked(service, token, body, prompts, "cmpl-", body.max_tokens or DEFAULT_TOKENS)
    if body.stream:
        made = Stream(
            service, asked, "text_completion", None, lambda text: {"text": text},
            lambda refusal: {"text": ""} | ({"refusal": refusal} if refusal else {}), body.has_usage,
        )  # fmt: skip
        return await stream(service, request, made, arrived)
    answers = await ask(service, request, asked.queries, arrived)
    return respond(service, asked, answers, Completion, lambda answer: {"text": answer.text})
