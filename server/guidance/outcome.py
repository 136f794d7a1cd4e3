"""What every strategy gets and returns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from thumbloop.types import Arm, Candidate


@dataclass(frozen=True, slots=True)
class Choice:
    """How a request wants to be guided: N candidates, temperature in reward units, audit share."""

    num_candidates: int
    temperature: float
    audit_share: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All candidates of a request, one of them chosen, and how it was chosen."""

    candidates: tuple[Candidate, ...]
    arm: Arm
    reranked: bool

    @property
    def chosen(self) -> Candidate:
        """Return the candidate to show."""
        return next(c for c in self.candidates if c.chosen)


class Worker(Protocol):
    """A request's hands on the engine."""

    @property
    def can_score(self) -> bool:
        """Say whether there is a reward model to ask."""

    async def sample(self, index: int) -> Candidate:
        """Sample candidate `index`."""

    async def score(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its reward."""


class Guidance(Protocol):
    """A strategy: drives sampling and scoring, then chooses. Stateless."""

    async def run(self, worker: Worker, choice: Choice, rng: Random) -> Outcome:
        """Return all candidates with the chosen one marked."""


def settle(
    candidates: Sequence[Candidate],
    chosen: int,
    propensities: Sequence[float | None],
    *,
    arm: Arm,
    reranked: bool,
) -> Outcome:
    """Mark the chosen candidate and write down every candidate's marginal propensity."""
    return Outcome(
        candidates=tuple(
            replace(c, chosen=i == chosen, propensity=p)
            for i, (c, p) in enumerate(zip(candidates, propensities, strict=True))
        ),
        arm=arm,
        reranked=reranked,
    )
