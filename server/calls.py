"""A line in the log for each call that ended, whichever wire it came by, and what all lines of a call say of it."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import MappingProxyType

import uuid_utils
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thumbloop import logs

log = logging.getLogger(__name__)


_TRACE_HEADERS = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context
TRACE_HEADERS: ContextVar[Mapping[str, str]] = ContextVar(
    "trace_headers", default=MappingProxyType({})
)
"""What the caller says of the trace that its call is a part of."""


def begin(method: str, headers: Iterable[tuple[str, str]]) -> None:
    """Begin a call; until it names itself, its lines share an id that is made here."""
    logs.begin(method=method, request_id=str(uuid_utils.uuid7()))
    TRACE_HEADERS.set({name: value for name, value in headers if name in _TRACE_HEADERS})


def end(code: str, seconds: float) -> None:
    """Write the call's line."""
    method = logs.known().get("method", "a call")
    facts = {"code": code, "duration_s": round(seconds, 4)}
    log.info("%s: %s in %.3f s", method, code, seconds, extra={"facts": facts})


class HttpCalls:
    """Around the HTTP port's application: each request is a call until all of its answer is sent."""

    def __init__(self, application: ASGIApp, on_sent: Callable[[str, float], None]) -> None:
        """Tell whoever counts the route, as far as it is known, and the seconds of each call."""
        self._application = application
        self._on_sent = on_sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        code, started = "cut off", time.perf_counter()
        begin("HTTP", Headers(scope=scope).items())  # a path may hold anything

        async def watched(message: Message) -> None:
            nonlocal code
            await send(message)
            if message["type"] == "http.response.start":
                code = str(message["status"])

        try:
            await self._application(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - started
            self._on_sent(str(logs.known().get("method")), seconds)
            end(code, seconds)
