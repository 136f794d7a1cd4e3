"""The update on a GPU, by stubs: no machine of the tests has one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest import benchmark, gpu
from loadtest.figures import Figure
from loadtest.learning import LEARNING
from loadtest.results import keep
from loadtest.work import Line, Work

MIB = 1 << 20
LINES = {
    "ours": {"seconds": [2.0], "peak_bytes": 3000 * MIB},
    "trl_1_12": {"seconds": [8.0], "peak_bytes": 4000 * MIB},
}


def test_without_a_gpu_nothing_is_measured(work: Work, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.gpu(work) == {}


@pytest.mark.parametrize(("seen", "taken"), [(None, "0"), ("2,3", "2")])
def test_updates_take_turns_on_one_gpu(
    work: Work, monkeypatch: pytest.MonkeyPatch, seen: str | None, taken: str
):
    run: list[list[str]] = []

    def canned(_self: Work, name: str, command: list[str], **options: Any) -> list[Line]:
        assert options["environment"] == {"CUDA_VISIBLE_DEVICES": taken}
        run.append(command)
        return [Line(0.0, json.dumps(LINES.get(name)))]

    def environment(name: str, folder: Path, *, has_gpu: bool) -> Path:
        assert has_gpu
        return folder / name

    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Work, "run", canned)
    monkeypatch.setattr(gpu, "environment", environment)
    found = gpu.gpu(work)
    assert found["gpu.bfloat16.ratio_to_trl_1_12"] == Figure(0.25, 0.25, 0.25)
    assert found["gpu.bfloat16.memory_ratio"] == Figure(0.75, 0.75, 0.75)
    assert found["gpu.bfloat16.trl_1_12_seconds"].value == 8
    assert found["gpu.bfloat16.ours_peak_mib"].value == 3000
    made, *updates = run
    job = str(work.folder / "job.json")
    assert made[1:] == ["-m", "experiments.sized", str(work.folder / "model"), job]
    ours = [sys.executable, "-m", "experiments.update", job]
    peer = str(work.shared / "environments" / "trl-1.12.0")
    theirs = [peer, "-m", "loadtest.trl.step_1_12", job]
    assert updates == [ours, theirs, theirs, ours]


def test_the_table_is_written_without_a_gpu_and_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    document = tmp_path / "benchmarks.md"
    begin, end = LEARNING.marks
    document.write_text(f"{begin}\n{end}\n")
    monkeypatch.setattr(benchmark, "TABLE", document)
    for part in LEARNING.parts:
        folder = tmp_path / "float32" / part
        folder.mkdir(parents=True)
        figures = {} if part == "gpu" else {f"{part}.seconds": Figure(1, 1, 1)}
        keep(folder, {"cores": 2}, figures, commit="later" if part == "gpu" else "one")
    LEARNING.summarise(tmp_path, {"cores": 2})
    words = document.read_text()
    assert "`kill.seconds`" in words
    assert "gpu" not in words
    assert "later" not in words
