from random import Random

from server.guidance import Choice
from server.guidance.none import NoGuidance
from tests.rows import candidate
from thumbloop.types import Arm, Candidate


class OnlySamples:
    """A worker that cannot be asked for a score."""

    can_score = True
    sampled = 0

    def show(self, index: int) -> None:
        self.shown = index

    async def sample(self, index: int) -> Candidate:
        self.sampled += 1
        return candidate(index, chosen=False, reward=None, propensity=None)


async def test_one_candidate_is_sampled_and_shown_unscored_however_many_were_asked_for():
    worker = OnlySamples()
    outcome = await NoGuidance().run(worker, Choice(8, 1.0, 0.5), Random(1))  # type: ignore[arg-type]
    assert worker.sampled == 1
    (only,) = outcome.candidates
    assert (only.chosen, only.propensity, only.reward) == (True, 1.0, None)
    assert (outcome.arm, outcome.reranked) == (Arm.STRATEGY, False)
