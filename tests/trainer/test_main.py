import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sqlalchemy import text

from experiments.consistency import Look, look
from tests.bench import Bench
from tests.serving import running
from tests.tiny_model import build_tiny_model
from thumbloop import artifacts
from thumbloop.config import State
from thumbloop.config.trainer import Resources
from thumbloop.errors import SettingsError
from trainer import __main__ as trainer_main

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def start(
    folder: Path, settings: dict, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen:
    config = folder / "trainer.yaml"
    config.write_text(yaml.safe_dump({"metrics": {"port": 0}, **settings}))
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **environment},
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


def settings_of(bench: Bench, state: Path | None = None, **round_settings: int) -> dict:
    """Return settings with which a trainer goes on where the bench ends."""
    settings = bench.config.model_dump(mode="json", exclude_defaults=True)
    settings["state"] = {"folder": str(state or bench.config.state.folder)}
    settings["round"] |= round_settings
    return settings


def test_of_two_trainers_one_publishes_and_the_other_stops_with_a_clear_message(tmp_path, bench):
    bench.rate(40)
    trainers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        trainers.append(start(tmp_path / name, settings_of(bench)))
    deadline = time.monotonic() + START_TIMEOUT_S
    while all(each.poll() is None for each in trainers) and time.monotonic() < deadline:
        time.sleep(0.05)
    winner, loser = sorted(trainers, key=lambda each: each.poll() is not None)
    output, _ = loser.communicate(timeout=START_TIMEOUT_S)
    assert loser.returncode == 2
    assert output.splitlines() == [
        f"error: state.folder: another trainer works on {bench.config.state.folder}; stop it first"
    ]
    wait_for(winner, "published version 1")
    winner.terminate()
    winner.communicate(timeout=60)
    assert (bench.versions(), len(bench.rounds())) == ([0, 1], 1)


def test_a_round_whose_process_is_killed_is_the_next_ones(tmp_path, bench):
    bench.rate(40)
    bench.prefer(8)
    before, settings = looked(bench).outcome, settings_of(bench, max_rounds=1)
    process = start(tmp_path, settings)
    wait_for(process, "round 1: ")
    with bench.engine.begin():  # until it is killed nothing can be published
        wait_for(process, "  reward fit ")
        process.kill()
        process.communicate(timeout=60)
    found = looked(bench)
    assert (process.returncode, found.outcome, found.wrong) == (-signal.SIGKILL, before, [])
    process = start(tmp_path, settings)
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0, output
    assert output.count("published version 1") == 1
    bench.adopt(1)
    found = looked(bench)
    assert (found.wrong, found.leftovers) == ([], [])
    ((parent, version, _, _, used),) = found.outcome.rounds
    assert (parent, version, len(used["new"]), len(used["preference"])) == (0, 1, 40, 8)
    assert found.outcome.new_feedback == 0


def looked(bench: Bench) -> Look:
    """Look at the state folder of a bench that other processes use, too."""
    bench.engine.dispose()  # whoever closes a copied file drops the locks that its process has on it
    return look(bench.config.state.folder)


def refusal(folder: Path, settings: dict) -> str:
    """Return the last line of a trainer that stops in the middle of its work."""
    process = start(folder, settings)
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 2, output
    return output.strip().splitlines()[-1]


def test_an_altered_parent_is_not_trained_from(tmp_path, bench):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    weights = bench.config.state.versions / "default/000001/policy" / artifacts.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    line = refusal(tmp_path, settings_of(bench))
    assert line.startswith("error: file_altered: 000001: policy/adapter_model.safetensors")
    assert (bench.versions(), len(bench.rounds())) == ([0, 1], 1)


def test_another_base_model_is_refused(tmp_path, bench):
    other = build_tiny_model(tmp_path / "other", seed=1)
    line = failure(tmp_path, settings_of(bench) | {"model": {"path": str(other)}})
    assert line.startswith("error: model.path: this state folder belongs to another base model")


def test_a_store_of_a_newer_release_is_refused_and_left_as_it_is(tmp_path, bench):
    bench.rate(1)
    with bench.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    bench.engine.dispose()
    file = bench.config.state.folder / "thumbloop.db"
    before = file.read_bytes()
    line = failure(tmp_path, settings_of(bench))
    assert line.startswith("error: state: the store was written by a newer release")
    assert file.read_bytes() == before


def test_a_start_on_a_locked_database_says_so_after_ten_seconds_and_changes_nothing(
    tmp_path, bench
):
    bench.rate(40)
    before = looked(bench)
    holder = sqlite3.connect(bench.config.state.folder / "thumbloop.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    line = failure(tmp_path, settings_of(bench))
    holder.close()
    assert line == "error: state: the database does not answer: database is locked"
    assert looked(bench) == before


def test_the_same_store_and_seed_give_the_same_version(tmp_path, bench):
    """Whatever the order in which Python's sets come, which differs from process to process."""
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    bench.engine.dispose()
    found = []
    for hash_seed in ("1", "2"):
        state = tmp_path / f"state {hash_seed}"
        shutil.copytree(bench.config.state.folder, state)
        process = start(
            tmp_path, settings_of(bench, state, max_rounds=1), {"PYTHONHASHSEED": hash_seed}
        )
        output, _ = process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == 0, output
        manifest = artifacts.read_manifest(state / "versions/default/000002")
        found.append((manifest.files, manifest.probes, manifest.metrics, manifest.policy_adapter))
    assert found[0] == found[1]
    assert "value/value_head.safetensors" in found[0][0]


def test_an_unknown_setting_is_refused(tmp_path):
    assert "ppo.epoch: unknown setting" in failure(tmp_path, {"ppo": {"epoch": 3}})


def test_a_missing_model_is_refused(tmp_path):
    line = failure(tmp_path, {"model": {"path": str(tmp_path / "nowhere")}})
    assert line.startswith("error: model.path: ")


def adapters_of(state: Path, version: int) -> dict[str, torch.Tensor]:
    folder = state / "versions" / artifacts.folder_of("default", version)
    return {
        f"{name}/{key}": value
        for name in (artifacts.POLICY, artifacts.REWARD)
        for key, value in load_file(folder / name / artifacts.WEIGHTS).items()
    }


def test_two_processes_learn_together_what_one_learns_alone(tmp_path, bench):
    bench.rate(64)
    bench.engine.dispose()
    learned = {}
    for count in (1, 2):
        folder = tmp_path / f"of {count}"
        shutil.copytree(bench.config.state.folder, folder / "state")
        settings = settings_of(bench, folder / "state", max_rounds=1)
        settings["resources"] = {"device": "cpu", "processes": count}
        process = start(folder, settings)
        output, _ = process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == 0, output
        assert ("in 2 processes" in output) == (count == 2)
        assert output.count("published version 1") == 1
        learned[count] = adapters_of(folder / "state", 1)
    assert any(weights.abs().max() > 1e-3 for weights in learned[1].values())
    # Sums in another order: Adam makes whole steps, of 3e-3, of gradients that are hardly more than rounding.
    torch.testing.assert_close(learned[2], learned[1], atol=1e-3, rtol=1e-3)


def test_a_signal_stops_all_processes(tmp_path, model):
    settings = {
        "state": {"folder": str(tmp_path / "state")},
        "model": {"path": str(model)},
        "resources": {"device": "cpu", "processes": 2},
    }
    process = start(tmp_path, settings)
    wait_for(process, "waiting for 80 new thumbs; version 0 is current")
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert "stopped" in output
    gone, alive = psutil.wait_procs(everybody, timeout=30)
    assert len(gone) >= 3
    assert not alive


def test_when_the_launcher_is_killed_its_processes_end_and_another_trainer_may_start(
    tmp_path, model
):
    settings = {"state": {"folder": str(tmp_path / "state")}, "model": {"path": str(model)}}
    of_two = settings | {"resources": {"device": "cpu", "processes": 2}}
    launcher = start(tmp_path, of_two)
    wait_for(launcher, "waiting for 80 new thumbs")
    ranks = psutil.Process(launcher.pid).children()
    launcher.kill()
    deadline = time.monotonic() + 5
    while (left := [each for each in ranks if is_alive(each)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for each in left:
        each.kill()
    launcher.communicate(timeout=60)
    assert (len(ranks), left) == (2, [])
    process = start(tmp_path, settings)
    wait_for(process, "waiting for 80 new thumbs")
    process.terminate()
    process.communicate(timeout=60)


def is_alive(process: psutil.Process) -> bool:
    """Say whether a process runs; one that ended may be there until somebody asks how."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("error", "rank", "line"),
    [
        (SettingsError("model.path: none"), None, "error: model.path: none"),
        (SettingsError("model.path: none"), 0, "error: process 0: model.path: none"),
        (SettingsError("model.path:\nnone"), 1, "error: process 1: model.path: none"),
        (
            torch.OutOfMemoryError("9 GiB are free"),
            1,
            "error: process 1: too little GPU memory, a smaller resources.micro_batch_tokens needs less: 9 GiB are free",
        ),
    ],
)
def test_whichever_process_fails_says_why_in_a_line(monkeypatch, capsys, error, rank, line):
    def fail(_settings, _rank):
        raise error

    monkeypatch.setattr(trainer_main, "train", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        trainer_main.main(None, rank)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{line}\n"
