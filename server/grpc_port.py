"""The gRPC ports: every service with health and reflection, and one that answers health alone."""

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from server.access import credentials_of
from server.health import Health
from server.interceptors import Translator
from server.ports import bind
from server.servicers import AdminServicer, FeedbackServicer, PolicyServicer
from thumbloop.config.server import Listen
from thumbloop.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
)

SERVICES = (
    policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name,
    feedback_pb2.DESCRIPTOR.services_by_name["FeedbackService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


async def serve_calls(
    listen: Listen,
    translator: Translator,
    health_of: Health,
    policy: PolicyServicer,
    feedback: FeedbackServicer,
    admin: AdminServicer,
) -> tuple[grpc.aio.Server, int]:
    """Start to answer; return the server and its port. Raises SettingsError: the port cannot be bound."""
    options = [*_OPTIONS, ("grpc.max_receive_message_length", listen.max_message_bytes)]
    server = grpc.aio.server(interceptors=[translator], options=options)
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(policy, server)
    feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(feedback, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    health_of.join(server)
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    port = bind(server, "listen.port", listen.host, listen.port, credentials_of(listen))
    await server.start()
    return server, port


async def serve_health(listen: Listen, port: int, health_of: Health) -> tuple[grpc.aio.Server, int]:
    """Start to answer those that ask for nothing but health, and cannot do TLS; return the same.

    Raises SettingsError: the port cannot be bound.
    """
    server = grpc.aio.server(options=_OPTIONS)
    health_of.join(server)
    bound = bind(server, "listen.health_port", listen.host, port, None)
    await server.start()
    return server, bound
