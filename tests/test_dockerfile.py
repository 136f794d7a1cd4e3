"""The Dockerfile names only what exists: there is no engine here that could build it."""

import os
import re
import subprocess
import sys
from concurrent import futures
from importlib.machinery import PathFinder

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.dockerfile import DOCKERFILE, ROOT, chain, parse
from thumbloop.config import ServerConfig, TrainerConfig, load

ACCELERATORS = ("cpu", "gpu")


def is_sent(path: str) -> bool:
    """Whether .dockerignore, a list of what is let through, lets a path into the build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:].strip("/") for line in lines if line.startswith("!")}
    return path.split("/")[0] in allowed


def is_copied(path: str, copies: list[str]) -> bool:
    return any(
        path == copy.rstrip("/") or path.startswith(f"{copy.rstrip('/')}/") for copy in copies
    )


def find_faults(text: str) -> list[str]:
    """Return everything that a Dockerfile names and the tree does not have."""
    stages = parse(text)
    faults = [f"no target {name}" for name in ("server", "trainer") if name not in stages]
    for target in stages.keys() & {"server", "trainer"}:
        for accelerator in ACCELERATORS:
            built_from = chain(stages, target, accelerator)
            base = built_from[-1].base
            if not re.fullmatch(r"[a-z/]+:[\w.-]+", base):
                faults.append(
                    f"{target} on {accelerator}: {base} is no stage and no image with a tag"
                )
            copies = [path for stage in built_from for path in stage.copies()]
            faults += [
                f"{path} is not in the tree" for path in copies if not (ROOT / path).exists()
            ]
            faults += [f"{path} is not sent to the build" for path in copies if not is_sent(path)]
            for command in (c for stage in built_from for c in stage.commands()):
                faults += _faults_of_command(command, copies)
    return faults


def _faults_of_command(command: str, copies: list[str]) -> list[str]:
    faults = []
    for module in re.findall(r"python3? -m ([\w.]+)", command):
        path = module.replace(".", "/")
        if (ROOT / path).is_dir():
            path += "/__main__"
        if (ROOT / path.split("/")[0]).is_dir():
            if not (ROOT / f"{path}.py").exists() or not is_copied(f"{path}.py", copies):
                faults.append(f"python -m {module} is not in the image")
        # Not importlib.util.find_spec: setuptools' own finder warns of what other tests imported.
        elif PathFinder.find_spec(module) is None:
            faults.append(f"python -m {module} exists nowhere")
    for script in re.findall(r"(?<![\w/])scripts/[\w.]+", command):
        path = ROOT / script
        if not path.exists() or not is_copied(script, copies):
            faults.append(f"{script} is not in the image")
        elif f"python {script}" not in command and not os.access(path, os.X_OK):
            faults.append(f"{script} cannot be run")
    return faults


def test_everything_it_names_exists():
    assert find_faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("COPY server/ server/", "COPY serving/ serving/"),
        ("COPY server/ server/", ""),
        ("COPY locks/ locks/", "COPY tests/ tests/"),
        ("COPY scripts/setup scripts/setup", ""),
        ("RUN ACCELERATOR=${ACCELERATOR} scripts/setup", "RUN scripts/set_up"),
        ('"scripts/healthcheck.py", "grpc"', '"scripts/health.py", "grpc"'),
        ('"-m", "server"', '"-m", "server.main"'),
        ("-m pip", "-m pipp"),
        ("AS server", "AS serving"),
        ("AS base-gpu", "AS base-cuda"),
        ("FROM source AS trainer", "FROM sources AS trainer"),
    ],
)
def test_a_wrong_name_is_found(right: str, wrong: str):
    assert right in DOCKERFILE
    assert find_faults(DOCKERFILE.replace(right, wrong, 1))


def test_each_accelerator_has_its_lock():
    for accelerator in ACCELERATORS:
        lock = (ROOT / "locks" / f"{accelerator}.txt").read_text()
        assert re.search(r"^torch==", lock, re.MULTILINE)


@pytest.mark.parametrize(
    ("target", "config"), [("server", ServerConfig), ("trainer", TrainerConfig)]
)
def test_settings_ports_and_volume_are_those_of_the_application(
    target: str, config: type[ServerConfig | TrainerConfig], monkeypatch: pytest.MonkeyPatch
):
    stages = chain(parse(DOCKERFILE), target, "cpu")
    prefix = f"THUMBLOOP_{target.upper()}_"
    for name, value in stages[0].environment().items():
        assert name.startswith(prefix)
        monkeypatch.setenv(name, value)
    settings = load(config, None)
    assert [str(settings.state.folder)] == [v for stage in stages for v in stage.values("VOLUME")]
    assert settings.metrics.host == "0.0.0.0"
    exposed = {int(port) for port in " ".join(stages[0].values("EXPOSE")).split()}
    assert settings.metrics.port in exposed
    if isinstance(settings, ServerConfig):
        assert {settings.listen.port, settings.http.port, settings.metrics.port} == exposed
        assert settings.listen.host == settings.http.host == "0.0.0.0"
        assert not settings.listen.insecure
        (check,) = stages[0].values("HEALTHCHECK")
        assert f'"127.0.0.1:{settings.listen.health_port}"' in check


@pytest.mark.parametrize("target", ["server", "trainer"])
def test_an_image_runs_as_nobody_special_and_tells_its_health(target: str):
    stages = chain(parse(DOCKERFILE), target, "cpu")
    users = [user for stage in stages for user in stage.values("USER")]
    assert users
    assert users[0] not in {"root", "0"}
    assert len(stages[0].values("HEALTHCHECK")) == 1


def run_healthcheck(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/healthcheck.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_health_check_follows_the_server():
    servicer = health.HealthServicer()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        assert run_healthcheck("grpc", address).returncode == 0
        servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert "NOT_SERVING" in run_healthcheck("grpc", address).stderr
    finally:
        server.stop(None).wait()
    assert run_healthcheck("grpc", address).returncode == 1
    assert run_healthcheck("http", f"http://{address}/metrics").returncode == 1
