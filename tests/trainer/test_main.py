import asyncio
import json
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from experiments.consistency import Look, look
from tests.bench import Bench
from tests.serving import running
from tests.tiny_model import build_tiny_model
from tests.trainer.trainers import START_TIMEOUT_S, failure, settings_of, start, wait_for
from thumbloop import artifacts
from thumbloop.config import State
from thumbloop.config.trainer import Resources


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_trainer_at_once(tmp_path, tiny_model, number):
    state = tmp_path / "state"
    process = start(tmp_path, {"state": {"folder": str(state)}, "model": {"path": str(tiny_model)}})
    wait_for(process, "waiting for 80 new thumbs; version 0 is current")
    assert psutil.Process(process.pid).nice() == min(os.nice(0) + Resources().nice, 19)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.splitlines()[-1] == "stopped"
    assert [p.name for p in (state / "versions" / "default").iterdir()] == ["000000"]


def test_a_trainer_writes_json_where_that_is_wanted(tmp_path, tiny_model):
    process = start(
        tmp_path,
        {
            "state": {"folder": str(tmp_path / "state")},
            "model": {"path": str(tiny_model)},
            "logging": {"format": "json"},
        },
    )
    output = wait_for(process, "waiting for 80 new thumbs")
    process.terminate()
    process.communicate(timeout=60)
    said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    progress = [line["message"] for line in said if line["logger"] == "trainer"]
    assert progress[0].startswith("training on cpu")
    assert progress[-1].startswith("waiting for 80 new thumbs")


def test_what_a_killed_trainer_left_behind_is_removed(tmp_path, tiny_model):
    default = tmp_path / "state" / "versions" / "default"
    (default / "000001" / "policy").mkdir(parents=True)
    (default / ".000001.77.tmp").mkdir()
    settings = {"state": {"folder": str(tmp_path / "state")}, "model": {"path": str(tiny_model)}}
    process = start(tmp_path, settings)
    wait_for(process, "waiting for")
    process.terminate()
    process.communicate(timeout=60)
    assert [p.name for p in default.iterdir()] == ["000000"]


async def test_a_trainer_that_dies_leaves_the_server_serving_and_the_next_one_goes_on(
    tmp_path, tiny_model
):
    state = State(folder=tmp_path / "state")
    settings = {"state": {"folder": str(state.folder)}, "model": {"path": str(tiny_model)}}
    async with running(tiny_model, state) as server:
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
    wait_for(process, "round 1: 40 new thumbs, 8 preferences and ")
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
