"""What the demo itself saw happen: every request, every thumb, first replies. Plain records."""

import time
from collections import defaultdict
from dataclasses import dataclass, field

from thumbloop.errors import ThumbloopError


@dataclass(frozen=True, slots=True)
class Served:
    """A reply that a simulated user got; `liked` is the noiseless probability of a thumb up."""

    response_id: str
    version: int
    at: float
    liked: float


@dataclass(slots=True)
class Ledger:
    """Everything the report is made from that is not in the store."""

    served: list[Served] = field(default_factory=list)
    failed: list[tuple[float, str]] = field(default_factory=list)
    acknowledged: dict[str, tuple[float, int]] = field(default_factory=dict)
    """response_id -> when the thumb was acknowledged, and its value."""
    first_answers: dict[int, float] = field(default_factory=dict)
    """Version -> when it first answered whoever was asking all the time."""
    evaluated: set[str] = field(default_factory=set)
    """Ids of the replies that evaluation asked for."""
    sent: int = 0
    """Thumbs sent, whatever came of them."""
    failed_thumbs: list[tuple[float, str]] = field(default_factory=list)

    def fail(self, error: ThumbloopError) -> None:
        """Record a request that failed."""
        self.failed.append((time.time(), f"{error.code.name}: {error}"))

    @property
    def requests(self) -> int:
        """Return how many requests were sent, evaluation included."""
        return len(self.served) + len(self.evaluated) + len(self.failed)

    def first_reply_at(self, version: int) -> float | None:
        """Return when a user first got a reply by this version."""
        return min((s.at for s in self.served if s.version == version), default=None)

    def served_rates(self) -> dict[int, float]:
        """Return the mean noiseless thumb-up rate of what users were shown, by version."""
        liked: dict[int, list[float]] = defaultdict(list)
        for reply in self.served:
            liked[reply.version].append(reply.liked)
        return {version: sum(rates) / len(rates) for version, rates in liked.items()}

    def thumbs_before(self, at: float) -> int:
        """Return how many thumbs were acknowledged by a point in time."""
        return sum(1 for when, _ in self.acknowledged.values() if when <= at)
