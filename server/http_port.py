"""The HTTP port: the socket, uvicorn on it in the event loop of everything else, how many may connect and by
what names."""

import asyncio
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.access import is_open_to_pages
from server.calls import HttpCalls
from server.http import refusal
from server.metrics import ServerMetrics
from thumbloop.config import ServerConfig
from thumbloop.errors import PermissionDenied, SettingsError, Unavailable
from thumbloop.hosts import is_loopback

_HOST = re.compile(r"(\[[^]]*]|[^:]*)(:\d*)?")
_GRACE_S = 1  # for connections that are still open when all calls have ended


class HttpServer:
    """The port and what listens on it, in the event loop of everything else."""

    def __init__(
        self, config: ServerConfig, application: Starlette, metrics: ServerMetrics
    ) -> None:
        self._where = config.http
        self._stuck_ms = round(config.http.stuck_timeout_s * 1000)
        listen = config.listen
        self._server = _Uvicorn(
            uvicorn.Config(
                HttpCalls(
                    _Loopback(application) if is_open_to_pages(config) else application,
                    metrics.http_sent,
                ),
                http=_Connection,
                limit_concurrency=self._where.max_connections,
                timeout_keep_alive=self._where.head_timeout_s,
                log_config=None,
                access_log=False,
                lifespan="off",
                ssl_certfile=listen.tls_certificate,
                ssl_keyfile=listen.tls_key,
                ssl_ca_certs=None if listen.tls_client_ca is None else str(listen.tls_client_ca),
                ssl_cert_reqs=ssl.CERT_NONE if listen.tls_client_ca is None else ssl.CERT_REQUIRED,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Open the port; return its number. Raises SettingsError."""
        host, port = self._where.host.strip("[]"), self._where.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._stuck_ms)
        except OSError as error:
            raise SettingsError(
                f"http.port: {host}:{port} cannot be bound ({error.strerror}); stop what listens"
                " there, choose another port (0 takes a free one), or set http.enabled to false"
            ) from None
        number = int(listener.getsockname()[1])
        self._serving = asyncio.create_task(self._server.serve([listener]), name="serve http")
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return number

    async def stop(self) -> None:
        """Close the port, and connections that have not closed by themselves."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


class _Uvicorn(uvicorn.Server):
    """One that leaves signals to the server it is a part of."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signals."""
        yield


class _Connection(HttpToolsProtocol):
    """One that is closed where it sends no whole head in time, and is turned away if it is one too many.

    uvicorn's own timer stops at the first byte. Its own limit, while it is passed, turns away those who
    were here before.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            self.app = _turn_away
        self.limit_concurrency = None
        self._await_head()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._forget_deadline()

    def _await_head(self) -> None:
        self._forget_deadline()
        self._deadline = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


async def _turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    answer = refusal(Unavailable("there are too many connections; try again"))
    answer.headers["connection"] = "close"
    await answer(scope, receive, send)


class _Loopback:
    """Refuses requests that call this machine by any name but its own.

    A page's name can be made to mean 127.0.0.1 once the page is loaded (DNS rebinding). Its browser then
    takes us for the page's own site, and only the header `host` says otherwise.
    """

    def __init__(self, application: ASGIApp) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        parts = _HOST.fullmatch(Headers(scope=scope).get("host", "").lower())
        answer = self._application
        if parts is None or not is_loopback(parts[1]):
            answer = refusal(
                PermissionDenied(
                    "host: without tokens this port answers to localhost, 127.0.0.1 and [::1] alone;"
                    " set access.tokens, or listen.insecure where something in front asks who calls"
                )
            )
        await answer(scope, receive, send)
