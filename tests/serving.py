"""A server in this process, on free ports, with a fake engine unless told otherwise."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import Engine as Database

from server.application import Application, EngineFactory
from server.engine import Engine
from tests.fakes import FakeEngine
from thumbloop.client import AsyncClient
from thumbloop.config import Model, ServerConfig, State
from thumbloop.store import interactions, open_store, reading
from thumbloop.types import Interaction
from thumbloop.v1 import admin_pb2_grpc, feedback_pb2_grpc, policy_pb2, policy_pb2_grpc


def config_of(folder: Path, state: State, /, **sections: Any) -> ServerConfig:
    """Return settings with free ports, a quick look at the store, and whatever is given."""
    values: dict[str, Any] = {
        "model": Model(path=str(folder)),
        "state": state,
        "listen": {"port": 0},
        "http": {"port": 0},
        "metrics": {"port": 0},
        "delivery": {"poll_interval_s": 0.02},
        "sampling": {"max_tokens": 16},
    }
    for name, given in sections.items():
        is_partial = isinstance(given, dict)
        values[name] = values.get(name, {}) | given if is_partial else given
    return ServerConfig(**values)


async def until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Running:
    """A server that serves, and everything a test wants to do with it."""

    def __init__(self, application: Application, engine: Any) -> None:
        self.application = application
        self.engine = engine
        self.port = application.port
        self.client = AsyncClient(f"127.0.0.1:{self.port}")
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")
        self.policy = policy_pb2_grpc.PolicyServiceStub(self.channel)
        self.feedback = feedback_pb2_grpc.FeedbackServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.database: Database | None = None

    async def generate(self, text: str, **fields: Any) -> policy_pb2.GenerateResponse:
        """Continue a text; `fields` are those of the request."""
        return await self.policy.Generate(policy_pb2.GenerateRequest(text=text, **fields))

    async def sampling(self, count: int) -> None:
        """Wait until the fake engine has this many samples under way."""
        engine = self.engine
        await until(lambda: engine.started - engine.finished - engine.aborted >= count)

    async def serves(self, version: int) -> None:
        """Wait until a version is current."""
        async with asyncio.timeout(30):
            while (await self.client.versions()).current_version != version:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def found(self, response_id: str) -> Interaction | None:
        """Return the row behind a reply, if it is there: nobody waits for those that came to nothing."""
        assert self.database is not None
        with reading(self.database) as connection:
            return interactions.get(connection, response_id)

    def stored(self, response_id: str) -> Interaction:
        """Return the row behind a reply."""
        found = self.found(response_id)
        assert found is not None
        return found

    async def close(self) -> None:
        await self.client.close()
        await self.channel.close()


@asynccontextmanager
async def running(
    model: Path, state: State, *, make_engine: EngineFactory | None = None, **sections: Any
) -> AsyncIterator[Running]:
    """Start a server, and stop it afterwards; `sections` are settings."""
    engines: list[Engine] = []

    def make(folder: Path, config: ServerConfig) -> Engine:
        engines.append(make_engine(folder, config) if make_engine else FakeEngine(folder))
        return engines[-1]

    application = Application(config_of(model, state, **sections), make)
    try:
        await application.start()
        server = Running(application, engines[0])
        server.database = open_store(state)
        try:
            yield server
        finally:
            if isinstance(server.engine, FakeEngine):
                server.engine.may_sample.set()
            await server.close()
            server.database.dispose()
    finally:
        await application.stop()


async def health(server: Running | int, service: str = "") -> int:
    """Return what the health check says; of a port where there is no more of a server."""
    port = server if isinstance(server, int) else server.port
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return (await stub.Check(request, wait_for_ready=True, timeout=20)).status


async def comes_to(status: int, server: Running, *, within_s: float) -> None:
    """Wait until health says so."""
    async with asyncio.timeout(within_s):
        while await health(server) != status:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
