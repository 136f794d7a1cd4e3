# Images of the two applications, for a CPU or for a GPU:
#
#   docker build --target server  -t thumbloop-server .
#   docker build --target trainer -t thumbloop-trainer .
#   docker build --target server --build-arg ACCELERATOR=gpu -t thumbloop-server:gpu .
#
# Both keep their state on the volume /state, which they share, and read the base model from /model:
#
#   docker run -p 127.0.0.1:50051:50051 -p 127.0.0.1:8080:8080 -p 127.0.0.1:9464:9464 -v thumbloop:/state \
#     -v "$PWD/model:/model:ro" -e THUMBLOOP_SERVER_LISTEN__INSECURE=true thumbloop-server
#   docker run -p 127.0.0.1:9465:9465 -v thumbloop:/state -v "$PWD/model:/model:ro" thumbloop-trainer
#
# The server refuses to start without TLS and tokens (docs/operations.md), unless it is told that
# strangers cannot reach it, as above, where its ports are published on the host's loopback only.
# Any setting can be given as an environment variable (docs/configuration.md).
ARG ACCELERATOR=cpu

FROM python:3.11-slim-bookworm AS base-cpu

# The compilers are for kernels that vLLM builds when it starts.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS base-gpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM base-${ACCELERATOR} AS deps
ARG ACCELERATOR
ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
WORKDIR /app
COPY pyproject.toml ./
COPY locks/ locks/
COPY scripts/setup scripts/setup
RUN ACCELERATOR=${ACCELERATOR} scripts/setup --packages-only && rm -rf /var/lib/apt/lists/*

FROM deps AS source
COPY LICENSE README.md ./
COPY scripts/healthcheck.py scripts/healthcheck.py
COPY thumbloop/ thumbloop/
RUN .venv/bin/python -m pip install --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 10001 thumbloop \
    && install --directory --owner thumbloop /state
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1
USER thumbloop
VOLUME /state

FROM source AS server
COPY server/ server/
ENV THUMBLOOP_SERVER_STATE__FOLDER=/state \
    THUMBLOOP_SERVER_MODEL__PATH=/model \
    THUMBLOOP_SERVER_LISTEN__HOST=0.0.0.0 \
    THUMBLOOP_SERVER_LISTEN__HEALTH_PORT=50052 \
    THUMBLOOP_SERVER_HTTP__HOST=0.0.0.0 \
    THUMBLOOP_SERVER_METRICS__HOST=0.0.0.0
# gRPC, HTTP, metrics
EXPOSE 50051 8080 9464
HEALTHCHECK --interval=10s --timeout=6s --start-period=180s \
    CMD ["python", "scripts/healthcheck.py", "grpc", "127.0.0.1:50052"]
CMD ["python", "-m", "server"]

FROM source AS trainer
COPY trainer/ trainer/
ENV THUMBLOOP_TRAINER_STATE__FOLDER=/state \
    THUMBLOOP_TRAINER_MODEL__PATH=/model \
    THUMBLOOP_TRAINER_METRICS__HOST=0.0.0.0 \
    THUMBLOOP_TRAINER_METRICS__PORT=9465
# metrics
EXPOSE 9465
HEALTHCHECK --interval=30s --timeout=6s --start-period=180s \
    CMD ["python", "scripts/healthcheck.py", "http", "http://127.0.0.1:9465/metrics"]
CMD ["python", "-m", "trainer"]
