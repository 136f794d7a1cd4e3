"""The OpenAI-compatible HTTP port: the same requests as over gRPC, the same limits, the same tokens."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server import openai
from server.access import ROUTES, Caller, Doorkeeper
from server.answers import feedback_of, response_of
from server.bodies import ChatBody, CompletionBody, FeedbackBody, unreadable
from server.concurrency import under_way, within
from server.failures import patience, shown
from server.metrics import ServerMetrics
from server.ratings import Ratings
from server.reception import Answering
from thumbloop import logs
from thumbloop.errors import InvalidRequest, ThumbloopError
from thumbloop.types import Interaction

B = TypeVar("B", ChatBody, CompletionBody, FeedbackBody)
Handler = Callable[[Request, Caller], Awaitable[Response]]

_STATUSES: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_HUNG_UP = 499  # nginx's word for a client that left; nobody reads it


class OpenAi:
    """The routes."""

    def __init__(
        self,
        reception: Answering,
        ratings: Ratings,
        doorkeeper: Doorkeeper,
        metrics: ServerMetrics,
        strategies: tuple[str, ...],
        *,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._reception = reception
        self._ratings = ratings
        self._doorkeeper = doorkeeper
        self._metrics = metrics
        self._strategies = strategies
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    def application(self) -> Starlette:
        """Return the ASGI application."""
        handlers: Mapping[str, Handler] = {
            "GET /v1/models": self._models,
            "POST /v1/completions": self._completions,
            "POST /v1/chat/completions": self._chat,
            "POST /v1/feedback": self._feedback,
        }
        routes = []
        for name, handler in handlers.items():
            method, path = name.split()
            routes.append(Route(path, self._guarded(name, handler), methods=[method]))
        return Starlette(routes=routes)

    def _guarded(self, name: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Return the handler behind the check of who calls; our errors become answers."""
        needed = ROUTES[name]

        async def guarded(request: Request) -> Response:
            logs.note(method=name)
            try:
                caller = self._doorkeeper.identify(request.headers.getlist("authorization"))
                caller.require(needed)
                response = await handler(request, caller)
            except ClientDisconnect:
                response = Response(status_code=_HUNG_UP)
            except Exception as error:
                self._metrics.observe_refusal(name, error)
                response = refusal(shown(error, name))
            self._metrics.http_handled(name, response.status_code)
            return response

        return guarded

    async def _models(self, _request: Request, _caller: Caller) -> Response:
        return JSONResponse(openai.models(self._strategies))

    async def _chat(self, request: Request, caller: Caller) -> Response:
        return await self._generate(request, caller, await self._read(request, ChatBody))

    async def _completions(self, request: Request, caller: Caller) -> Response:
        body = await self._read(request, CompletionBody)
        return await self._generate(request, caller, body)

    async def _feedback(self, request: Request, caller: Caller) -> Response:
        body = await self._read(request, FeedbackBody)
        stored = await self._ratings.rate(body.message(), caller)
        return JSONResponse(openai.feedback_answer(feedback_of(stored)))

    async def _read(self, request: Request, kind: type[B]) -> B:
        """Return the body. Raises InvalidRequest, DeadlineExceeded.

        It has to say that it is JSON: a page of another site cannot have a browser send that without
        asking us first. Pages that pass for our own site are refused before, see server.http_port.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise InvalidRequest.of("content-type", "has to be application/json")
        async with within(self._body_timeout_s, "the body was not there"):
            body = await self._bytes_of(request)
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            raise unreadable(error) from None

    async def _bytes_of(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise InvalidRequest.of("body", f"has more than {self._max_body_bytes} bytes")
        return bytes(body)

    async def _generate(
        self, request: Request, caller: Caller, body: ChatBody | CompletionBody
    ) -> Response:
        message, shape = body.message(), openai.Shape(body)
        if not message.request_id:
            message.request_id = request.headers.get("idempotency-key", "")
        if body.stream:
            stream = _EventStream(shape)
            telling = self._reception.tell(message, caller, stream)
            is_open = await stream.open(telling, request.receive)
            return stream if is_open else Response(status_code=_HUNG_UP)
        async with under_way(self._reception.respond(message, caller)) as made:
            if await _is_hung_up(request.receive, before=(made,)):
                return Response(status_code=_HUNG_UP)
            interaction = await made
        response = response_of(interaction, include_candidates=shape.has_candidates)
        return JSONResponse(shape.whole(response))


class _EventStream(Response):
    """A reply as server-sent events, a piece of its text each; see Reader."""

    media_type = "text/event-stream"

    def __init__(self, shape: openai.Shape) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._shape = shape
        self._response_id = ""
        self._is_begun = asyncio.Event()
        self._is_started = False
        self._send: asyncio.Future[Send] = asyncio.get_running_loop().create_future()
        self._telling: asyncio.Task[None]

    async def open(self, telling: Coroutine[Any, Any, None], receive: Receive) -> bool:
        """Let the reply be told; return once there is text, as a refusal that comes before has a status of
        its own. False: the caller has left. Raises the refusal.
        """
        self._telling = asyncio.ensure_future(telling)
        is_open = False
        try:
            async with under_way(self._is_begun.wait()) as begun:
                has_left = await _is_hung_up(receive, before=(begun, self._telling))
            if self._telling.done():
                self._telling.result()
            is_open = not has_left
        finally:
            if not is_open:
                await self._stop()
        return is_open

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Write events until the reply is complete or the reader has left."""
        self._send.set_result(send)
        try:
            if not await _is_hung_up(receive, before=(self._telling,)):
                await self._finish()
        finally:
            await self._stop()

    async def begin(self, response_id: str) -> None:
        """Say that there is something to send; wait until it may be sent."""
        self._response_id = response_id
        self._is_begun.set()
        await self._start()
        for opening in self._shape.opening(response_id):
            await self._event(opening)

    async def write(self, text: str) -> None:
        """Send a piece of the reply."""
        await self._event(self._shape.piece(self._response_id, text))

    async def end(self, reply: Interaction) -> None:
        """Send what comes after the text."""
        response = response_of(reply, include_candidates=self._shape.has_candidates)
        for closing in self._shape.closing(response):
            await self._event(closing)

    async def _start(self) -> None:
        send, headers = await self._send, self.raw_headers
        if not self._is_started:
            self._is_started = True
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": headers}
            )

    async def _finish(self) -> None:
        """Say how it ended, to whoever takes it; one that takes nothing is left to the socket's limit."""
        async with patience():
            await self._start()
            if isinstance(error := self._telling.exception(), Exception):
                failure = shown(error, "a stream")
                logs.note(failure=failure.code.name)
                await self._event(_error_body(failure))
            await _send_text(await self._send, "data: [DONE]\n\n", is_last=True)

    async def _event(self, data: Mapping[str, Any]) -> None:
        await _send_text(await self._send, f"data: {json.dumps(data)}\n\n")

    async def _stop(self) -> None:
        self._telling.cancel()
        await asyncio.wait((self._telling,))


async def _send_text(send: Send, text: str, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": not is_last})


async def _is_hung_up(receive: Receive, *, before: "Sequence[asyncio.Future[Any]]") -> bool:
    """Wait for one of several, or for the caller to leave before; say whether that was the case."""
    async with under_way(_hang_up(receive)) as gone:
        await asyncio.wait((*before, gone), return_when=asyncio.FIRST_COMPLETED)
    return not any(other.done() for other in before)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def refusal(error: ThumbloopError) -> Response:
    """Return an error as an answer."""
    headers = openai.retry_after(error)
    return JSONResponse(_error_body(error), _status_of(error), headers=headers)


def _error_body(error: ThumbloopError) -> dict[str, Any]:
    return openai.error_body(error, _status_of(error))


def _status_of(error: ThumbloopError) -> int:
    return _STATUSES.get(error.code, 500)
