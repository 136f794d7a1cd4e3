"""Simulated trials: the quick way through them is the server's, and their users are as they say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import trials
from experiments.trials import (
    ALPHA,
    GUARD_ALPHA,
    SHARE,
    Kind,
    draw_thumbs,
    fixed_users,
    follow,
    votes_of,
)
from server.trial import THUMBS, Verdict, Vote, judge, last, log_mismatch, weigh
from tests.rows import TERMS


@pytest.mark.parametrize(
    "kind",
    [
        Kind(0.0),
        Kind(-0.3),
        Kind(0.3),
        Kind(0.0, rated=0.1, by_activity=True),
        Kind(0.0, by_thumb=True),
        Kind(0.3, asks_who=False),
    ],
)
def test_a_trial_ends_where_the_server_ends_it(kind: Kind, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trials, "HORIZON", 60)
    terms = replace(
        TERMS, share=SHARE, promote_alpha=ALPHA, roll_back_alpha=ALPHA, horizon=60, min_time_s=0.0
    )
    terms = replace(terms, guard_alpha=GUARD_ALPHA if kind.asks_who else 1e-300)
    for seed in range(8):
        votes, _ = votes_of(
            draw_thumbs(np.random.default_rng(seed), kind, 2000), by_thumb=kind.by_thumb
        )
        verdict, count = Verdict.WAIT, 0
        while verdict is Verdict.WAIT and count < len(votes):
            count += 1
            mismatch = last(log_mismatch([v.is_canary for v in votes[:count]], SHARE))
            verdict = judge({THUMBS: weigh(votes[:count])}, terms, mismatch=mismatch).verdict
        assert follow(votes, asks_who=kind.asks_who) == (verdict, count), seed


def test_a_user_has_one_vote_however_many_thumbs_come_from_it():
    thumbs = draw_thumbs(np.random.default_rng(0), Kind(0.0), 5000)
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
        thumbs = draw_thumbs(np.random.default_rng(seed), Kind(step), 3000)
        for vote in votes_of(thumbs, by_thumb=False)[0]:
            ups[vote.is_canary].append(vote.value)
    assert np.mean(ups[False]) == pytest.approx(0.5, abs=0.02)
    assert np.mean(ups[True]) == pytest.approx(0.5 + step, abs=0.03)


def test_a_canary_that_is_rated_less_often_is_rated_by_others():
    kind = Kind(0.0, rated=0.25, by_activity=True)
    votes, _ = votes_of(draw_thumbs(np.random.default_rng(0), kind, 3000), by_thumb=False)
    sides = {side: [v.value for v in votes if v.is_canary is side] for side in (True, False)}
    assert len(sides[True]) / len(votes) < 0.8 * SHARE
    assert np.mean(sides[True]) > np.mean(sides[False]) + 0.02


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
    assert set(report["kinds"]) == set(trials.KINDS)
    for found in report["kinds"].values():
        assert 0 <= found["promote"]["low"] <= found["promote"]["share"] <= 1
    assert (tmp_path / "trials.png").stat().st_size
