"""Commands that a benchmark runs to their end, or to its own."""

import sys
import time

import psutil
import pytest

from loadtest import work as work_module
from loadtest.work import Work

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_interrupted_command_takes_what_it_started_with_it(
    work: Work, monkeypatch: pytest.MonkeyPatch
):
    said: list[int] = []

    def interrupted(_at: float, words: str) -> None:
        said.append(int(words))
        assert is_running(said[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(work_module, "Line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.run("parent", [sys.executable, "-c", PARENT])
    deadline = time.monotonic() + 10
    while is_running(said[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(said[0])
