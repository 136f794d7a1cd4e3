"""Around every call of ours: who may call is checked, errors become statuses, all is counted and timed."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from server import calls
from server.access import CALLER, Doorkeeper
from server.failures import patience, shown
from server.metrics import ServerMetrics
from thumbloop.errors import InvalidRequest, ThumbloopError
from thumbloop.statuses import status_of

_OURS = "/thumbloop.v1."
_ROUNDED_UP = 0.01  # a deadline travels in few digits: the caller's own ends earlier by this share
Handler = Any  # grpc.RpcMethodHandler, which its stubs cannot express for aio


class Translator(grpc.aio.ServerInterceptor):
    """Lets in who may call; turns our exceptions into gRPC statuses, and anything else into INTERNAL."""

    def __init__(self, doorkeeper: Doorkeeper, metrics: ServerMetrics) -> None:
        self._doorkeeper = doorkeeper
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handlers of our services; leave health and reflection alone."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_OURS):
            return handler
        make = (
            grpc.unary_unary_rpc_method_handler
            if handler.unary_unary
            else grpc.unary_stream_rpc_method_handler
        )
        return make(
            self._guarded(handler, details.method),
            request_deserializer=None,  # bytes: nothing is read for who may not call
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, handler: Handler, method: str) -> Any:
        """Wrap a handler; those of streams write, and return nothing."""
        behaviour, parse = handler.unary_unary or handler.unary_stream, handler.request_deserializer

        async def call(request: bytes, context: Any) -> Any:
            with _Observed(self._metrics, method, context):
                try:
                    self._admit(method, context)
                    return await behaviour(_read(request, parse), context)
                except grpc.aio.AbortError:
                    raise
                except ThumbloopError as error:
                    self._metrics.observe_refusal(method, error)
                    status = rpc_status.to_status(status_of(error))
                    await _abort(context, status.code, status.details, status.trailing_metadata)
                except Exception as error:
                    failure = shown(error, method)
                    await _abort(context, failure.code, str(failure))

        return call

    def _admit(self, method: str, context: Any) -> None:
        """Remember, for the task that answers the call, who makes it."""
        metadata = context.invocation_metadata() or ()
        given = [value for key, value in metadata if key == "authorization"]
        CALLER.set(self._doorkeeper.admit(method, given))


def _read(request: bytes, parse: Callable[[bytes], Message]) -> Message:
    """Return the message. Raises InvalidRequest: it is another one, or its text is not UTF-8."""
    try:
        return parse(request)
    except DecodeError:
        raise InvalidRequest.of("request", "is no message of this call in valid UTF-8") from None


class _Observed:
    """Counts and logs one call: started, handled with its status, and how long it took."""

    def __init__(self, metrics: ServerMetrics, method: str, context: Any) -> None:
        self._metrics = metrics
        self._method = method
        self._context = context

    def __enter__(self) -> None:
        calls.begin(self._method, self._context.invocation_metadata() or ())
        self._started = time.perf_counter()
        self._time_s = self._context.time_remaining()
        self._metrics.call_started(self._method)

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        code = self._context.code()
        if isinstance(error, asyncio.CancelledError):
            code = self._why_cancelled()
        name = code.name if isinstance(code, grpc.StatusCode) else _name(code)
        seconds = time.perf_counter() - self._started
        self._metrics.call_handled(self._method, name, seconds)
        calls.end(name, seconds)

    def _why_cancelled(self) -> grpc.StatusCode:
        """Return how the call ended for its caller: gRPC cancels ours in the same way for both."""
        left_s = self._context.time_remaining()
        is_late = left_s is not None and left_s <= self._time_s * _ROUNDED_UP
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED


def _name(code: int | None) -> str:
    return next((c.name for c in grpc.StatusCode if c.value[0] == code), "OK")


async def _abort(context: Any, *status: Any) -> None:
    """End the call. gRPC keeps the status behind what the reader has not taken, and ends the handler."""
    async with patience():
        await context.abort(*status)
