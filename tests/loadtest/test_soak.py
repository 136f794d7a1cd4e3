"""The soak, short: real processes where they start quickly, the judge's word on what came of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest import soak, soak_claims
from loadtest.journal import OK, Entry
from loadtest.soak_swaps import _compared, latencies, prompts_of

CLEAN = dict.fromkeys(
    ("mixed_replies", "unstored_replies", "lost_thumbs", "thumbs_learned_twice"), 0
)
MOVED = {"versions_published": 1, "trials": 1, "operators_moves": 1}
KILLED = CLEAN | MOVED
SWAPPED = CLEAN | {"prompts_told_apart": 1}


def call(began: float, took: float, prompt: int | None = None) -> Entry:
    return Entry("generate", began, began + took, OK, prompt, {"version": 1})


def happened(kind: str, at: float) -> Entry:
    return Entry(kind, at, at, OK, None, {})


SWAPS = [happened("swap", 2.0), happened("swap", 6.0)]


@pytest.mark.parametrize(
    ("began", "is_near", "is_far"),
    [
        (1.4, False, False),
        (1.6, True, False),
        (2.4, True, False),
        (2.6, False, False),
        (3.4, False, False),
        (3.6, False, True),
        (4.4, False, True),
        (6.4, True, False),
        (6.6, False, False),
    ],
)
@pytest.mark.parametrize("took", [0.1, 3.0])
def test_latencies_around_swaps_are_told_from_those_between_by_when_calls_began(
    began: float, took: float, is_near: bool, is_far: bool
):
    near, far = latencies([*SWAPS, call(began, took)])
    assert (any(near), any(far)) == (is_near, is_far)
    assert sum(map(sum, near + far)) == pytest.approx(took * (is_near + is_far))


def test_the_ratio_is_of_guided_replies_with_an_interval():
    swaps = [happened("swap", 4.0 * n) for n in range(1, 41)]
    slow = [call(4.0 * n, 0.2 + n / 1000) for n in range(1, 41)]
    quick = [call(4.0 * n + 2.0, 0.1 + n / 1000) for n in range(1, 40)]
    greedy = [call(4.0, 9.0, prompt=0)]
    found = _compared([*swaps, *slow, *quick, *greedy])["latency_s"]
    assert found["around_swaps"]["requests"] == 40
    assert found["half_way_between"]["requests"] == 39
    assert found["p99_ratio"] == pytest.approx(0.24 / 0.139, rel=0.01)
    low, high = found["p99_ratio_95_percent"]
    assert low <= found["p99_ratio"] <= high
    assert high / low < 1.1


def test_without_requests_there_is_no_ratio():
    assert "p99_ratio" not in _compared(SWAPS)["latency_s"]


def test_prompts_are_short_and_long_and_begin_alike():
    prompts = prompts_of(
        [f"How was film number {n}, and would you see it again?" for n in range(400)]
    )
    assert len(prompts) == len(set(prompts)) == 400
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 60
    assert lengths[-1] > 1500
    assert prompts[-1][:1000] == prompts[-5][:1000] != prompts[-2][:1000]


@pytest.mark.parametrize(
    ("report", "wrong"),
    [
        ({"swaps": SWAPPED | {"failed": 0}, "kills": KILLED}, []),
        ({"swaps": SWAPPED | {"failed": 1}}, ["swaps.failed"]),
        ({"swaps": SWAPPED | {"alone_failed": 1}}, ["swaps.alone_failed"]),
        ({"swaps": SWAPPED | {"not_taken": 3}}, ["swaps.not_taken"]),
        ({"swaps": CLEAN}, ["swaps.prompts_told_apart"]),
        ({"kills": KILLED | {"lost_thumbs": 1}}, ["kills.lost_thumbs"]),
        ({"kills": KILLED | {"mixed_replies": 2}}, ["kills.mixed_replies"]),
        ({"kills": KILLED | {"not_serving": "for"}}, ["kills.not_serving"]),
        *(({"kills": KILLED | {name: 0}}, [f"kills.{name}"]) for name in MOVED),
        ({"kills": KILLED | {"crashed": ["the trainer stopped"]}}, ["kills.crashed"]),
        ({"kills": KILLED | {"lost_moves": 1}}, ["kills.lost_moves"]),
        ({"swaps": SWAPPED | {"answered_after_rollback": 1}}, ["swaps.answered_after_rollback"]),
        ({"kills": KILLED | {"not_one_current": 1}}, ["kills.not_one_current"]),
        ({"kills": KILLED | {"users_on_both_sides": 1}}, ["kills.users_on_both_sides"]),
    ],
)
def test_one_wrong_thing_is_enough(report: dict[str, Any], wrong: list[str]):
    assert soak.wrongs(report) == wrong


def test_goals_of_times_are_told_apart_from_what_is_wrong():
    def report(
        first: float | None, ratio: float | None, silent: int = 0, back: float = 0.5
    ) -> dict[str, Any]:
        apart = {
            "never_answered": silent,
            "publish_to_first_reply_s": {} if first is None else {"p99": first},
            "latency_s": {} if ratio is None else {"p99_ratio": ratio},
        }
        rollbacks = {"refused": 0, "taken_s": {"p100": back}}
        return {"swaps": SWAPPED | {"apart": apart, "rollbacks": rollbacks}}

    assert soak.missed(report(0.9, 1.0)) == []
    assert soak.missed(report(1.1, 1.0)) == ["swaps.apart.publish_to_first_reply_s"]
    assert soak.missed(report(0.9, 1.2)) == ["swaps.apart.latency_s.p99_ratio"]
    assert soak.missed(report(0.9, 1.0, silent=1)) == ["swaps.apart.publish_to_first_reply_s"]
    assert soak.missed(report(0.9, 1.0, back=1.1)) == ["swaps.rollbacks.taken_s"]
    unmeasured = report(0.9, 1.0)
    unmeasured["swaps"]["rollbacks"] = {"refused": 1, "taken_s": {}}
    assert soak.missed(unmeasured) == ["swaps.rollbacks.taken_s"]
    assert len(soak.missed(report(None, None))) == 2  # what was not measured was not met
    assert soak.wrongs(report(9.0, 9.0)) == []


def test_a_part_leaves_the_others_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def found(*_arguments: Any, **_options: Any) -> dict[str, Any]:
        return KILLED

    monkeypatch.setattr(soak, "soak", found)
    (tmp_path / "report.json").write_text(json.dumps({"trials": {"kinds": {}}}))
    application = soak.typer.Typer()
    application.command()(soak.main)
    done = CliRunner().invoke(application, ["--part", "kills", "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {
        "trials": {"kinds": {}},
        "kills": KILLED,
    }
    wrong = CliRunner().invoke(application, ["--part", "sweeps", "--folder", str(tmp_path)])
    assert wrong.exit_code == 2


def test_goals_of_trials_and_attacks_are_shares_of_runs():
    def trials(name: str, verdict: str, share: float) -> dict[str, Any]:
        return {"trials": {"kinds": {name: {"promote": {"share": 0.0}, verdict: {"share": share}}}}}

    def attack(over: float) -> dict[str, Any]:
        found = {"shown_trigger": {"over_no_attack": {"mean": over}}}
        return {"attack": {"summary": {"attack": found, "attack, no defence": {}}}}

    assert soak.missed(trials("+0.00", "promote", 0.05)) == []
    assert soak.missed(trials("+0.00", "promote", 0.06)) == ["trials.+0.00.promote"]
    assert soak.missed(trials("-0.15", "roll_back", 0.95)) == []
    assert soak.missed(trials("-0.15", "roll_back", 0.94)) == ["trials.-0.15.roll_back"]
    assert soak.missed(trials("+0.15", "promote", 0.94)) == ["trials.+0.15.promote"]
    assert soak.missed(attack(0.02)) == []
    assert soak.missed(attack(0.03)) == ["attack.shown_trigger"]


def test_an_experiment_is_run_as_a_part(tmp_path: Path):
    found = soak_claims.run("trials", tmp_path, "--runs", "1")
    assert found["runs"] == 1
    assert {"+0.00", "-0.05", "-0.15", "+0.15"} <= set(found["kinds"])
