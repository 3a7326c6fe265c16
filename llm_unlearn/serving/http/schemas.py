"""What may be sent and what is answered, as OpenAPI describes it.

A field of OpenAI's that is not supported may be sent with the value that changes nothing; any other
value is refused, and so is a field that is not known: nothing is ignored in silence.
"""

from datetime import date, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

MOST_CHARACTERS = 1_000_000
MOST_PROMPTS = 64
MOST_CHOICES = 16
MOST_LABELS = 256
MOST_MESSAGES = 1_000
MOST_SUBJECTS = 1_000
MOST_TOKENS = 1_000_000


def _text_only(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("expected text in ISO 8601, such as 2026-12-31")
    return value


def _whole(value: object) -> object:
    """JSON knows one kind of number: 5.0 is 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


StrictBool = Annotated[bool, Strict()]
Whole = BeforeValidator(_whole)  # after the bounds, or the description has none
StrictFloat = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Label = Annotated[str, Field(min_length=1, max_length=1_000)]
ModelName = Annotated[
    str, Field(min_length=1, max_length=300, description="The ensemble's name, or one adapter's.")
]
Name = Annotated[str, Field(min_length=1, max_length=10_000)]
Moment = (
    Annotated[date, BeforeValidator(_text_only)] | Annotated[datetime, BeforeValidator(_text_only)]
)
Nothing = Annotated[list[None], Field(max_length=0)]


class Sent(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Sent):
    include_usage: StrictBool = False
    include_obfuscation: Literal[False] = False


class Generation(Sent):
    """What completions and conversations share."""

    model: ModelName
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=MOST_TOKENS), Whole] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Strict(), Whole] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES), Whole] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: (
        Annotated[StrictBool, Field(description="As vLLM's: go on until max_tokens.")] | None
    ) = None
    user: Annotated[str, Field(max_length=1_000, description="Ignored.")] | None = None
    # Not supported: only what changes nothing.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Generation):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TextPart(Sent):
    type: Literal["text"]
    text: Annotated[str, Field(max_length=MOST_CHARACTERS)]


class ChatMessage(Sent):
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[str, Field(max_length=MOST_CHARACTERS)]
        | Annotated[list[TextPart], Field(min_length=1, max_length=100)]
    )
    name: Annotated[str, Field(max_length=200, description="Ignored.")] | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class ChatRequest(Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: (
        Annotated[int, Field(strict=True, ge=1, le=MOST_TOKENS), Whole] | None
    ) = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None


_EITHER: dict[str, Any] = {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}


class ClassifyRequest(Sent):
    model_config = ConfigDict(extra="forbid", json_schema_extra=_EITHER)

    model: ModelName | None = None
    prompt: Text = ""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)] = []
    labels: Annotated[
        list[Label],
        Field(min_length=2, max_length=MOST_LABELS, json_schema_extra={"uniqueItems": True}),
    ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("give either `prompt` or `messages`")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("`labels` has one twice")
        return self


class DeletionRequest(Sent):
    subjects: Annotated[
        list[Name],
        Field(
            min_length=1,
            max_length=MOST_SUBJECTS,
            description="Whose records go, spelled as in the run. Text that is sent is never unlearned.",
        ),
    ]
    reason: (
        Annotated[
            str,
            Field(
                max_length=200, description="Nobody's name. What is not printable becomes a space."
            ),
        ]
        | None
    ) = None
    deadline: Moment | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    near_duplicates: Literal["warn", "refuse", "take", "ignore"] | None = None
    with_duplicates: StrictBool = False


class Unlearning(BaseModel):
    """How an answer was served; absent where the server is told to say nothing of it."""

    served: Literal["certified", "clean", "executed", "refused", "unsafe"]
    epoch: int
    affected: int
    certified_tokens: int
    finish: Literal["stop", "length", "withdrawn", "uncertified"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: None = None
    unlearning: Unlearning | None = None


class CompletionChoice(Choice):
    text: str


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class ChatChoice(Choice):
    message: AnswerMessage


class Answered(BaseModel):
    """What all answers say."""

    id: str
    created: int
    model: str
    usage: Usage
    unlearning: Unlearning | None = None


class Completion(Answered):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatCompletion(Answered):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Classification(Answered):
    """`label` is None where the policy refuses to answer."""

    object: Literal["classification"] = "classification"
    label: str | None
    tally: dict[str, int] | None = None
    is_certified: bool | None = None


class ServedModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llm-unlearn"


class ServedModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[ServedModel]


State = Literal["acknowledged", "not served", "erased"]


class DeletionStatus(BaseModel):
    """One request of the ledger.

    `acknowledged`: on disk. `not served`: no running server of the run answers with it any more.
    `erased`: and its files are gone. `epoch`: entries of the ledger now; an answer with at least
    the epoch of the acknowledgement began after it.
    """

    id: str
    object: Literal["deletion"] = "deletion"
    kind: Literal["delete", "correct"]
    state: State
    epoch: int
    acknowledged_at: float | None
    finished_at: float | None
    deadline: float | None
    reason: str | None
    certificate: str | None = Field(description="Path of the certificate, once there is one.")


class Deletions(BaseModel):
    object: Literal["list"] = "list"
    data: list[DeletionStatus]
    has_more: bool


class DeletionFiled(BaseModel):
    """What became of a deletion that was asked for.

    `already_deleted`: how many of the subjects had been deleted before. Were it all of them, `id` is
    that of the request that deleted the first. `copies_elsewhere`, `near_duplicates`: what others hold;
    None for a token that may not delete everybody.
    """

    id: str
    object: Literal["deletion"] = "deletion"
    state: State
    epoch: int
    is_new: bool
    subjects: int
    records: int
    already_deleted: int
    copies_elsewhere: int | None
    near_duplicates: int | None
    core_records: int
    certificate: str | None


class ErrorDetails(BaseModel):
    message: str
    type: str
    code: str
    param: str | None = None


class ErrorAnswer(BaseModel):
    error: ErrorDetails


class Health(BaseModel):
    status: Literal["ok", "ready", "loading", "draining", "not ready"]
