"""The HTTP surface: an ASGI application with the OpenAI API, ``/health`` and ``/metrics``."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.serve.engine import (
    BusyError,
    ClosedError,
    Engine,
    Event,
    Failed,
    Finished,
    LateError,
    Piece,
    SchedulerError,
    Token,
)
from lbllm_compile.serve.metrics import Metrics
from lbllm_compile.serve.protocol import PARSERS, Answer, RequestError, Served

BODY_SECONDS = 30.0
"""A request's body must have arrived in this time."""

SEND_SECONDS = 60.0
"""So long may a client take to read its answer when all of it is there."""

RETRY_SECONDS = 1
"""When a client may ask again that was refused because too many wait."""


@dataclass(frozen=True)
class Front:
    """What the application answers with.

    Attributes:
        served: the model and what may be asked of it.
        engine: answers.
        metrics: counts.
        api_key: that clients must send; empty for none.
        most_bytes: of a request's body.
    """

    served: Served
    engine: Engine
    metrics: Metrics
    api_key: str
    most_bytes: int


def application(front: Front) -> ASGIApp:
    """The application."""

    async def answer(request: Request) -> Response:
        return await _answer(front, request)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(front.served)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != front.served.name:
            raise RequestError(404, f"there is no model {request.path_params['name']!r}", code="model_not_found")
        return JSONResponse(_model(front.served))

    async def health(_: Request) -> Response:
        engine = front.engine
        document = {"status": engine.status, "waiting": engine.waiting, "running": engine.running}
        return JSONResponse(document, 200 if engine.status == "ok" else 503)

    async def metrics(_: Request) -> Response:
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        front.metrics.refused(error.status)
        return _told(error)

    async def refuse_plainly(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = f"{request.method} {request.url.path}: {error.detail}"
        return await refuse(request, RequestError(error.status_code, said, headers=error.headers))

    async def stumble(_: Request, error: Exception) -> Response:
        return _told(RequestError(500, _fault(error), kind="server_error"))

    routes = [
        *(Route(path, answer, methods=["POST"]) for path in PARSERS),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers: dict[Any, Any] = {RequestError: refuse, HTTPException: refuse_plainly, Exception: stumble}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), front)


class _Guard:
    """Lets in who has the key, and ends connections whose clients do not read their answers."""

    def __init__(self, app: ASGIApp, front: Front):
        self._app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith("/v1/") and not self._has_key(scope):
            self._front.metrics.refused(401)
            error = RequestError(
                401, "the API key is missing or wrong; send it as a bearer token", code="invalid_api_key"
            )
            await JSONResponse(error.body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        with anyio.move_on_after(BODY_SECONDS + self._front.served.seconds + SEND_SECONDS):
            await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if not self._front.api_key:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, b"Bearer " + self._front.api_key.encode())


async def _answer(front: Front, request: Request) -> Response:
    """Answers a request of the API, at once or as a stream."""
    body = await _body(request, front.most_bytes)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON ({error})") from error
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    try:
        # Templates and tokenizers take their time with long prompts.
        answer = await anyio.to_thread.run_sync(PARSERS[request.url.path], front.served, document)
        ticket = front.engine.submit(answer.request, _delivery(events, as_they_come=answer.stream))
    except LbllmError as error:
        raise _refusal(error) from error
    watch = asyncio.create_task(_watch(request.receive, lambda: events.put_nowait(None)))

    def end() -> None:
        ticket.cancel()  # of no effect where it has been answered
        watch.cancel()

    if answer.stream:
        return StreamingResponse(_stream(answer, events, end), media_type="text/event-stream", headers=_UNBUFFERED)
    try:
        return await _whole(answer, events)
    finally:
        end()


def _delivery(events: asyncio.Queue[Event | None], as_they_come: bool) -> Callable[[Event], None]:
    """What puts events of the scheduler's thread into a queue of the running loop.

    Args:
        events: the queue.
        as_they_come: otherwise all at the end, so that the loop need not wake up for every token, which would take time
            from the kernels' threads.
    """
    loop, come = asyncio.get_running_loop(), deque[Event]()

    def hand_over() -> None:
        while come:
            events.put_nowait(come.popleft())

    def deliver(event: Event) -> None:
        come.append(event)
        if as_they_come or not isinstance(event, Piece):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(hand_over)

    return deliver


_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Tells proxies to hand pieces on as they come."""


async def _body(request: Request, most: int) -> bytes:
    """The body of a request, of so many bytes at most, in the time that a body has."""
    too_large = RequestError(413, f"the request has more than {most} bytes; send less", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise RequestError(408, f"the request was not whole after {BODY_SECONDS:g} seconds; send it faster") from error
    except ClientDisconnect as error:
        raise RequestError(400, "the connection was closed before the request was whole") from error
    return bytes(body)


async def _watch(receive: Callable[[], Awaitable[Any]], gone: Callable[[], None]) -> None:
    """Says when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


async def _whole(answer: Answer, events: asyncio.Queue[Event | None]) -> Response:
    """The whole answer, when it is there."""
    text: list[str] = []
    tokens: list[Token] = []
    while True:
        event = await events.get()
        if isinstance(event, Piece):
            text.append(event.text)
            tokens += [] if event.token is None else [event.token]
        elif isinstance(event, Finished):
            return JSONResponse(answer.whole("".join(text), tokens, event))
        elif isinstance(event, Failed):
            return _told(_failure(event.error))
        else:
            return _told(RequestError(499, "the client has gone"))


async def _stream(answer: Answer, events: asyncio.Queue[Event | None], end: Callable[[], None]) -> AsyncIterator[str]:
    """Server-sent events: what has come since the last one in each."""
    try:
        for document in answer.opening():
            yield _sent(document)
        while True:
            text, tokens = "", list[Token]()
            event = await events.get()
            while isinstance(event, Piece):
                text += event.text
                tokens += [] if event.token is None else [event.token]
                if events.empty():
                    break
                event = events.get_nowait()
            if text or (tokens and answer.request.logprobs is not None):
                yield _sent(answer.chunk(text, tokens))
            if isinstance(event, Finished):
                for document in answer.closing(event):
                    yield _sent(document)
                yield "data: [DONE]\n\n"
                return
            if isinstance(event, Failed):
                yield _sent(_failure(event.error).body)
                return
            if event is None:
                return
    finally:
        end()


def _sent(document: Any) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _told(error: RequestError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _refusal(error: LbllmError) -> RequestError:
    """How it is told that a request is not taken."""
    if isinstance(error, BusyError):
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return RequestError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, ClosedError | SchedulerError):
        return _failure(error)
    return RequestError(400, str(error))


def _failure(error: Exception) -> RequestError:
    """How it is told that a request that was taken is not answered: nothing was wrong with it."""
    if isinstance(error, ClosedError):
        return RequestError(503, str(error), kind="server_error", code="shutting_down")
    if isinstance(error, LateError):
        return RequestError(504, str(error), kind="server_error", code="timeout")
    return RequestError(500, str(error) if isinstance(error, LbllmError) else _fault(error), kind="server_error")


def _fault(error: Exception) -> str:
    return f"this is a fault of the server ({type(error).__name__}); its log says more"


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "lbllm-compile"}
