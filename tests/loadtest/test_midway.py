import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.midway import NotMidway, choose, find_or_make


def version(number: int, rate: float | None) -> dict[str, Any]:
    return {"policy_version": number, "policy_thumb_up_rate": rate}


def test_the_version_nearest_to_half_way_is_chosen():
    known = [version(0, 0.55), version(1, 0.45), version(2, 0.6), version(3, 0.9)]
    assert choose(known) == (2, 0.6)


@pytest.mark.parametrize(
    "known",
    [
        [version(0, 0.5), version(1, 0.3), version(2, 0.8)],
        [version(0, 0.5), version(1, 0.5)],
        [version(0, 0.5), version(1, None), version(2, None)],
    ],
)
def test_a_run_without_one_says_what_to_do(known: list[dict[str, Any]]):
    with pytest.raises(NotMidway, match="take another SEED"):
        choose(known)


def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: str) -> None:
    """Let a shell script take the place of Python, and so of the demo."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{commands}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_demo_that_is_interrupted_gets_to_stop_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped = tmp_path / "stopped"
    stops = f"trap 'sleep 0.5; touch {stopped}; exit 1' TERM"
    interrupts, waits = "sleep 0.5; kill -USR1 $PPID", "while :; do sleep 0.05; done"
    demo(tmp_path, monkeypatch, f"{stops}\n{interrupts}\n{waits}")
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            find_or_make(tmp_path / "policy", 0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stopped.exists()


def test_a_demo_that_fails_is_no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    demo(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        find_or_make(tmp_path / "policy", 0)
