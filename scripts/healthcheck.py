"""Health of a running server or trainer, for an image or an operator: exits 0 when it is well.

`healthcheck.py grpc 127.0.0.1:50051` wants SERVING from the server's grpc.health.v1;
`healthcheck.py http http://127.0.0.1:9465/metrics` wants an answer without an error.
"""

import sys
import urllib.request

TIMEOUT_S = 5.0


def check_grpc(address: str) -> None:
    """Exit with the server's status unless it is SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest()
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def check_http(url: str) -> None:
    """Raise unless the URL answers without an error."""
    urllib.request.urlopen(url, timeout=TIMEOUT_S).close()


CHECKS = {"grpc": check_grpc, "http": check_http}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in CHECKS:
        sys.exit(__doc__)
    CHECKS[sys.argv[1]](sys.argv[2])
