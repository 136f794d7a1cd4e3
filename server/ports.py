"""Binding ports, and the words for one that cannot be had."""

import grpc

from thumbloop.errors import SettingsError


def bind(
    server: grpc.aio.Server,
    setting: str,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None,
) -> int:
    """Add a port, TLS where there are credentials; return its number. Raises SettingsError, naming the setting."""
    address = f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise port_taken(setting, host, port, "in use?") from None


def port_taken(setting: str, host: str, port: int, why: str | None) -> SettingsError:
    """Return what to raise for a port that is not ours to have."""
    return SettingsError(
        f"{setting}: {host}:{port} cannot be bound ({why});"
        " stop what listens there or choose another port, 0 takes a free one"
    )
