import json

import pytest

from loadtest import tokens
from loadtest.tokens import rollout
from loadtest.work import Work
from tests.rows import candidate, interaction
from thumbloop.config import State
from thumbloop.store import interactions, open_store


def test_tokens_that_only_training_needs_are_counted_by_sample(
    work: Work, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens, "PROMPTS", 2)
    monkeypatch.setattr(tokens, "CANDIDATES", 1)
    store = open_store(State(folder=work.found.state))
    with store.begin() as connection:
        for length in (9, 2, 4):
            of_version = candidate(policy_version=2, token_ids=(7,) * length)
            reply = interaction(policy_version=2, candidates=(of_version,))
            interactions.append(connection, reply)
    store.dispose()
    rounds = [{"metrics": {"rollouts": 256.0}}, {"metrics": {}}, {"metrics": {"rollouts": 144.0}}]
    report = {"rounds": rounds, "tokens": {"generated_for_training_only": 100}}
    (work.found.run / "report.json").write_text(json.dumps(report))
    found = {key: figure.value for key, figure in rollout(work).items()}
    assert found == {
        "rollout.extra_tokens": 0.25,
        "rollout.peers_extra_tokens": 3.0,  # of the newest two
        "rollout.samples": 400,
    }
