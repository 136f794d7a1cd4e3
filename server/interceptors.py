"""Around every call of ours: errors become statuses, and calls are counted and timed."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from server.metrics import ServerMetrics
from thumbloop.errors import InvalidRequest, Overloaded, ThumbloopError

log = logging.getLogger(__name__)

_OURS = "/thumbloop.v1."
Handler = Any  # grpc.RpcMethodHandler, which its stubs cannot express for aio


class Translator(grpc.aio.ServerInterceptor):
    """Turns our exceptions into gRPC statuses with details, and anything else into INTERNAL."""

    def __init__(self, metrics: ServerMetrics) -> None:
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
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, details.method),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_stream_rpc_method_handler(
            self._stream(handler.unary_stream, details.method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, behaviour: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            with _Observed(self._metrics, method, context):
                try:
                    return await behaviour(request, context)
                except ThumbloopError as error:
                    await _abort(context, error)
                except Exception as error:
                    await _abort_unexpected(context, method, error)

        return call

    def _stream(self, behaviour: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            with _Observed(self._metrics, method, context):
                try:
                    async for message in behaviour(request, context):
                        yield message
                except ThumbloopError as error:
                    await _abort(context, error)
                except Exception as error:
                    await _abort_unexpected(context, method, error)

        return call


class _Observed:
    """Counts one call: started, handled with its status, and how long it took."""

    def __init__(self, metrics: ServerMetrics, method: str, context: Any) -> None:
        self._metrics = metrics
        self._method = method
        self._context = context

    def __enter__(self) -> None:
        self._started = time.perf_counter()
        self._metrics.call_started(self._method)

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        code = self._context.code()
        if isinstance(error, asyncio.CancelledError):
            code = grpc.StatusCode.CANCELLED
        name = code.name if isinstance(code, grpc.StatusCode) else _name(code)
        self._metrics.call_handled(self._method, name, time.perf_counter() - self._started)


def _name(code: int | None) -> str:
    return next((c.name for c in grpc.StatusCode if c.value[0] == code), "OK")


async def _abort(context: Any, error: ThumbloopError) -> None:
    status = rpc_status.to_status(
        status_pb2.Status(
            code=getattr(code_pb2, error.code.name), message=str(error), details=_details(error)
        )
    )
    await context.abort(status.code, status.details, status.trailing_metadata)


async def _abort_unexpected(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    log.error("%s failed", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the cause")


def _details(error: ThumbloopError) -> list[any_pb2.Any]:
    packed = any_pb2.Any()
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation
        found = [violation(field=v.field, description=v.description) for v in error.violations]
        packed.Pack(error_details_pb2.BadRequest(field_violations=found))
    elif isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        packed.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    else:
        return []
    return [packed]
