"""Environments for what cannot be installed beside us: made from a lock, kept while it holds."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

_LOCKS = Path("locks")
_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # of scripts/setup
_STAMP = "set-up"
_LAST_LINES = 5


class NotInstalled(Exception):
    """An environment could not be made; the message says what failed, and which log holds it."""


def environment(name: str, folder: Path, *, has_gpu: bool = False) -> Path:
    """Return the Python of an environment in `folder` that holds what locks/<name>.txt names.

    One for a GPU stands beside the other, and has the build of torch that the index gives by itself.
    It is made where it is missing, and made anew where the lock, our own Python or its place has
    changed since. Raises NotInstalled.
    """
    lock = _LOCKS / f"{name}.txt"
    name = f"{name}-gpu" if has_gpu else name
    home = (folder / name).absolute()
    python, stamp = home / "bin" / "python", home / _STAMP
    contents = f"{sys.version}\n{home}\n{sha256(lock.read_bytes()).hexdigest()}\n"
    if stamp.is_file() and stamp.read_text() == contents:
        return python
    shutil.rmtree(home, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    log.write_text("")
    if not _succeeds([sys.executable, "-m", "venv", str(home)], log):
        raise _not_installed(name, "creating it", log)
    pip = (str(python), "-m", "pip", "install", "--disable-pip-version-check")
    torch = torch_in(lock.read_text())
    if not has_gpu:
        _install_cpu_torch(name, [*pip, "--no-deps"], f"{torch}+cpu", log)
    elif not _succeeds([*pip, torch], log):  # with CUDA's libraries, which the lock does not name
        raise _not_installed(name, f"installing {torch}", log)
    if not _succeeds([*pip, "--no-deps", "-r", str(lock)], log):
        raise _not_installed(name, f"installing {lock}", log)
    stamp.write_text(contents)  # last: one that was interrupted has none
    return python


def torch_in(lock: str) -> str:
    """Return the torch that a lock names."""
    found = re.search(r"^torch==(\S+)$", lock, re.MULTILINE)
    assert found is not None, "a lock of an environment names torch"
    return found[0]


def _install_cpu_torch(name: str, pip: Sequence[str], torch: str, log: Path) -> None:
    """Install the CPU build as scripts/setup does: from the configured indexes, or its own."""
    if not _succeeds([*pip, torch], log) and not _succeeds(
        [*pip, "--index-url", _TORCH_CPU_INDEX, torch], log
    ):
        raise _not_installed(name, f"installing {torch}", log)


def _succeeds(command: Sequence[str], log: Path) -> bool:
    """Run a command, keeping what it prints; say whether it succeeded."""
    with log.open("a") as output:
        return not subprocess.run(command, stdout=output, stderr=output, check=False).returncode


def _not_installed(name: str, what: str, log: Path) -> NotInstalled:
    words = "\n".join(log.read_text().splitlines()[-_LAST_LINES:])
    return NotInstalled(f"the environment {name}: {what} failed; the end of {log}:\n{words}")
