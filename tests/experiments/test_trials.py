"""Simulated trials: the quick way through them is the server's, and their users are as they say."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import trials
from experiments.trials import ALPHA, draw_thumbs, fixed_users, follow, votes_of
from server.trial import Verdict, Vote, judge, weigh


@pytest.mark.parametrize("step", [0.0, -0.3, 0.3])
@pytest.mark.parametrize("by_thumb", [False, True])
def test_a_trial_ends_where_the_server_ends_it(
    step: float, by_thumb: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trials, "HORIZON", 60)
    for seed in range(8):
        thumbs = draw_thumbs(np.random.default_rng(seed), step, 2000)
        votes, _ = votes_of(thumbs, by_thumb=by_thumb)
        verdict, count = Verdict.WAIT, 0
        while verdict is Verdict.WAIT and count < len(votes):
            count += 1
            evidence = weigh(votes[:count])
            verdict = judge(evidence, promote_alpha=ALPHA, roll_back_alpha=ALPHA, horizon=60)
        assert follow(votes) == (verdict, count), seed


def test_a_user_has_one_vote_however_many_thumbs_come_from_it():
    thumbs = draw_thumbs(np.random.default_rng(0), 0.0, 5000)
    votes, after = votes_of(thumbs, by_thumb=False)
    assert len(votes) == len(set(thumbs.users.tolist()))
    assert after == sorted(after)
    assert len(votes_of(thumbs, by_thumb=True)[0]) == 5000
    heaviest = np.bincount(thumbs.users).max()
    assert heaviest > 50


@pytest.mark.parametrize("step", [0.0, -0.15, 0.15])
def test_users_of_the_canary_like_it_by_the_step_more(step: float):
    ups = {True: [], False: []}
    for seed in range(20):
        for vote in votes_of(draw_thumbs(np.random.default_rng(seed), step, 3000), by_thumb=False)[
            0
        ]:
            ups[vote.is_canary].append(vote.value)
    assert np.mean(ups[False]) == pytest.approx(0.5, abs=0.02)
    assert np.mean(ups[True]) == pytest.approx(0.5 + step, abs=0.03)


def test_a_test_with_one_look_needs_so_many_users():
    # (1.645 + 1.645)^2 * (0.65 * 0.35 / 0.2 + 0.5 * 0.5 / 0.8) / 0.15^2, Fleiss et al., by hand
    assert fixed_users(0.15) == pytest.approx(10.824 * 1.45 / 0.0225, rel=1e-3)


def test_a_trial_that_runs_out_of_users_waits():
    votes = [Vote(is_canary, 1.0) for is_canary in (True, False)]
    assert follow(votes) == (Verdict.WAIT, 2)


def test_the_command_reports_shares_of_all_verdicts(tmp_path: Path):
    trials.main(runs=3, folder=tmp_path)
    report = json.loads((tmp_path / "trials.json").read_text())
    assert report["runs"] == 3
    assert len(report["kinds"]) == 5
    for found in report["kinds"].values():
        assert 0 <= found["promote"]["low"] <= found["promote"]["share"] <= 1
    assert (tmp_path / "trials.png").stat().st_size
