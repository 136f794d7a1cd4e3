"""scripts/packages with an apt-get that only takes notes."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
POLICY = Path("/usr/sbin/policy-rc.d")
APT = """#!/bin/sh
[ -x /usr/sbin/policy-rc.d ] && echo "$*" >>NOTES
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A machine with nothing on it but what the script itself needs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "env", "id", "chmod", "rm"):
        path = Path("/usr/bin") / name
        (folder / name).symlink_to(path if path.exists() else Path("/bin") / name)
    return folder


def install(tools: Path, *packages: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "scripts/packages", *packages]
    return subprocess.run(
        command, env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )


def add(tools: Path, name: str, text: str = "#!/bin/sh\n") -> None:
    (tools / name).unlink(missing_ok=True)
    (tools / name).write_text(text)
    (tools / name).chmod(0o755)


def test_what_is_there_is_not_installed(tools: Path):
    for name in ("prometheus", "promtool"):
        add(tools, name)
    done = install(tools, "prometheus")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_browser_that_is_there_is_not_installed(tools: Path):
    add(tools, "chromium")
    done = install(tools, "chromium")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_who_may_not_install_is_told_what_is_missing(tools: Path):
    add(tools, "id", "#!/bin/sh\necho 1000\n")
    add(tools, "prometheus")
    done = install(tools, "prometheus")
    assert done.returncode == 1
    assert done.stderr == (
        "packages: needs prometheus; on Debian or Ubuntu: sudo apt-get install prometheus\n"
    )


def test_another_name_is_refused(tools: Path):
    done = install(tools, "mysql")
    assert (done.returncode, done.stderr) == (
        1,
        "packages: mysql: expected prometheus, postgresql, chromium or kubernetes-client\n",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_a_package_is_installed_and_its_service_not_started(tools: Path, tmp_path: Path):
    notes = tmp_path / "notes"
    add(tools, "apt-get", APT.replace("NOTES", str(notes)))
    was_there = POLICY.exists()
    done = install(tools, "prometheus")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "packages: installing prometheus from Debian\n"
    assert notes.read_text().splitlines() == [
        "update -qq",
        "install -qq -y --no-install-recommends prometheus",
    ]
    assert POLICY.exists() == was_there
