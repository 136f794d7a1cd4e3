"""What the server says of itself (grpc.health.v1): beside its calls, and to probes on a port of their own."""

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

LIVENESS = "liveness"
"""The name under which it is SERVING for as long as it answers, whatever becomes of the engine."""


class Health:
    """SERVING or NOT_SERVING, overall and for every service."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = ("", *services)
        self._servicer = health.aio.HealthServicer()

    async def say(self, *, serving: bool) -> None:
        """Tell whoever asks, or watches, from now on."""
        found = health_pb2.HealthCheckResponse
        status = found.SERVING if serving else found.NOT_SERVING
        for service in self._services:
            await self._servicer.set(service, status)
        await self._servicer.set(LIVENESS, found.SERVING)

    def join(self, server: grpc.aio.Server) -> None:
        """Answer on another server's port, too."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
