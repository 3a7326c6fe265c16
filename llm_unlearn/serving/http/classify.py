"""`/v1/classify`: the shards vote on labels."""

import secrets
import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llm_unlearn.serving.http.access import ASKING, MayAsk, TheService
from llm_unlearn.serving.http.answering import (
    Prompt,
    choose_adapter,
    headers_of,
    refusal_of,
    unlearning_of,
    usage_of,
)
from llm_unlearn.serving.http.asking import ask
from llm_unlearn.serving.http.chat import prompt_of
from llm_unlearn.serving.http.schemas import Classification, ClassifyRequest
from llm_unlearn.serving.queries import Query

router = APIRouter(tags=["asking"])


@router.post("/v1/classify", response_model=Classification, responses=ASKING)
async def classify(
    body: ClassifyRequest, request: Request, service: TheService, token: MayAsk
) -> Response:
    """Choose one of the labels. A label that the policy withholds is null, and `unlearning` says why."""
    arrived = time.monotonic()
    prompt = await prompt_of(service, body.messages) if body.messages else Prompt(body.prompt)
    adapter = choose_adapter(service, body.model)
    service.limit_asks(token, 1)
    query = Query(
        id=f"classify-{secrets.token_hex(12)}",
        prompt=prompt.text,
        asked=prompt.asked,
        labels=tuple(body.labels),
        adapter=adapter,
    )
    (answer,) = await ask(service, request, [query], arrived)
    unlearning = unlearning_of(service, answer)
    result = Classification(
        id=query.id,
        created=int(time.time()),
        model=body.model or service.settings.name,
        label=None if refusal_of(answer) else answer.text,
        usage=usage_of([answer]),
        unlearning=unlearning,
    )
    if unlearning is not None:
        result.tally = dict(zip(body.labels, answer.tally, strict=False)) or None
        result.is_certified = answer.served in ("certified", "executed")
    return JSONResponse(result.model_dump(), headers=headers_of(service, answer))
