"""The manifests as `kubectl kustomize` puts them together, and what pods are made of."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dockerfile import ROOT

FOLDER = ROOT / "deploy/kubernetes"
SHELL = FOLDER / "storage/shell.yaml"
_OLDEST = 27  # of 1.x: gRPC probes came to stay, and kubectl's kustomize knows all that we write

Manifest = dict[str, Any]


def kubectl(*arguments: str) -> str:
    """Run kubectl, which asks no cluster here; return what it prints."""
    assert shutil.which("kubectl"), "kubectl is missing: scripts/packages kubernetes-client"
    done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def _client() -> int:
    """Return the minor version of this kubectl."""
    said = json.loads(kubectl("version", "--client", "--output", "json"))
    found = re.match(r"v1\.(\d+)", said["clientVersion"]["gitVersion"])
    assert found, said
    return int(found[1])


@cache
def render(folder: Path) -> tuple[Manifest, ...]:
    """Return the objects that `kubectl apply -k` would send."""
    if _client() < _OLDEST:
        pytest.skip(f"this is kubectl 1.{_client()}, the manifests need 1.{_OLDEST}")
    return tuple(yaml.safe_load_all(kubectl("kustomize", str(folder))))


def of_kind(manifests: Iterable[Manifest], kind: str) -> dict[str, Manifest]:
    """Return the objects of a kind by name."""
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] == kind}


def pods(manifests: Iterable[Manifest]) -> Iterator[Manifest]:
    """Yield metadata and spec of every pod that would run."""
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "Pod":
            yield manifest


def mounted_at(pod: Manifest) -> dict[str, Manifest]:
    """Return the volumes of a pod's only container by the path where it has them."""
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    return {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}


def ports_of(pod: Manifest) -> dict[str, int]:
    """Return the ports of a pod's only container by name."""
    (container,) = pod["spec"]["containers"]
    return {port["name"]: port["containerPort"] for port in container.get("ports", ())}
