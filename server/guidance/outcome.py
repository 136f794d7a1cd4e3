"""What every strategy gets and returns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple, Protocol

from thumbloop.types import Arm, Candidate, Extent


class Enough(NamedTuple):
    """When a first wave is enough: its best reward reaches `best` and it is not too spread out."""

    best: float
    spread: float  # standard deviation, logits


class Checkpoint(NamedTuple):
    """At `tokens` response tokens the `keep` best candidates go on; `prunes` is False to only look."""

    tokens: int
    keep: int
    prunes: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """How a request is guided: N candidates, temperature in reward units, audit share.

    `first_wave` candidates come first, and the rest only if those are not `enough`; 0: all at once.
    `time_limit_s` is when an answer has to be chosen from what there is; None: whenever it is ready.
    """

    num_candidates: int
    temperature: float
    audit_share: float
    first_wave: int = 0
    enough: Enough | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    time_limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All candidates of a request, one of them chosen, and how it was chosen.

    `fallback` says why rewards were not used although there might have been some, and `selected` how
    candidates were left out by what they are, so that the rest is no sample of the policy: pruned, or
    cut by a deadline. Both are empty otherwise.
    """

    candidates: tuple[Candidate, ...]
    arm: Arm
    reranked: bool
    extent: Extent = Extent.REQUESTED
    fallback: str = ""
    selected: str = ""

    @property
    def chosen(self) -> Candidate:
        """Return the candidate to show."""
        return next(c for c in self.candidates if c.chosen)


class NotScored(Exception):
    """A candidate got no usable reward; `reason` is a stable word: late, full, down or wrong."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Decoding(Protocol):
    """One candidate while it is being sampled."""

    async def until(self, tokens: int) -> Candidate:
        """Wait for that many tokens; return just them, as an aborted candidate, or all if it has no more."""

    async def finish(self) -> Candidate:
        """Wait for the end."""

    async def abort(self) -> Candidate:
        """Stop it; return what there is."""


class Worker(Protocol):
    """A request's hands on the engine."""

    @property
    def can_score(self) -> bool:
        """Say whether there is a reward model to ask."""

    async def sample(self, index: int, *, is_urgent: bool = True) -> Candidate:
        """Sample candidate `index`; one that is not urgent comes after everybody's that are."""

    def begin(self, index: int) -> Decoding:
        """Begin to sample candidate `index`, to be looked at on the way."""

    def show(self, index: int) -> None:
        """Say that candidate `index` will be the reply whatever comes: its text may go out as it grows."""

    async def score(self, candidate: Candidate, *, is_urgent: bool = True) -> Candidate:
        """Return the candidate with its reward; see `sample`. Raises NotScored."""


class Guidance(Protocol):
    """A strategy: drives sampling and scoring, then chooses. Stateless."""

    name: str
    """What requests, settings and the store call it."""

    async def run(self, worker: Worker, choice: Choice, rng: Random) -> Outcome:
        """Return all candidates with the chosen one marked."""


def draw_arm(audit_share: float, rng: Random) -> Arm:
    """Decide, before anything is sampled, whether a request is an audit."""
    return Arm.AUDIT if rng.random() < audit_share else Arm.STRATEGY


def marginal_propensities(
    weights: Sequence[float], audit_share: float, num_candidates: int
) -> list[float]:
    """Return a / n + (1 - a) p for each candidate: how likely it was shown, over both arms.

    `weights` (N,) is the strategy's own distribution; an audit draws from all `num_candidates`,
    which are more than N where the strategy was content with fewer.
    """
    uniform = audit_share / num_candidates
    return [uniform + (1 - audit_share) * weight for weight in weights]


def settle(
    candidates: Sequence[Candidate],
    chosen: int,
    propensities: Sequence[float | None],
    *,
    arm: Arm,
    reranked: bool,
    extent: Extent = Extent.REQUESTED,
    fallback: str = "",
    selected: str = "",
) -> Outcome:
    """Mark the chosen candidate and write down every candidate's marginal propensity."""
    return Outcome(
        candidates=tuple(
            replace(c, chosen=i == chosen, propensity=p)
            for i, (c, p) in enumerate(zip(candidates, propensities, strict=True))
        ),
        arm=arm,
        reranked=reranked,
        extent=extent,
        fallback=fallback,
        selected=selected,
    )
