"""No guidance: one candidate, shown as it is."""

from random import Random

from server.guidance.outcome import Choice, Outcome, Worker, settle
from thumbloop.types import Arm, Strategy


class NoGuidance:
    """Samples once. The reward model is not asked; propensity is 1."""

    name = Strategy.NONE

    async def run(self, worker: Worker, _choice: Choice, _rng: Random) -> Outcome:
        """Return the only candidate."""
        worker.show(0)
        return settle([await worker.sample(0)], 0, [1.0], arm=Arm.STRATEGY, reranked=False)


STRATEGY = NoGuidance()
