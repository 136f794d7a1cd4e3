"""The ports: free, or served by a Thumbloop that is well; and that server's clock."""

import re
import socket
import ssl
import time
import urllib.request
from contextlib import closing
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import grpc

from thumbloop.config.shared import Metrics
from thumbloop.doctor.findings import Finding, Subject, ok, warning, wrong

_TIMEOUT_S = 5.0
_CLOCK_S = 5.0
_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse(status=SERVING)
_OURS = (b'"owned_by":"thumbloop"', b"authorization: Bearer")  # models, or that a token is needed
_OTHER = "stop what listens there, or choose another port"


def listen(subject: Subject) -> Finding:
    """Look at the gRPC port."""
    where = subject.server.listen
    if is_free(where.host, where.port):
        return ok("gRPC port", _free(where.host, where.port))
    if where.tls_certificate is not None:
        return _behind_tls("gRPC port", where.host, where.port, where.tls_certificate)
    answer = _health(f"{where.host}:{where.port}")
    if answer is None:
        return wrong("gRPC port", f"{where.port} is taken by something else", _OTHER)
    if answer != _SERVING:
        advice = "it starts, drains or waits for its engine: see its log"
        return warning("gRPC port", f"{where.port}: a server that is NOT_SERVING", advice)
    return ok("gRPC port", f"{where.port}: a server that is SERVING")


def http(subject: Subject) -> Finding:
    """Look at the HTTP port."""
    where = subject.server.http
    if not where.enabled:
        return ok("HTTP port", "not wanted")
    if is_free(where.host, where.port):
        return ok("HTTP port", _free(where.host, where.port))
    if (certificate := subject.server.listen.tls_certificate) is not None:
        return _behind_tls("HTTP port", where.host, where.port, certificate)
    answer = _get(f"http://{where.host}:{where.port}/v1/models")
    if answer is None or not any(word in answer[0] for word in _OURS):
        return wrong("HTTP port", f"{where.port} is taken by something else", _OTHER)
    return ok("HTTP port", f"{where.port}: a server answers")


def metrics(subject: Subject) -> Finding:
    """Look at the server's metrics port."""
    return _metrics("metrics port", subject.server.metrics, b"thumbloop_policy_version")


def trainer_metrics(subject: Subject) -> Finding:
    """Look at the trainer's metrics port."""
    if subject.trainer is None:
        return ok("trainer's metrics port", "no settings of a trainer were given")
    return _metrics("trainer's metrics port", subject.trainer.metrics, b"thumbloop_trainer_round")


def clock(subject: Subject) -> Finding:
    """Compare this machine's clock with that of the server that runs."""
    where, check = subject.server.http, "server's clock"
    is_plain = subject.server.listen.tls_certificate is None
    taken = where.enabled and is_plain and not is_free(where.host, where.port)
    answer = _get(f"http://{where.host}:{where.port}/v1/models") if taken else None
    if answer is None or not answer[1]:
        return ok(check, "no server to compare with")
    apart_s = parsedate_to_datetime(answer[1]).timestamp() - time.time()
    if abs(apart_s) > _CLOCK_S:
        advice = "set the clock, and keep it (chrony, systemd-timesyncd) on both machines"
        return wrong(check, f"{apart_s:+.0f} s from this one", advice)
    return ok(check, "the same as this one")


def _behind_tls(check: str, host: str, port: int, certificate: Path) -> Finding:
    """Look at a port that speaks TLS: whoever shows the certificate of the settings is taken for their server."""
    try:
        shown = ssl.get_server_certificate((host.strip("[]"), port), timeout=_TIMEOUT_S)
    except (OSError, ValueError):
        return wrong(check, f"{port} is taken by something else, without TLS", _OTHER)
    if _first_of(shown) != _first_of(certificate.read_text() if certificate.is_file() else ""):
        advice = f"start anew a server that is older than its certificate; else {_OTHER}"
        return warning(check, f"{port}: another certificate than {certificate.name}", advice)
    return ok(check, f"{port}: a server with {certificate.name}")


def _first_of(chain: str) -> str:
    """Return the first certificate of a PEM file, "" where there is none."""
    found = re.search(r"-----BEGIN CERTIFICATE-----(.+?)-----END", chain, re.DOTALL)
    return "".join(found[1].split()) if found else ""


def _metrics(check: str, where: Metrics, name: bytes) -> Finding:
    if is_free(where.host, where.port):
        return ok(check, _free(where.host, where.port))
    answer = _get(f"http://{where.host}:{where.port}/metrics")
    if answer is None or name not in answer[0]:
        return wrong(check, f"{where.port} is taken by something else", _OTHER)
    return ok(check, f"{where.port}: answers")


def is_free(host: str, port: int) -> bool:
    """Say whether a port could be bound now; it is let go at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError:
            return False
    return True


def _free(host: str, port: int) -> str:
    return f"{host}:{port} is free" if port else "takes a free one"


def _health(address: str) -> bytes | None:
    """Return what the health check answers; None where nobody does who knows it."""
    with grpc.insecure_channel(address) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            return bytes(check(b"", timeout=_TIMEOUT_S))
        except grpc.RpcError:
            return None


def _get(url: str) -> tuple[bytes, str] | None:
    """Return an answer, also one that refuses, with its header `date`; None where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            return answer.read(), answer.headers["date"] or ""
    except HTTPError as error:
        return error.read(), error.headers["date"] or ""
    except (URLError, OSError, ValueError):
        return None
