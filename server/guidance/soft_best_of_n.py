"""Soft best-of-n: the shown candidate is drawn from the softmax over rewards.

Sampling from softmax(reward / temperature) over n samples of the policy tends to the KL-tilted
policy, the optimum of reward under a KL leash (Verdun et al. 2025, arXiv 2505.03156), and makes the
choice stochastic with a known propensity. An audit share, decided before sampling, shows a uniformly
random candidate, so that no propensity is ever zero.
"""

import math
from collections.abc import Sequence
from random import Random

from server.concurrency import gather_or_cancel
from server.guidance.fallback import most_likely
from server.guidance.outcome import Choice, Outcome, Worker, settle
from thumbloop.errors import Overloaded
from thumbloop.types import Arm, Candidate


class SoftBestOfN:
    """Samples n, scores each as it finishes, draws one."""

    async def run(self, worker: Worker, choice: Choice, rng: Random) -> Outcome:
        """Return n candidates with the drawn one marked; see the module."""
        arm = Arm.AUDIT if rng.random() < choice.audit_share else Arm.STRATEGY

        async def candidate(index: int) -> Candidate:
            sampled = await worker.sample(index)
            if not worker.can_score:
                return sampled
            try:
                return await worker.score(sampled)
            except Overloaded:
                return sampled  # the reply still comes, without its reward

        candidates = await gather_or_cancel(candidate(i) for i in range(choice.num_candidates))
        if not worker.can_score:
            uniform = [1 / len(candidates)] * len(candidates)
            drawn = rng.randrange(len(candidates))
            return settle(candidates, drawn, uniform, arm=arm, reranked=False)
        rewards = [c.reward for c in candidates if c.reward is not None]
        if len(rewards) < len(candidates):
            return most_likely(candidates)
        weights = soft_weights(rewards, choice.temperature)
        drawn = draw(weights, arm, rng)
        marginal = marginal_propensities(weights, choice.audit_share)
        return settle(candidates, drawn, marginal, arm=arm, reranked=True)


def soft_weights(rewards: Sequence[float], temperature: float) -> list[float]:
    """Return softmax(rewards / temperature), shape (N,); rewards are finite."""
    highest = max(rewards)
    powers = [math.exp((reward - highest) / temperature) for reward in rewards]
    total = sum(powers)
    return [power / total for power in powers]


def marginal_propensities(weights: Sequence[float], audit_share: float) -> list[float]:
    """Return a / n + (1 - a) p for each candidate: how likely it was shown, over both arms."""
    uniform = 1 / len(weights)
    return [audit_share * uniform + (1 - audit_share) * weight for weight in weights]


def draw(weights: Sequence[float], arm: Arm, rng: Random) -> int:
    """Return the shown candidate's index: by weight, or uniformly for an audit."""
    if arm is Arm.AUDIT:
        return rng.randrange(len(weights))
    return rng.choices(range(len(weights)), weights=weights)[0]
