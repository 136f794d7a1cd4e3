"""What `make bench-learning` makes of what its processes say; it is no test itself."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest import benchmark, learning, steps
from loadtest.beside import Shared, describe_sharing
from loadtest.episodes import PEER_STEPS, Learned, Reached, describe_episodes
from loadtest.figures import Figure
from loadtest.killing import describe_kills
from loadtest.learning import LEARNING
from loadtest.rounds import Round, describe_rounds
from loadtest.steps import PEERS, describe_steps, step
from loadtest.work import Line, Work, in_turn
from loadtest.workload import Answer, Throughput
from thumbloop.processes import ProcessFailed

MIB = 1 << 20


def line(seconds: float, peak: int, **more: Any) -> dict[str, Any]:
    sizes = {"peak_bytes": peak * MIB, "before_bytes": 100 * MIB}
    return {"seconds": [seconds], "optimizer_steps": 16, **sizes, **more}


LINES = {
    "ours": [line(4, 300, passes_s=[2]), line(6, 300, passes_s=[3])],
    "trl_0_11": [line(8, 600), line(12, 500)],
    "trl_0_11_in_parts": [line(9, 320), line(13, 240)],
    "trl_1_12": [line(16, 400), line(12, 700)],
}


def test_updates_are_compared_repeat_by_repeat():
    found = describe_steps(LINES)
    assert found["step.ratio_to_trl_0_11"] == Figure(0.5, 0.5, 0.5)
    assert found["step.ratio_to_trl_1_12"] == Figure(0.375, 0.25, 0.5)
    assert found["step.floor_ratio_to_trl_0_11"] == Figure(0.25, 0.25, 0.25)
    assert found["step.ours_passes_s"] == Figure(2.5, 2, 3)
    assert found["step.trl_1_12_seconds"] == Figure(14, 12, 16)
    assert found["step.trl_0_11_optimizer_steps"] == Figure(16, 16, 16)


def test_our_memory_is_compared_with_that_of_the_peer_that_takes_less():
    found = describe_steps(LINES)
    assert found["step.memory_ratio"] == pytest.approx((0.675, 0.6, 0.75))  # of 400, then of 500
    assert found["step.memory_ratio_in_parts"] == pytest.approx((1.09375, 0.9375, 1.25))
    assert found["step.trl_0_11_peak_mib"] == Figure(550, 500, 600)
    assert found["step.ours_before_mib"] == Figure(100, 100, 100)


def calls(tokens: int) -> Throughput:
    """One answer of so many tokens within a second."""
    return Throughput(1.0, (Answer(tokens, tokens),), (1.0,), 0)


SHARED = [Shared(calls(1), 1.0)]


BEST = {"liked": PEER_STEPS[0], "both": PEER_STEPS[0]}
LEARNED = Learned(Reached(1, 1.0), Reached(1, 1.0), 1)


def test_every_goal_is_of_a_figure_that_is_measured():
    once = [Round(1.0, {}, 64, 256, 16)]
    found = {
        *describe_steps(LINES),
        *describe_episodes([LEARNED], {"liked": [LEARNED], "both": [LEARNED]}, BEST),
        *describe_rounds({"ours": once, "first": once}),
        *describe_sharing(dict.fromkeys(("without", "together", "rested", "alone"), SHARED)),
        *describe_kills({"kills": 1, "wrong_states": 0, "places": [{"place": "x", "kills": 1}]}),
        "rollout.extra_tokens",  # a count of the demo's
    }
    assert LEARNING.goals.keys() <= found


def test_server_and_trainer_are_compared_with_themselves_alone_repeat_by_repeat():
    found = describe_sharing(
        {
            "without": [Shared(calls(100), 0.0), Shared(calls(200), 0.0)],
            "together": [Shared(calls(80), 1.0), Shared(calls(120), 0.5)],
            "rested": [Shared(calls(90), 0.5), Shared(calls(190), 0.25)],
            "alone": [Shared(None, 2.0), Shared(None, 2.0)],
        }
    )
    assert found["beside.serving_ratio"] == (0.7, 0.6, 0.8)
    assert found["beside.training_ratio"] == (0.375, 0.25, 0.5)
    assert found["beside.rested_serving_ratio"] == pytest.approx((0.925, 0.9, 0.95))
    assert found["beside.rested_training_ratio"] == pytest.approx((0.1875, 0.125, 0.25))
    assert found["beside.tokens_per_s"].value == 100


def test_each_update_runs_in_its_own_environment_on_the_same_job(
    work: Work, monkeypatch: pytest.MonkeyPatch
):
    run: list[list[str]] = []

    def canned(_self: Work, name: str, command: list[str], **_options: Any) -> list[Line]:
        run.append(command)
        return [Line(0.0, "words"), Line(1.0, json.dumps(LINES.get(name, [{}])[0]))]

    monkeypatch.setattr(Work, "run", canned)
    monkeypatch.setattr(steps, "environment", lambda name, folder: folder / name / "python")
    assert step(work)["step.ratio_to_trl_0_11"].value == 0.5
    frozen, *updates = run
    job = str(work.folder / "job.json")
    state = str(work.found.state)
    assert frozen[:3] == [sys.executable, "-m", "experiments.frozen"]
    assert frozen[3:7] == [state, "model", "2", job]
    pythons = {
        "experiments.update": sys.executable,
        **{
            f"loadtest.trl.step_{name.removeprefix('trl_')}": str(
                work.shared / "environments" / lock / "python"
            )
            for name, lock in PEERS.items()
        },
    }
    expected = [[python, "-m", module, job] for module, python in pythons.items()]
    in_parts = [*expected[1], "4"]
    assert updates == [*expected, in_parts, in_parts, *reversed(expected)]


def test_turns_alternate_in_order():
    taken: list[str] = []

    def turn(name: str) -> int:
        taken.append(name)
        return len(taken)

    results = in_turn({"a": lambda: turn("a"), "b": lambda: turn("b")}, 3)
    assert taken == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_what_a_command_measured_is_its_last_line(work: Work):
    program = (
        "import os; print('words'); print('{\"threads\": ' + os.environ['OMP_NUM_THREADS'] + '}')"
    )
    assert work.measured("one", [sys.executable, "-c", program]) == {"threads": 1}


def test_a_command_sees_no_gpu_unless_told(work: Work):
    program = "import json, os; print(json.dumps(os.environ['CUDA_VISIBLE_DEVICES']))"
    command = [sys.executable, "-c", program]
    assert work.measured("one", command) == ""
    assert work.measured("one", command, {"CUDA_VISIBLE_DEVICES": "3"}) == "3"


def test_a_command_that_fails_shows_its_last_words(work: Work):
    program = "raise SystemExit('error: 15 optimizer steps')"
    words = r"peer stopped with exit code 1; the end of .*/peer.log:\nerror: 15 optimizer steps"
    with pytest.raises(ProcessFailed, match=words):
        work.run("peer", [sys.executable, "-c", program])


def test_a_part_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit) as stopped:
        learning.main(part=["steps"], repeats=1, seed=0, folder=tmp_path)
    assert stopped.value.code == 2
    assert capsys.readouterr().out.startswith("error: --part: no steps; there are step")


def test_the_documents_table_has_its_place():
    words = (Path(benchmark.__file__).parent.parent / benchmark.TABLE).read_text()
    begin, end = LEARNING.marks
    assert words.index(begin) < words.index(end, words.index(begin))
