"""Whoever uses a folder keeps it, in whatever process; whoever ends lets it go."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from thumbloop import artifacts, leases
from thumbloop.artifacts import MANIFEST
from thumbloop.errors import BadPolicyVersion
from thumbloop.leases import claim, hold


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "default" / "000001"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    return folder


def test_a_folder_that_somebody_holds_cannot_be_claimed(folder: Path):
    with hold(folder), hold(folder), claim(folder) as is_ours:
        assert not is_ours
    with claim(folder) as is_ours:
        assert is_ours
    assert (folder / MANIFEST).read_text() == "{}"


def test_a_process_that_is_killed_lets_go(folder: Path):
    code = (
        "import sys, time; from pathlib import Path; from thumbloop.leases import hold\n"
        f"lease = hold(Path({str(folder)!r})); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with claim(folder) as is_ours:
            assert not is_ours
        other.kill()
        other.wait()
    with claim(folder) as is_ours:
        assert is_ours


def test_a_fork_that_lives_on_holds_nothing(folder: Path):
    lease = hold(folder)
    forked = os.dup(lease._handle)  # what a fork has: the same open file
    lease.close()
    with claim(folder) as is_ours:
        assert is_ours
    os.close(forked)


def test_who_comes_while_it_is_deleted_waits_and_hears_that_it_is_gone(folder: Path):
    heard: list[BadPolicyVersion] = []

    def come() -> None:
        try:
            hold(folder).close()
        except BadPolicyVersion as error:
            heard.append(error)

    with claim(folder) as is_ours:
        assert is_ours
        comer = threading.Thread(target=come)
        comer.start()
        comer.join(0.1)
        assert comer.is_alive()
        assert artifacts.set_aside(folder.parents[1], "default", 1) > 0
    comer.join(10)
    assert [error.reason for error in heard] == ["manifest_missing"]


def test_who_comes_while_it_is_only_looked_at_has_it(folder: Path):
    held = threading.Event()

    def come() -> None:
        with hold(folder):
            held.set()

    with claim(folder):
        comer = threading.Thread(target=come)
        comer.start()
        assert not held.wait(0.1)
    comer.join(10)
    assert held.is_set()


def test_what_is_not_there_cannot_be_held_and_may_be_claimed(tmp_path: Path):
    with pytest.raises(BadPolicyVersion) as raised:
        hold(tmp_path / "000007")
    assert raised.value.reason == "manifest_missing"
    with claim(tmp_path / "000007") as is_ours:
        assert is_ours


def test_where_files_cannot_be_locked_nobody_deletes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_handle: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(leases.fcntl, "flock", fail)
    with hold(folder):
        pass
    with pytest.raises(OSError, match="No locks"), claim(folder):
        pass
    assert fcntl.flock is fail
