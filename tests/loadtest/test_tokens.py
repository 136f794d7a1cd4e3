import json
from pathlib import Path

import pytest

from loadtest.tokens import rollout
from loadtest.work import Work


def test_tokens_that_only_training_needs_are_counted_by_sample(
    work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"rollouts": [{"response": [7] * length} for length in (2, 4)]}))
    monkeypatch.setattr(Work, "freeze", lambda _self: job)
    rounds = [{"metrics": {"rollouts": 256.0}}, {"metrics": {}}, {"metrics": {"rollouts": 144.0}}]
    report = {"rounds": rounds, "tokens": {"generated_for_training_only": 100}}
    work.found.run.mkdir()
    (work.found.run / "report.json").write_text(json.dumps(report))
    found = {key: figure.value for key, figure in rollout(work).items()}
    assert found == {
        "rollout.extra_tokens": 0.25,
        "rollout.peers_extra_tokens": 3.0,
        "rollout.samples": 400,
    }
