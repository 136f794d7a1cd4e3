"""One trainer in several processes."""

import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.trainers import START_TIMEOUT_S, settings_of, start, wait_for
from thumbloop import artifacts
from thumbloop.config import State
from thumbloop.errors import SettingsError
from trainer import __main__ as trainer_main
from trainer import training


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


def test_a_signal_stops_all_processes(tmp_path, tiny_model):
    settings = {
        "state": {"folder": str(tmp_path / "state")},
        "model": {"path": str(tiny_model)},
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


def test_when_the_launcher_is_killed_its_processes_end_and_hold_no_lock(tmp_path, tiny_model):
    settings = {"state": {"folder": str(tmp_path / "state")}, "model": {"path": str(tiny_model)}}
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
    with training.only_trainer_of(State(folder=tmp_path / "state")):
        pass


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
    def fail(_settings, _folder, _rank):
        raise error

    monkeypatch.setattr(training, "_train", fail)
    monkeypatch.setattr(trainer_main, "locate", lambda _model: Path("model"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        trainer_main.main(None, rank)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{line}\n"
