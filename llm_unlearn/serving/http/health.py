"""`/healthz`, `/readyz`, `/metrics`, and `/v1/residue` for whoever operates the server."""

from dataclasses import asdict
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from llm_unlearn.serving.http.access import MayOperate, TheService, refused
from llm_unlearn.serving.http.metrics import CONTENT_TYPE
from llm_unlearn.serving.http.schemas import Health

router = APIRouter(tags=["operating"])


@router.get("/healthz")
async def healthz() -> Health:
    """The process is alive."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Health, "description": "Not yet, or no more."}})
async def readyz(service: TheService) -> Response:
    """Whether queries are answered: not while the model is loaded, nor while the server stops."""
    status = service.readiness
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **refused()},
)
async def metrics(service: TheService, token: MayOperate) -> Response:
    """Numbers for Prometheus."""
    return Response(await run_sync(service.metrics.text), media_type=CONTENT_TYPE)


@router.get("/v1/residue", responses=refused())
async def residue(service: TheService, token: MayOperate) -> dict[str, Any]:
    """Everything in memory that was made of records: adapters with their nodes, and digests of their
    tensors as they are now. For `llm-unlearn probe`."""
    engine = service.engine
    state, digests = await run_sync(lambda: (engine.state(), engine.digests_in_memory()))
    return {
        **asdict(state),
        "memory": digests,
        # Prompts are read anew under every adapter; nothing is kept from one query to the next.
        "prefix_caches": [],
    }
