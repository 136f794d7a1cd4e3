"""Tokens that are generated only to be learned from, for each sample that PPO learns from."""

import json
from statistics import mean

from loadtest import figures
from loadtest.figures import Figure
from loadtest.work import Work


def rollout(work: Work) -> dict[str, Figure]:
    """Ours as the demo's run counted; the peers' are all that a sample has: nobody reads them."""
    report = json.loads((work.found.run / "report.json").read_text())
    samples = sum(done["metrics"].get("rollouts", 0) for done in report["rounds"])
    assert samples, "a run whose policy is half way has learned"
    rollouts = json.loads(work.freeze().read_text())["rollouts"]
    of_sample = mean(len(each["response"]) for each in rollouts)
    of_ours = report["tokens"]["generated_for_training_only"] / samples
    return {
        "rollout.extra_tokens": figures.exactly(of_ours),
        "rollout.peers_extra_tokens": figures.exactly(of_sample),
        "rollout.samples": figures.exactly(samples),
    }
