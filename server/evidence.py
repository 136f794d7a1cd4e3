"""store -> evidence: what each user of a trial says of every measure, and what that comes to."""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from server import guards
from server.canary import Canary, unit_of
from server.ledger import Ledger, Records
from server.trial import (
    LENGTH,
    THUMBS,
    Evidence,
    Ruling,
    Terms,
    Vote,
    judge,
    last,
    log_mismatch,
    weigh,
)
from thumbloop.store.trials import TrialReply, TrialThumb
from thumbloop.types import PolicyVersion, Status

Votes = dict[str, list[Vote]]


class Look(NamedTuple):
    """What a canary's trial says now, and how long it took to find out."""

    version: int
    evidence: dict[str, Evidence]
    ruling: Ruling
    took_s: float


class Observer:
    """Looks at a trial as often as anybody likes; replies are measured once."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._on_trial: int | None = None
        self._measured: dict[str, dict[str, float]] = {}

    async def look(self, canary: PolicyVersion, current: PolicyVersion, terms: Terms) -> Look:
        """Return what there is to say of a canary beside the current version. Raises StoreUnavailable."""
        began = time.perf_counter()
        if canary.version != self._on_trial:
            self._on_trial, self._measured = canary.version, {}
        records = await self._ledger.trial(canary, current)
        # Thousands of users are weighed beside the event loop, which answers people.
        evidence, ruling = await asyncio.to_thread(self._weigh, records, canary, terms)
        return Look(canary.version, evidence, ruling, time.perf_counter() - began)

    def _weigh(
        self, records: Records, canary: PolicyVersion, terms: Terms
    ) -> tuple[dict[str, Evidence], Ruling]:
        group = Canary(canary.version, terms.share)
        votes = votes_of_replies(records.replies, group, terms, self._measured)
        votes |= votes_of_thumbs(records.thumbs, group)
        evidence = {name: weigh(votes[name], terms.margins.get(name, 0.0)) for name in votes}
        sides = [vote.is_canary for vote in votes[THUMBS]]
        ruling = judge(
            evidence,
            terms,
            corrupted=records.corrupted,
            mismatch=last(log_mismatch(sides, terms.share)),
            age_s=time.time() - canary.state_since,
        )
        return evidence, ruling


def votes_of_thumbs(thumbs: Sequence[TrialThumb], group: Canary) -> Votes:
    """Return what users' first thumbs say, in order, of those that the routing gave their version.

    Who pinned the other one chose it, and who cannot be told from others is nobody.
    """
    votes: Votes = {THUMBS: [], guards.DIVERGENCE: []}
    for thumb in thumbs:
        unit = unit_of(thumb.user, thumb.session_id)
        is_canary = thumb.version == group.version
        if not unit or group.has(unit) is not is_canary:
            continue
        votes[THUMBS].append(Vote(is_canary, float(thumb.value)))
        if thumb.promise is not None:
            gap = guards.divergence(thumb.promise, thumb.value)
            votes[guards.DIVERGENCE].append(Vote(is_canary, gap))
    return votes


def votes_of_replies(
    replies: Sequence[TrialReply],
    group: Canary,
    terms: Terms,
    measured: dict[str, dict[str, float]],
) -> Votes:
    """Return what users' first replies say of the other guards; `measured` holds what was, by reply."""
    votes: Votes = {name: [] for name in (guards.ERRORS, guards.LATENCY, *guards.OF_TEXT)}
    for reply in replies:
        unit = unit_of(reply.user, reply.session_id)
        is_canary = reply.version == group.version
        if not unit or group.has(unit) is not is_canary:
            continue
        if reply.response_id not in measured:
            measured[reply.response_id] = measure(reply, terms)
        for name, value in measured[reply.response_id].items():
            votes[name].append(Vote(is_canary, value))
    return votes


def measure(reply: TrialReply, terms: Terms) -> dict[str, float]:
    """Return what can be said of a reply, by guard; of one that failed only that it did."""
    values = {guards.ERRORS: float(reply.status is Status.FAILED)}
    if reply.duration_s is not None:
        values[guards.LATENCY] = guards.saturated(reply.duration_s, terms.typical_s)
    if reply.status is Status.COMPLETED:
        values[LENGTH] = guards.saturated(len(reply.token_ids), terms.typical_tokens)
        values[guards.REPETITION] = guards.repetition(reply.token_ids)
        values[guards.REFUSALS] = float(guards.is_refusal(reply.text, terms.refusal_pattern))
    return values
