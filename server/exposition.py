"""The page that Prometheus scrapes: always plain text, where vLLM's names are its own.

Prometheus prefers OpenMetrics, and prometheus-client writes the colon of `vllm:` as an underscore in that.
"""

from collections.abc import Iterable
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer
from wsgiref.types import StartResponse

from prometheus_client import CollectorRegistry, start_http_server


def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> tuple[WSGIServer, Thread]:
    """Open the endpoint in a thread of its own; return both, to be ended. Raises OSError: the port is taken."""
    server, thread = start_http_server(port, host, registry)
    page = server.get_app()
    assert page is not None, "it was given one a line before"

    def plain(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        return page({**environ, "HTTP_ACCEPT": "text/plain"}, start_response)

    server.set_app(plain)
    return server, thread
