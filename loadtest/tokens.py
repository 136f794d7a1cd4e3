"""Tokens that are generated only to be learned from, for each sample that PPO learns from."""

import json
from statistics import mean

from loadtest import figures
from loadtest.figures import Figure
from loadtest.history import newest_groups
from loadtest.work import CANDIDATES, PROMPTS, Work
from thumbloop.config import State
from thumbloop.store import open_store, reading


def rollout(work: Work) -> dict[str, Figure]:
    """Of ours what the demo's run counted; of the peers all that a sample has, as nobody reads theirs."""
    report = json.loads((work.found.run / "report.json").read_text())
    samples = sum(done["metrics"].get("rollouts", 0) for done in report["rounds"])
    assert samples, "a run whose policy is half way has learned"
    store = open_store(State(folder=work.found.state))
    try:
        with reading(store) as connection:
            groups = newest_groups(connection, work.found.number, PROMPTS, CANDIDATES)
    finally:
        store.dispose()
    of_sample = mean(len(each.token_ids) for group in groups for each in group.candidates)
    of_ours = report["tokens"]["generated_for_training_only"] / samples
    return {
        "rollout.extra_tokens": figures.exactly(of_ours),
        "rollout.peers_extra_tokens": figures.exactly(of_sample),
        "rollout.samples": figures.exactly(samples),
    }
