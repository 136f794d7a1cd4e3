"""Best-of-n: the candidate of the highest reward is shown.

Plain best-of-n over-optimises the reward model as n grows (Huang et al. 2025, arXiv 2503.21878), so n
is capped by the server's limit. The choice is certain given the rewards: without an audit share, losers
would have propensity 0.
"""

from collections.abc import Sequence
from random import Random

from server.guidance.outcome import Choice, Outcome, Worker
from server.guidance.pool import run_pooled
from thumbloop.types import Strategy


class BestOfN:
    """Samples n, scores each as it finishes, takes the best."""

    name = Strategy.BEST_OF_N

    async def run(self, worker: Worker, choice: Choice, rng: Random) -> Outcome:
        """Return the candidates with the best one marked; see the module."""
        return await run_pooled(worker, choice, rng, best_weights)


def best_weights(rewards: Sequence[float], _temperature: float) -> list[float]:
    """Return 1 for the highest reward and 0 for the others, shape (N,); the first of equals wins."""
    best = max(range(len(rewards)), key=rewards.__getitem__)
    return [float(i == best) for i in range(len(rewards))]


STRATEGY = BestOfN()
