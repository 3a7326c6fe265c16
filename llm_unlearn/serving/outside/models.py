"""Models of a server that speaks the OpenAI API: which it lists, and whether one answers."""

from typing import Any

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.serving.outside.http_client import Reply, Server


def ensure_allowed(reply: Reply, server: Server) -> Reply:
    """
    Raises:
        UserError: the server wants another token.
    """
    if reply.status in (401, 403):
        raise UserError(
            f"{server.url} does not allow that ({reply.message}): give a token that may, by --token_file or "
            "LLM_UNLEARN_TOKEN"
        )
    return reply


def served_models(server: Server) -> list[dict[str, Any]]:
    """What `/v1/models` lists: `id` of each, `parent` and `root` of an adapter.

    Raises:
        RunError: it does not answer as the OpenAI API does.
    """
    reply = ensure_allowed(server.get("/v1/models"), server)
    if reply.status != 200:
        raise RunError(f"{server.url}/v1/models cannot be asked: {reply.message}")
    try:
        return [{**card, "id": _short(card["id"])} for card in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"{server.url}/v1/models answers in another form than the OpenAI API"
        ) from None


def _short(name: Any) -> str:
    if not isinstance(name, str) or len(name) > 1000:
        raise TypeError("expected the name of a model")
    return "".join(c for c in name if c.isprintable())


def answers_to(server: Server, name: str) -> bool | None:
    """Does a model of that name answer? None where that is not known."""
    body = {"model": name, "prompt": "a", "max_tokens": 1, "temperature": 0}
    try:
        status = server.post("/v1/completions", body).status
    except RunError:
        return None
    return {200: True, 404: False}.get(status)
