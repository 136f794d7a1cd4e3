import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.serving import running
from tests.tiny_model import build_tiny_model
from thumbloop.config import State
from thumbloop.config.trainer import Resources
from thumbloop.store import open_store

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def start(folder: Path, settings: dict) -> subprocess.Popen:
    config = folder / "trainer.yaml"
    config.write_text(yaml.safe_dump({"metrics": {"port": 0}, **settings}))
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen, words: str) -> str:
    """Read lines until one holds the words."""
    seen, deadline = "", time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        seen += line
        if words in line:
            return seen
        if not line:
            break
    raise AssertionError(f"never said {words!r}:\n{seen}")


def failure(folder: Path, settings: dict) -> str:
    """Return the one line that a trainer refuses to start with."""
    process = start(folder, settings)
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 2, output
    (line,) = output.strip().splitlines()
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_trainer_at_once(tmp_path, model, number):
    state = tmp_path / "state"
    process = start(tmp_path, {"state": {"folder": str(state)}, "model": {"path": str(model)}})
    wait_for(process, "waiting for 80 new thumbs; version 0 is current")
    assert psutil.Process(process.pid).nice() == min(os.nice(0) + Resources().nice, 19)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.splitlines()[-1] == "stopped"
    assert [p.name for p in (state / "versions" / "default").iterdir()] == ["000000"]


def test_what_a_killed_trainer_left_behind_is_removed(tmp_path, model):
    default = tmp_path / "state" / "versions" / "default"
    (default / "000001" / "policy").mkdir(parents=True)
    (default / ".000001.77.tmp").mkdir()
    settings = {"state": {"folder": str(tmp_path / "state")}, "model": {"path": str(model)}}
    process = start(tmp_path, settings)
    wait_for(process, "waiting for")
    process.terminate()
    process.communicate(timeout=60)
    assert [p.name for p in default.iterdir()] == ["000000"]


async def test_a_trainer_that_dies_leaves_the_server_serving_and_the_next_one_goes_on(
    tmp_path, model
):
    state = State(folder=tmp_path / "state")
    settings = {"state": {"folder": str(state.folder)}, "model": {"path": str(model)}}
    async with running(model, state) as server:
        process = start(tmp_path, settings)
        await asyncio.to_thread(wait_for, process, "waiting for 80 new thumbs")
        process.kill()
        process.communicate(timeout=60)
        reply = await server.generate("a b c")
        await server.client.rate(reply.response_id, up=True)
        process = start(tmp_path, settings)
        await asyncio.to_thread(wait_for, process, "waiting for 80 new thumbs")
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_second_trainer_is_refused(tmp_path, model):
    state = State(folder=tmp_path / "state")
    open_store(state).dispose()
    with (state.folder / "trainer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = failure(
            tmp_path, {"state": {"folder": str(state.folder)}, "model": {"path": str(model)}}
        )
    assert "another trainer works on" in line


def test_an_unknown_setting_is_refused(tmp_path):
    assert "ppo.epoch: unknown setting" in failure(tmp_path, {"ppo": {"epoch": 3}})


def test_a_missing_model_is_refused(tmp_path):
    line = failure(tmp_path, {"model": {"path": str(tmp_path / "nowhere")}})
    assert line.startswith("error: model.path: ")
