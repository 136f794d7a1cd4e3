"""Versions in the store: what is read of them, and how the server writes what became of each."""

import dataclasses
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from server.delivery import Move, canary_of, current_of, destination
from server.guards import GUARDS
from server.references import collectable
from server.stored import ask
from server.trial import Evidence, Terms
from thumbloop.config.delivery import Canary as Settings
from thumbloop.errors import VersionConflict
from thumbloop.store import GroupWriter, deployments, feedback, trials, versions
from thumbloop.types import DEFAULT_POLICY, WAITING, PolicyVersion, VersionState

_TYPICAL_S, _TYPICAL_TOKENS = 1.0, 32.0  # where the current version has answered nobody yet


class Records(NamedTuple):
    """What the store has of a trial: first thumbs and first replies of users, and corrupted replies."""

    thumbs: list[trials.TrialThumb]
    replies: list[trials.TrialReply]
    corrupted: int


class Ledger:
    """The versions of one policy. Each change is one transaction, and is made only where it still fits.

    Every method but the constructor raises StoreUnavailable, and what changes something Overloaded.
    """

    def __init__(self, database: Database, writer: GroupWriter) -> None:
        self._database = database
        self._writer = writer

    async def given_at(self, version: PolicyVersion) -> list[float]:
        """Return when the thumbs were given that a version's own round learned from, unix seconds."""
        round_id = version.round_id
        if round_id is None:
            return []
        return await ask(self._database, lambda connection: feedback.given_at(connection, round_id))

    async def mark(self) -> versions.Mark:
        """Return what tells whether there is anything new."""
        return await ask(
            self._database, lambda connection: versions.mark(connection, DEFAULT_POLICY)
        )

    async def rows(self) -> list[PolicyVersion]:
        """Return all versions, oldest first, without their metrics."""
        return await ask(
            self._database,
            lambda connection: versions.list_versions(
                connection, DEFAULT_POLICY, has_metrics=False
            ),
        )

    async def terms(self, version: int) -> Terms:
        """Return by which terms a canary is judged."""
        return Terms(
            **await ask(
                self._database,
                lambda connection: deployments.terms_of_trial(connection, DEFAULT_POLICY, version),
            )
        )

    async def trial(self, canary: PolicyVersion, current: PolicyVersion) -> Records:
        """Return what users got and said since the canary's trial beside the current version began."""
        policy, number, since = canary.policy, canary.version, canary.state_since
        sides = (number, current.version)

        def read(connection: Connection) -> Records:
            return Records(
                trials.first_thumbs(connection, policy, sides, since),
                trials.first_replies(connection, policy, sides, since),
                trials.count_corrupted(connection, policy, number, since),
            )

        return await ask(self._database, read)

    async def decide(self, version: PolicyVersion, state: VersionState, reason: str) -> None:
        """Say of a version that waits that it is attested, or rejected.

        Raises VersionConflict: it waits no more.
        """
        now = time.time()

        def change(connection: Connection) -> None:
            deployments.decide(
                connection, version.policy, version.version, state, at=now, reason=reason
            )

        await self._writer.run(change)

    async def make_current(
        self,
        version: int,
        *,
        expected: int,
        leaves_as: VersionState,
        reason: str,
        was: Collection[VersionState] | None = None,
        evidence: Mapping[str, Evidence] | None = None,
    ) -> None:
        """Make a version current in the place of the expected one, if it is in one of these states still.

        Raises VersionConflict.
        """
        now = time.time()

        def change(connection: Connection) -> None:
            deployments.make_current(
                connection,
                DEFAULT_POLICY,
                version,
                expected=expected,
                leaves_as=leaves_as,
                at=now,
                reason=reason,
                was=was,
                detail=_detail(evidence),
            )

        await self._writer.run(change)

    async def begin_trial(
        self, version: PolicyVersion, settings: Settings, *, expected: int
    ) -> None:
        """Make a version the canary beside the expected current one, by these terms. Raises VersionConflict."""
        now = time.time()

        def change(connection: Connection) -> None:
            terms = terms_of(settings, trials.typical(connection, DEFAULT_POLICY, expected))
            deployments.begin_trial(
                connection,
                DEFAULT_POLICY,
                version.version,
                expected=expected,
                at=now,
                terms=dataclasses.asdict(terms),
            )

        await self._writer.run(change)

    async def end_trial(
        self,
        version: int,
        *,
        expected: int,
        reason: str,
        evidence: Mapping[str, Evidence] | None = None,
    ) -> None:
        """Take the canary back. Raises VersionConflict: the pointer was moved, or the trial has ended."""
        now = time.time()

        def change(connection: Connection) -> None:
            deployments.end_trial(
                connection,
                DEFAULT_POLICY,
                version,
                expected=expected,
                at=now,
                reason=reason,
                detail=_detail(evidence),
            )

        await self._writer.run(change)

    async def collect(
        self,
        version: PolicyVersion,
        *,
        held: Collection[int],
        keep: int,
        settings: Mapping[str, Any] | None,
    ) -> None:
        """Say that a version's folder is deleted, before it is; `settings` of its manifest are kept.

        Raises VersionConflict: it may not be any more; see references.collectable.
        """
        now = time.time()

        def change(connection: Connection) -> None:
            policy = version.policy
            current = versions.current(connection, policy).version
            deployments.expect_current(connection, policy, current)  # nobody can change rows by now
            rows = versions.list_versions(connection, policy, has_metrics=False)
            if version.version not in {v.version for v in collectable(rows, held=held, keep=keep)}:
                raise VersionConflict(f"version {version.version} is needed again")
            reason = f"its folder is deleted: delivery.keep_versions is {keep}"
            deployments.collect(
                connection, policy, version.version, at=now, reason=reason, settings=settings
            )

        await self._writer.run(change)

    async def move(
        self, move: Move, evidence: Mapping[int, Mapping[str, Evidence]]
    ) -> PolicyVersion:
        """Do what an operator asks for, if it may be done still; return what is current then.

        `evidence` is what a trial says of its canary, by number: it is kept where the move decides that trial.
        Raises what destination() raises.
        """
        now = time.time()

        def change(connection: Connection) -> PolicyVersion:
            rows = versions.list_versions(connection, DEFAULT_POLICY, has_metrics=False)
            to, canary = destination(rows, move), canary_of(rows)
            if to is current_of(rows):
                assert canary is not None, "else there is nothing to do"
                deployments.end_trial(
                    connection,
                    to.policy,
                    canary.version,
                    expected=move.expected,
                    at=now,
                    reason=move.why,
                    actor=move.by,
                    detail=_detail(evidence.get(canary.version)),
                )
            else:
                if to.state in WAITING:  # it would not be loaded if it had failed
                    deployments.decide(
                        connection, to.policy, to.version, VersionState.ATTESTED, at=now, reason=""
                    )
                deployments.make_current(
                    connection,
                    to.policy,
                    to.version,
                    expected=move.expected,
                    leaves_as=move.leaves_as,
                    at=now,
                    reason=move.why,
                    actor=move.by,
                    detail=_detail(evidence.get(to.version)),
                )
            moved = versions.get(connection, to.policy, to.version)
            assert moved is not None
            return moved

        return await self._writer.run(change)


def terms_of(settings: Settings, typical: trials.Typical) -> Terms:
    """Return the terms of a trial that begins with these settings beside replies like those."""
    guards = settings.guards
    return Terms(
        share=settings.share,
        promote_alpha=settings.promote_alpha,
        roll_back_alpha=settings.roll_back_alpha,
        horizon=settings.horizon,
        min_time_s=settings.min_time_s,
        max_time_s=settings.max_time_s,
        guard_alpha=guards.alpha,
        margins={name: getattr(guards, name) for name in GUARDS},
        max_corrupted=guards.max_corrupted,
        typical_s=typical.seconds or _TYPICAL_S,
        typical_tokens=typical.tokens or _TYPICAL_TOKENS,
        refusal_pattern=guards.refusal_pattern,
    )


def _detail(evidence: Mapping[str, Evidence] | None) -> dict[str, Any]:
    """Return evidence as JSON takes it: no number where there is no user."""
    if evidence is None:
        return {}
    return {"evidence": {name: found.plain() for name, found in evidence.items()}}
