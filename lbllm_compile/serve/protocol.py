"""The OpenAI API's requests and answers as this server knows them.

What a request may ask for and this server does not do is refused by name, never ignored, unless it is asked for in a
way that changes nothing (``n`` = 1, penalties of 0).
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lbllm_compile.native.generate import Sampling, TextStream
from lbllm_compile.native.language import LanguageModel, TemplateError, encode, encode_turns, has_chat_template
from lbllm_compile.serve.engine import Finished, Request, Token

MOST_LOGPROBS = 20
"""Likeliest tokens that may be asked for beside each token."""

MOST_STOPS = 4
"""Stop strings of a request, as in the API."""

UNBOUNDED_TOKENS = 4096
"""Tokens of an answer at most, where neither the server nor the model's context bounds them."""

_NOTES = ("user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier")
"""Fields that say something of a request and change no answer."""

_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields of the API that are not supported, and the values that ask for nothing."""


class RequestError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        body: the error as the OpenAI API gives it.
        headers: beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        where = None if param is None else _encodable(param)
        self.body = {"error": {"message": _encodable(message), "type": kind, "param": where, "code": code}}


def _encodable(text: str) -> str:
    """A text in which halves of surrogate pairs, which JSON can name but UTF-8 cannot, are question marks."""
    return text.encode("utf-8", "replace").decode()


class _Fields(BaseModel):
    """What requests of both kinds have. Other fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: None = None
    refusal: None = None

    def turn(self) -> dict[str, str]:
        """As chat templates take it; their name for a developer is system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _ChatFields(_Fields):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class _CompletionFields(_Fields):
    prompt: str | list[str] | list[int]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        model: the model.
        name: under which clients know it.
        most_tokens: of an answer; None for what the context holds.
        seconds: in which a request must be answered.
        created: when it was loaded, in seconds since 1970.
        fingerprint: of what decides an answer besides the request.
    """

    model: LanguageModel
    name: str
    most_tokens: int | None
    seconds: float
    created: int
    fingerprint: str


class Answer(ABC):
    """A request and the form of its answers.

    Attributes:
        request: for the engine.
        stream: whether pieces are wanted as they come.
        usage: whether the stream is to end with the number of tokens.
    """

    kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, served: Served, fields: _Fields, prompt: Sequence[int], most: int | None, logprobs: int | None):
        self.stream = bool(fields.stream)
        options = fields.stream_options or {}
        if options and not self.stream:
            raise RequestError(400, "stream_options are for streams; set stream", param="stream_options")
        if unknown := set(options) - {"include_usage", "include_obfuscation"}:
            raise RequestError(400, f"there is no stream option {min(unknown)}", param="stream_options")
        self.usage = bool(options.get("include_usage"))
        stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        if len(stop) > MOST_STOPS:
            raise RequestError(400, f"{len(stop)} stop strings were given; use at most {MOST_STOPS}", param="stop")
        self.request = Request(
            tuple(prompt), _sampling(served, fields, prompt, most), tuple(stop), logprobs, served.seconds
        )
        self._served, self._begun = served, int(time.time())
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"

    def _head(self, kind: str) -> dict[str, Any]:
        served = self._served
        return {
            "id": self._id,
            "object": kind,
            "created": self._begun,
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    def _text(self, token: int) -> str:
        return self._served.model.tokenizer.decode([token])

    @abstractmethod
    def whole(self, text: str, tokens: Sequence[Token], end: Finished) -> dict[str, Any]:
        """The answer at once."""

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""

    @abstractmethod
    def chunk(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A piece of a stream."""

    @abstractmethod
    def closing(self, end: Finished) -> list[dict[str, Any]]:
        """What a stream ends with."""


class ChatAnswer(Answer):
    """An answer of ``/v1/chat/completions``."""

    kind, prefix = "chat.completion", "chatcmpl"

    @classmethod
    def parse(cls, served: Served, document: Any) -> ChatAnswer:
        """Reads a request.

        Raises:
            RequestError: it is malformed, asks for what is not there, or the template refuses the turns.
            GenerationError: a turn is not valid text.
        """
        fields = _read(_ChatFields, served, document)
        if not has_chat_template(served.model.tokenizer):
            raise RequestError(400, "the model has no chat template; use /v1/completions", param="messages")
        if fields.top_logprobs and not fields.logprobs:
            raise RequestError(400, "top_logprobs are given with logprobs; set those too", param="top_logprobs")
        most = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
        try:
            prompt = encode_turns(served.model.tokenizer, [message.turn() for message in fields.messages])
        except TemplateError as error:
            raise RequestError(400, f"{error} (/v1/completions)", param="messages") from error
        return cls(served, fields, prompt, most, (fields.top_logprobs or 0) if fields.logprobs else None)

    def whole(self, text: str, tokens: Sequence[Token], end: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": end.reason}
        return {**self._head(self.kind), "choices": [choice], "usage": _usage(end)}

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""}, None, None)]

    def chunk(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._chunk({"content": text}, self._logprobs(tokens), None)

    def closing(self, end: Finished) -> list[dict[str, Any]]:
        last = [self._chunk({}, None, end.reason)]
        return last + ([{**self._head(f"{self.kind}.chunk"), "choices": [], "usage": _usage(end)}] * self.usage)

    def _chunk(self, delta: Mapping[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head(f"{self.kind}.chunk"), "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._text(token)
            # Where a token is part of a character only, its bytes are not known.
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        content = [
            {**entry(t.id, t.logprob), "top_logprobs": [entry(*likely) for likely in t.likeliest]} for t in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    """An answer of ``/v1/completions``."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, served: Served, fields: _Fields, prompt: Sequence[int], most: int | None, logprobs: int | None):
        super().__init__(served, fields, prompt, most, logprobs)
        self._decoded, self._offset = TextStream(served.model.decode), 0

    @classmethod
    def parse(cls, served: Served, document: Any) -> CompletionAnswer:
        """As :meth:`ChatAnswer.parse`."""
        fields = _read(_CompletionFields, served, document)
        prompt = fields.prompt
        if isinstance(prompt, list) and any(isinstance(part, str) for part in prompt):
            if len(prompt) != 1:
                raise RequestError(400, f"{len(prompt)} prompts were given; send one a request", param="prompt")
            prompt = prompt[0]
        ids = encode(served.model.tokenizer, prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        return cls(served, fields, ids, fields.max_tokens, fields.logprobs)

    def whole(self, text: str, tokens: Sequence[Token], end: Finished) -> dict[str, Any]:
        return {**self._chunk(text, tokens, end.reason), "usage": _usage(end)}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunk(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._chunk(text, tokens, None)

    def closing(self, end: Finished) -> list[dict[str, Any]]:
        return [self._chunk("", [], end.reason)] + (
            [{**self._head(self.kind), "choices": [], "usage": _usage(end)}] * self.usage
        )

    def _chunk(self, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}
        return {**self._head(self.kind), "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.request.logprobs is None or not tokens:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoded.push(token.id))
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": offsets,
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        """By their texts; of tokens with one text, such as parts of characters, the likeliest."""
        found: dict[str, float] = {}
        for likely, logprob in token.likeliest:
            found.setdefault(self._text(likely), logprob)
        return found


PARSERS: Mapping[str, Callable[[Served, Any], Answer]] = {
    "/v1/chat/completions": ChatAnswer.parse,
    "/v1/completions": CompletionAnswer.parse,
}
"""What reads the requests of each address."""


def _read(kind: Any, served: Served, document: Any) -> Any:
    """The fields of a request.

    Raises:
        RequestError: naming the first field that is wrong.
    """
    if not isinstance(document, dict):
        raise RequestError(400, "the request must be a JSON object")
    given = {name: value for name, value in document.items() if name not in _NOTES and value is not None}
    for name, allowed in _NEUTRAL.items():
        if name in given and not any(given[name] == value for value in allowed):
            raise RequestError(
                400,
                f"{name} = {json.dumps(given[name])[:80]} is not supported; leave it out",
                code="unsupported_parameter",
                param=name,
            )
        given.pop(name, None)
    try:
        fields = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RequestError(
                400, f"there is no parameter {where} here; leave it out", code="unknown_parameter", param=where
            ) from error
        message = f"{where or 'the request'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise RequestError(400, message, code="invalid_value", param=where) from error
    if fields.model != served.name:
        raise RequestError(
            404,
            f"there is no model {fields.model!r}; this server has {served.name!r}",
            code="model_not_found",
            param="model",
        )
    return fields


def _sampling(served: Served, fields: _Fields, prompt: Sequence[int], asked: int | None) -> Sampling:
    """How tokens are chosen. Without a seed, one is drawn."""
    limit, most = served.model.context_length, served.most_tokens
    if most is None and limit is None:
        most = UNBOUNDED_TOKENS
    if asked is not None and most is not None and asked > most:
        raise RequestError(400, f"{asked} tokens were asked for; this server gives at most {most}", param="max_tokens")
    room = None if limit is None else limit - len(prompt)
    if room is not None and (room < 1 or (asked is not None and asked > room)):
        raise RequestError(
            400,
            f"the model's context holds {limit} tokens, and the prompt has {len(prompt)}"
            + (f" and {asked} more were asked for" if asked is not None else "")
            + "; shorten one of them",
            code="context_length_exceeded",
            param="messages" if isinstance(fields, _ChatFields) else "prompt",
        )
    return Sampling(
        max_new_tokens=asked or min(bound for bound in (room, most) if bound is not None),
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=fields.top_k or 0,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        seed=secrets.randbits(32) if fields.seed is None else fields.seed % (1 << 64),
    )


def _usage(end: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt_tokens + end.tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }
