"""Tokens, and calls with and without them, over both wires."""

import hashlib
import importlib
import pkgutil
from typing import Any

import grpc
import httpx2
from google.protobuf.descriptor import MethodDescriptor
from starlette.routing import Route

from server.access import Doorkeeper
from server.http import OpenAi
from server.metrics import ServerMetrics
from tests.serving import Running
from thumbloop import v1
from thumbloop.config.server import Access

REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def our_rpcs() -> dict[str, MethodDescriptor]:
    """Return every RPC of every proto of ours, by its path on the wire."""
    modules = (
        importlib.import_module(f"{v1.__name__}.{module.name}")
        for module in pkgutil.iter_modules(v1.__path__)
        if module.name.endswith("_pb2")
    )
    return {
        f"/{service.full_name}/{method.name}": method
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def our_routes() -> list[str]:
    """Return every HTTP route as method and path."""
    nobody: Any = None
    doorkeeper = Doorkeeper(Access())
    limits: Any = {"max_body_bytes": 1, "body_timeout_s": 1}
    openai = OpenAi(nobody, nobody, doorkeeper, ServerMetrics(), (), **limits)
    routes = [route for route in openai.application().routes if isinstance(route, Route)]
    return [f"{m} {r.path}" for r in routes for m in (r.methods or set()) - {"HEAD"}]


RPCS = our_rpcs()
ROUTE_NAMES = our_routes()


def secret_of(name: str) -> str:
    return f"secret-of-{name}"


def tokens(**scopes: list[str]) -> dict[str, Any]:
    """Return the settings of one token for each subject."""
    return {
        "tokens": {
            subject: {
                "sha256": hashlib.sha256(secret_of(subject).encode()).hexdigest(),
                "scopes": allowed,
            }
            for subject, allowed in scopes.items()
        }
    }


def bearer(subject: str) -> str:
    return f"Bearer {secret_of(subject)}"


async def code_of(
    server: Running, path: str, authorization: str | None, request: bytes = b""
) -> grpc.StatusCode:
    """Call an RPC with this header; return its status."""
    channel = server.channel
    metadata = None if authorization is None else [("authorization", authorization)]
    try:
        if RPCS[path].server_streaming:
            async for _ in channel.unary_stream(path)(request, metadata=metadata):
                pass
        else:
            await channel.unary_unary(path)(request, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def web(server: Running, subject: str = "", **options: Any) -> httpx2.AsyncClient:
    """Return an HTTP client of the server with this subject's token."""
    return httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{server.application.http_port}",
        headers={"authorization": bearer(subject)} if subject else {},
        **options,
    )


async def status_of(server: Running, route: str, authorization: str | None) -> int:
    method, path = route.split()
    headers = {} if authorization is None else {"authorization": authorization}
    async with web(server) as client:
        return (await client.request(method, path, headers=headers, content=b"")).status_code


GENERATE = "/thumbloop.v1.PolicyService/Generate"


def as_(subject: str) -> list[tuple[str, str]]:
    return [("authorization", bearer(subject))]
