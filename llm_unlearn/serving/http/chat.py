"""`/v1/chat/completions`, as OpenAI's; and how a conversation becomes a prompt."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llm_unlearn.errors import UserError
from llm_unlearn.serving.http.access import STREAMING, MayAsk, TheService
from llm_unlearn.serving.http.answering import (
    DEFAULT_CHAT_TOKENS,
    Prompt,
    make_asked,
    refusal_of,
    respond,
)
from llm_unlearn.serving.http.asking import ask
from llm_unlearn.serving.http.refusals import Refusal
from llm_unlearn.serving.http.schemas import (
    AnswerMessage,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
)
from llm_unlearn.serving.http.service import Service
from llm_unlearn.serving.http.streaming import Stream, stream
from llm_unlearn.serving.queries import Answer

router = APIRouter(tags=["asking"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMING)
async def chat(body: ChatRequest, request: Request, service: TheService, token: MayAsk) -> Response:
    """Answer a conversation. With `stream` the answer comes as server-sent events."""
    arrived = time.monotonic()
    prompt = await prompt_of(service, body.messages)
    most = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS
    asked = make_asked(service, token, body, [prompt], "chatcmpl-", most)
    if body.stream:
        made = Stream(
            service, asked, "chat.completion.chunk", {"delta": {"role": "assistant", "content": ""}},
            lambda text: {"delta": {"content": text}},
            lambda refusal: {"delta": {"refusal": refusal} if refusal else {}}, body.has_usage,
        )  # fmt: skip
        return await stream(service, request, made, arrived)
    answers = await ask(service, request, asked.queries, arrived)
    return respond(service, asked, answers, ChatCompletion, _message)


def _message(answer: Answer) -> dict[str, Any]:
    return {"message": AnswerMessage(content=answer.text, refusal=refusal_of(answer))}


async def prompt_of(service: Service, messages: Sequence[ChatMessage]) -> Prompt:
    """A conversation as the model reads it, and what of it decides who answers.

    Raises:
        Refusal: the model's chat template takes no such conversation.
    """
    opened, plain = service.opened, [message.plain() for message in messages]
    try:
        text = await run_sync(opened.render, plain)
    except UserError as error:
        raise Refusal(400, "invalid_messages", str(error), "messages") from None
    return Prompt(text, opened.asked_in(plain))


class Renderer:
    """Writes conversations down, by the tokenizer's chat template.

    A model without a template reads turns as lines that begin with who speaks, an empty line
    between them, and `assistant:` at the end.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt.

        Raises:
            UserError: the template takes no such conversation.
        """
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            turns = [f"{turn['role']}: {turn['content']}" for turn in messages]
            return "\n\n".join([*turns, "assistant:"])
        try:
            return self.tokenizer.apply_chat_template(
                [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError):
            # The template's own words may repeat what was said, and go into no answer.
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in messages))
            raise UserError(
                f"the model's chat template takes no such conversation (roles: {roles}); most want "
                "user and assistant to take turns"
            ) from None
