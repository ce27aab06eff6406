"""OpenAI's API for chat, with an adapter as the model: ``/v1/chat/completions`` and ``/v1/models``. Lesson 09.

So the programs that speak this API work with the course's server, too, once they are told its address. What it takes:
``model`` (an adapter's name, or ``base``), ``messages`` with text of system, user and assistant, ``max_tokens`` or
``max_completion_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``, ``stream`` and ``stream_options``.
A temperature that is not given is 0, so that the same request has the same answer; OpenAI's is 1. Every other field is
refused, unless it asks for what happens anyway (``n`` of 1, no ``tools``): nothing is silently ignored.

The chat template of the model's tokenizer turns the messages into a prompt. A base without one, as ``tiny``, takes a
single message of the user and goes on with it as it stands.
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as AnyHTTPException

from lora_edu.serving.connection import Refused, begin, whole
from lora_edu.serving.decoding import Request
from lora_edu.serving.engine import Engine
from lora_edu.serving.mixed import BASE

BASE_MODEL = "base"  # what the pretrained model is called here
# Fields that this server lacks, with the value that asks for nothing: some programs always send them.
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}


class Strict(BaseModel):
    """No field that is not listed, and no text where a number is expected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Strict):
    """One turn of the conversation; text only."""

    role: Literal["system", "user", "assistant"]
    content: str


class StreamOptions(Strict):
    """Whether the last event of a stream says how many tokens there were."""

    include_usage: bool = False


class ChatQuestion(Strict):
    """The body of a request to ``/v1/chat/completions``."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def without_what_asks_for_nothing(cls, given: Any) -> Any:
        """Leave out ``null`` and neutral values, and put a single stop text into a list."""
        if not isinstance(given, dict):
            return given
        kept = {name: value for name, value in given.items() if value is not None}
        kept = {name: value for name, value in kept.items() if name not in NEUTRAL or value != NEUTRAL[name]}
        return kept | ({"stop": [kept["stop"]]} if isinstance(kept.get("stop"), str) else {})

    def answer_length(self) -> int | None:
        """The limit under either of its two names.

        Raises:
            Refused: both are given, and differ.
        """
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise Refused(
                400, "max_tokens and max_completion_tokens are two names of one limit: send one", "max_tokens"
            )
        return next(iter(given), None)


def prompt_of(messages: list[Message], tokenizer: Any) -> str:
    """The conversation as the model should see it, up to where its answer begins.

    Raises:
        Refused: the template does not take these messages, or there is none and they are more than one question.
    """
    if not tokenizer.chat_template:
        if [message.role for message in messages] != ["user"]:
            words = "this base has no chat template: send a single message, the user's; it is continued as it stands"
            raise Refused(400, words, "messages")
        return messages[0].content
    try:
        turns = [message.model_dump() for message in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise Refused(400, f"the chat template of this model refuses the messages: {error}", "messages") from None


class Reply:
    """What is sent back for one request, in OpenAI's shapes, whole or as the events of a stream."""

    def __init__(self, question: ChatQuestion, request: Request):
        self.question, self.request = question, request
        self.head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": question.model}

    def usage(self) -> dict[str, int]:
        """How many tokens were read and written; the end of an answer is a token, too."""
        read, written = self.request.prompt_tokens, len(self.request.tokens)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def completion(self, text: str) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": self.request.finish_reason,
        }
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": self.usage()}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        """One event of a stream: what is new."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(self.head | {"object": "chat.completion.chunk", "choices": [choice]})

    async def events(self, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        """The events of a stream; an error in the middle is an event, since the status has been sent already."""
        try:
            yield self.chunk({"role": "assistant", "content": ""})
            async for piece in pieces:
                yield self.chunk({"content": piece})
        except HTTPException as error:
            yield event(error_body(error))
            return
        yield self.chunk({}, self.request.finish_reason)
        if self.question.stream_options.include_usage:
            yield event(self.head | {"object": "chat.completion.chunk", "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def error_body(error: AnyHTTPException) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status_code == 429 else kind
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


def explained(error: RequestValidationError) -> Refused:
    """The first thing that is wrong with a body, as an error that names the field and says what is expected there."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid" or not param:
        return Refused(400, "the body is no JSON object; send one, with the header content-type: application/json")
    if first["type"] == "extra_forbidden":
        known = f"only {json.dumps(NEUTRAL[param])} here" if param in NEUTRAL else ", ".join(ChatQuestion.model_fields)
        return Refused(400, f"{param} is not supported: this server takes {known}", param, "unsupported")
    return Refused(400, f"{param}: {first['msg']}", param)


def create_api(engine: Engine, timeout: float) -> FastAPI:
    """The application to be mounted at ``/v1``; its errors have OpenAI's shape.

    Args:
        engine: answers.
        timeout: seconds that a request may take, waiting included.

    Raises:
        ValueError: an adapter has the name of the base.
    """
    if BASE_MODEL in engine.adapters:
        raise ValueError(f"an adapter is called {BASE_MODEL!r}, as is the pretrained model: load it by another name")
    models = {BASE_MODEL if name == BASE else name: name for name in engine.adapters}
    started = int(time.time())
    api = FastAPI(title="lora-edu: OpenAI's API for chat")

    @api.exception_handler(AnyHTTPException)
    async def refused(http: HTTPRequest, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse(error_body(error), error.status_code, getattr(error, "headers", None))

    @api.exception_handler(RequestValidationError)
    async def invalid(http: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        return await refused(http, explained(error))

    @api.exception_handler(Exception)
    async def failed(http: HTTPRequest, error: Exception) -> JSONResponse:
        words = f"the server failed at this request: {type(error).__name__}"
        return await refused(http, Refused(500, words, headers={"Connection": "close"}))  # as uvicorn will do

    @api.get("/models")
    async def list_models() -> dict[str, Any]:
        shared = {"object": "model", "created": started, "owned_by": "lora-edu"}
        return {"object": "list", "data": [{"id": name} | shared for name in models]}

    @api.post("/chat/completions")
    async def complete(question: ChatQuestion, http: HTTPRequest) -> Any:
        if question.model not in models:
            words = f"no model named {question.model!r}; this server has: {', '.join(models)}"
            raise Refused(404, words, "model", "model_not_found")
        request = Request(
            prompt_of(question.messages, engine.tokenizer),
            models[question.model],
            question.answer_length(),
            question.temperature,
            question.top_p,
            question.seed,
            tuple(question.stop),
        )
        reply, pieces = Reply(question, request), begin(engine, request, timeout, invalid=400)
        if question.stream:
            return StreamingResponse(reply.events(pieces), media_type="text/event-stream")
        return reply.completion(await whole(http, pieces))

    return api
