"""One command, several processes: each is this command again with a rank of its own."""

import ctypes
import os
import signal
import socket
import sys
from subprocess import Popen, TimeoutExpired
from time import sleep

_POLL_S = 0.2
_STOP_TIMEOUT_S = 20.0
_PR_SET_PDEATHSIG = 1


def launch(count: int) -> int:
    """Run this command in so many processes until one ends, and with it all; return its exit code."""
    # As torch.distributed and accelerate expect it.
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    processes = [
        Popen(
            [*sys.orig_argv, "--rank", str(rank)],
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=_die_with_parent,
        )
        for rank in range(count)
    ]
    try:
        while all(process.poll() is None for process in processes):
            sleep(_POLL_S)
        code = next(p.returncode for p in processes if p.returncode is not None)
        return code if code >= 0 else 128 - code  # as a shell says which signal it was
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            _wait_for(process)


def _wait_for(process: Popen[bytes]) -> None:
    try:
        process.wait(_STOP_TIMEOUT_S)
    except TimeoutExpired:
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    """Ask the kernel for a SIGKILL when the launcher is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
