"""`/v1/models`: the ensemble, and every adapter under a name that holds its digest."""

from fastapi import APIRouter

from llm_unlearn.serving.http.access import MayAsk, TheService, refused
from llm_unlearn.serving.http.answering import adapters
from llm_unlearn.serving.http.refusals import Refusal
from llm_unlearn.serving.http.schemas import ServedModel, ServedModels
from llm_unlearn.serving.http.service import Service

router = APIRouter(tags=["asking"])


def _names(service: Service) -> list[str]:
    return list(dict.fromkeys([service.settings.name, *adapters(service)]))


@router.get("/v1/models", responses=refused())
async def list_models(service: TheService, token: MayAsk) -> ServedModels:
    """Everything that can be asked. An adapter that loses a block gets another name."""
    data = [ServedModel(id=name, created=service.created) for name in _names(service)]
    return ServedModels(data=data)


@router.get("/v1/models/{model:path}", responses=refused(404))
async def show_model(model: str, service: TheService, token: MayAsk) -> ServedModel:
    """One of them."""
    if model not in _names(service):
        words = "there is no such model here: GET /v1/models lists them"
        raise Refusal(404, "model_not_found", words, "model")
    return ServedModel(id=model, created=service.created)
