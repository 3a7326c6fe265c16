"""`/v1/deletions`: file a deletion, follow it, fetch its certificate.

A token deletes and sees its own subjects only. Of anybody else it learns nothing: what it may not
delete is refused before it is looked up, and a request on others is as unknown as one that never was.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Path, Query
from starlette.responses import Response

from llm_unlearn.errors import UserError
from llm_unlearn.exact.asks import Ask, make_ask
from llm_unlearn.exact.ledger import Request
from llm_unlearn.serving.http.access import MayDelete, MayFollow, TheService, refused
from llm_unlearn.serving.http.auth import EVERYBODY, OPERATE, Token
from llm_unlearn.serving.http.refusals import Refusal
from llm_unlearn.serving.http.schemas import (
    DeletionFiled,
    DeletionRequest,
    Deletions,
    DeletionStatus,
)
from llm_unlearn.serving.http.service import Service

router = APIRouter(tags=["deleting"])

DAY_SECONDS = 86_400.0
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]
RequestId = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="Id of a request.")]


@router.post("/v1/deletions", status_code=202, responses=refused(404, 408, 409, 413, 429))
async def file_deletion(
    body: DeletionRequest, service: TheService, token: MayDelete, idempotency_key: Key = None
) -> DeletionFiled:
    """Delete subjects, all or none. The answer comes when the deletion is on disk; every answer that
    begins after that is by what never saw them."""
    subjects = list(dict.fromkeys(body.subjects))
    pseudonyms = service.deletions.pseudonyms(subjects)
    if not token.may_delete(pseudonyms):
        words = "the token may not delete everybody who is named. Nothing was deleted"
        raise Refusal(403, "not_yours", words, "subjects")
    owns_all = EVERYBODY in token.subjects
    near = body.near_duplicates if owns_all else body.near_duplicates or "ignore"
    if not owns_all and (body.with_duplicates or near != "ignore"):
        words = "the token may not delete or count what others hold. Nothing was deleted"
        raise Refusal(403, "not_yours", words, "near_duplicates")
    ask = _ask_of(body, subjects, idempotency_key)
    service.limit_deletions(token, pseudonyms)
    try:
        filed = await run_sync(
            service.deletions.file, ask, near, body.with_duplicates, limiter=service.filing
        )
    finally:
        service.notice()  # it may be acknowledged, and fail afterwards
    status = await _describe(service, filed.request)
    with contextlib.suppress(Refusal):  # the ledger itself is the log of deletions
        service.record("deletion", request=status.id, epoch=status.epoch, is_new=filed.is_new)
    return DeletionFiled(
        id=status.id,
        state=status.state,
        epoch=status.epoch,
        is_new=filed.is_new,
        subjects=filed.deletion.subjects,
        records=filed.deletion.records,
        already_deleted=filed.deletion.already_deleted,
        copies_elsewhere=filed.deletion.copies_elsewhere if owns_all else None,
        near_duplicates=len(filed.deletion.near_duplicates) if owns_all else None,
        core_records=filed.deletion.core_records,
        certificate=status.certificate,
    )


def _ask_of(body: DeletionRequest, subjects: list[str], header: str | None) -> Ask:
    if header is not None and body.idempotency_key not in (None, header):
        words = "two idempotency keys: the header says another than the body. Nothing was deleted"
        raise Refusal(409, "two_keys", words, "idempotency_key")
    reason = body.reason and "".join(c if c.isprintable() else " " for c in body.reason)
    try:
        ask = make_ask(subjects, reason, None, header or body.idempotency_key)
    except UserError as error:
        raise Refusal(409, "reason_names_subject", str(error), "reason") from None
    return ask if body.deadline is None else replace(ask, deadline=_seconds(body.deadline))


def _seconds(moment: date) -> float:
    """Seconds since the epoch: of a moment (UTC without a zone), or of the end of a day in UTC."""
    if isinstance(moment, datetime):
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    begin = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    return begin.timestamp() + DAY_SECONDS


def may_see(service: Service, token: Token, request: Request) -> bool:
    """Every subject that a request names is the token's, or the token sees them all."""
    if token.may(OPERATE) or EVERYBODY in token.subjects:
        return True
    named = [target.pseudonym for target in request.targets if target.kind == "subject"]
    return bool(named) and token.may_delete(named)


async def _describe(service: Service, request: Request) -> DeletionStatus:
    (status,) = await run_sync(_statuses, service, [request])
    return status


def _statuses(service: Service, requests: Sequence[Request]) -> list[DeletionStatus]:
    engine, epoch = service.state(), service.deletions.epoch()
    return [
        DeletionStatus(
            id=request.id,
            kind="correct" if request.kind == "correct" else "delete",
            state=service.deletions.state(request, engine),
            epoch=epoch,
            acknowledged_at=request.acknowledged_at,
            finished_at=request.finished_at,
            deadline=request.deadline,
            reason=request.reason,
            certificate=f"/v1/deletions/{request.id}/certificate" if request.finished_at else None,
        )
        for request in requests
    ]


async def _find(service: Service, token: Token, name: str) -> Request:
    for request in await run_sync(service.deletions.all):
        if request.id == name and may_see(service, token, request):
            return request
    raise Refusal(404, "no_such_deletion", "there is no such deletion that the token may see")


@router.get("/v1/deletions", responses=refused())
async def list_deletions(
    service: TheService,
    token: MayFollow,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most that are listed.")] = 100,
    after: Annotated[
        str | None,
        Query(pattern="^[0-9a-f]{16}$", description="List what came before this one."),
    ] = None,
) -> Deletions:
    """The deletions that the token may see, newest first."""
    known = await run_sync(service.deletions.all)
    seen = [request for request in reversed(known) if may_see(service, token, request)]
    names = [request.id for request in seen]
    start = names.index(after) + 1 if after in names else 0
    data = await run_sync(_statuses, service, seen[start : start + limit])
    return Deletions(data=data, has_more=len(seen) > start + limit)


@router.get("/v1/deletions/{request_id}", responses=refused(404))
async def show_deletion(
    request_id: RequestId, service: TheService, token: MayFollow
) -> DeletionStatus:
    """What became of a deletion."""
    return await _describe(service, await _find(service, token, request_id))


@router.get(
    "/v1/deletions/{request_id}/certificate",
    responses={200: {"content": {"application/json": {}}}, **refused(404)},
    response_class=Response,
)
async def show_certificate(
    request_id: RequestId, service: TheService, token: MayFollow
) -> Response:
    """The signed certificate of a deletion; `llm-unlearn certificate verify` checks it."""
    request = await _find(service, token, request_id)
    data = await run_sync(service.deletions.certificate, request)
    if data is None:
        raise Refusal(404, "no_certificate", "there is no certificate yet")
    return Response(data, media_type="application/json")
