"""Soft best-of-n: the shown candidate is drawn from the softmax over rewards.

Sampling from softmax(reward / temperature) over n samples of the policy tends to the KL-tilted
policy, the optimum of reward under a KL leash (Verdun et al. 2025, arXiv 2505.03156), and makes the
choice stochastic with a known propensity. An audit share, decided before sampling, shows a uniformly
random candidate, so that no propensity is ever zero.
"""

import math
from collections.abc import Sequence
from random import Random

from server.guidance.outcome import Choice, Outcome, Worker
from server.guidance.pool import run_pooled
from thumbloop.types import Strategy


class SoftBestOfN:
    """Samples n, scores each as it finishes, draws one."""

    name = Strategy.SOFT_BEST_OF_N

    async def run(self, worker: Worker, choice: Choice, rng: Random) -> Outcome:
        """Return the candidates with the drawn one marked; see the module."""
        return await run_pooled(worker, choice, rng, soft_weights)


def soft_weights(rewards: Sequence[float], temperature: float) -> list[float]:
    """Return softmax(rewards / temperature), shape (N,); rewards are finite."""
    highest = max(rewards)
    powers = [math.exp((reward - highest) / temperature) for reward in rewards]
    total = sum(powers)
    return [power / total for power in powers]


STRATEGY = SoftBestOfN()
