"""Work in forked processes: a child starts with everything imported, and may be killed at any time.

Only a process that has run no torch operation may fork: torch's threads do not come along.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils.logging import disable_progress_bar

HUNG_S = 120.0
"""Seconds after which a child that should have ended is killed."""
_POLL_S = 0.002


class Ended(NamedTuple):
    """How a child ended: by which signal, or with which exit code; its last words where it failed."""

    signal: int = 0
    code: int = 0
    words: str = ""


FINISHED = Ended()


def run(work: Callable[[], object], log: Path, *, kill_after_s: float = HUNG_S) -> Ended:
    """Work in a child, which is killed after some seconds; what it prints goes to the log."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _work_and_exit(work, log)
    status = _wait(pid, kill_after_s)
    if os.WIFSIGNALED(status):
        ended = Ended(signal=os.WTERMSIG(status))
        return ended._replace(words="it hung") if time.monotonic() - started >= HUNG_S else ended
    code = os.WEXITSTATUS(status)
    return Ended(code=code, words=_last_words(log)) if code else FINISHED


def finish(work: Callable[[], object], log: Path) -> None:
    """Work in a child. Raises RuntimeError: it failed, or hung."""
    ended = run(work, log)
    if ended != FINISHED:
        raise RuntimeError(f"a child ended by signal {ended.signal}, {ended.words}; see {log}")


def _wait(pid: int, kill_after_s: float) -> int:
    """Return the child's wait status."""
    deadline = time.monotonic() + kill_after_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(_POLL_S)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _work_and_exit(work: Callable[[], object], log: Path) -> None:
    """Work in this process and end it: nothing of the parent's is run or flushed on the way."""
    code = 1
    try:
        torch.set_num_threads(1)
        disable_progress_bar()
        sys.stdout = sys.stderr = log.open("w")
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _last_words(log: Path) -> str:
    lines = log.read_text().strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "without a word"
