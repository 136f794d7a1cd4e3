"""Every command on canned runs: what it writes, draws and says, without learning anything."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments import arms, attack, propensity
from experiments.__main__ import COMMANDS, app

ESTIMATED = {
    f"{name}_child{end}": value
    for name in ("snips", "dr")
    for end, value in (("", 0.5), ("_low", 0.25), ("_high", 0.75))
}


ARMS = {
    arm.name: place for module in COMMANDS for place, arm in enumerate(getattr(module, "ARMS", ()))
}


def learned(task: arms.Task) -> dict[str, Any]:
    """A run of two rounds, of which the second publishes a version."""
    better = 0.05 * ARMS[task.arm.name]  # every arm has an end of its own
    rates = [0.3, 0.3, 0.9 - better - 0.01 * task.seed]
    return {
        "arm": task.arm.name,
        "preference": task.preference,
        "seed": task.seed,
        "examined": [
            {"version": max(0, i - 1), "thumbs": 80 * i, "rate": rate, "mean_tokens": 20.0}
            for i, rate in enumerate(rates)
        ],
        "rounds": [
            {"version": version, "metrics": {"reward_auroc_bound": 0.5, **ESTIMATED}}
            for version in (None, 1)
        ],
        "reward": {"auroc": 0.97, "calibration_error": 0.03, "candidates": 600},
    }


def fitted(task: propensity.Task) -> list[dict[str, Any]]:
    """What one logging run finds of each fit."""
    return [
        {**task._asdict(), "variant": variant, "auroc": 0.9 + 0.01 * i, "calibration_error": 0.1}
        for i, variant in enumerate(propensity.VARIANTS)
    ]


def attacked(task: attack.Task) -> dict[str, Any]:
    """A run whose trigger rate rises with the place of its arm."""
    end = attack.Said(2, 400, task.thumbs, liked=0.9, trigger=0.05 + 0.1 * ARMS[task.arm.name])
    start = attack.Said(0, 0, 0, liked=0.3, trigger=0.06)
    return {
        "arm": task.arm.name,
        "seed": task.seed,
        "versions": [start._asdict(), end._asdict()],
        "shown": end._replace(liked=0.95)._asdict(),
    }


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(attack, "_TRIALS", 2)

    def call(name: str, *options: str) -> tuple[dict[str, Any], str]:
        for module, canned in ((arms, learned), (propensity, fitted), (attack, attacked)):
            monkeypatch.setattr(
                module, "run_all", lambda _run, tasks, _jobs, of=canned: [of(t) for t in tasks]
            )
        result = CliRunner().invoke(app, [name, "--folder", str(tmp_path), *options])
        assert result.exit_code == 0, result.output
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
        return json.loads((tmp_path / f"{name}.json").read_text()), result.output

    return call


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("learning", "all: median 160"),
        ("propensity", "well specified: auroc 0.900"),
        ("candidates", "against all candidates -0.050 (-0.050 to -0.050)"),
        ("truncation", "against bootstrapped -0.050 (-0.050 to -0.050)"),
        ("stages", "supervised alone: policy rate 0.795"),
        ("controls", "constant reward: change 0.545"),
        ("gate", "2 of 2 runs published; versions by run: [1, 1]"),
        ("hack", "no gate: worst 1.000"),
        ("front", "thumbs 0.6: rate 0.795, 20.0 tokens"),
        ("attack", "attack: policy_trigger 0.250 (0.250 to 0.250), over no attack 0.200"),
    ],
)
def test_each_command_says_writes_and_draws_what_it_found(call, name: str, says: str):
    report, output = call(name, "--seeds", "2")
    assert says in output
    assert report["runs"]


def test_estimates_are_counted_by_whether_the_rate_is_inside(call):
    report, _ = call("learning", "--seeds", "1")
    # The rate, slips counted, is 0.82: outside of 0.25 to 0.75, for each of three preferences.
    assert (report["off_policy"]["dr"]["versions"], report["off_policy"]["dr"]["inside"]) == (3, 0)
