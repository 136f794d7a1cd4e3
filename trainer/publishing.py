"""A round's end: the version's folder first, then one transaction that says what the round used."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from typing import NamedTuple

from safetensors import SafetensorError
from sqlalchemy import Connection, Engine

from thumbloop import artifacts
from thumbloop.artifacts import (
    POLICY,
    REWARD,
    WEIGHTS,
    AdapterFacts,
    BaseModelIdentity,
    Lineage,
    Manifest,
    VerdictIdentity,
    WrittenVersion,
    file_digest,
    write_version,
)
from thumbloop.config import TrainerConfig
from thumbloop.errors import BadPolicyVersion, StoreUnavailable
from thumbloop.store import erasure, versions, writing
from thumbloop.types import PolicyVersion, Round, VersionState
from trainer.dataset import Dataset
from trainer.learning import Learned
from trainer.models import Trunk
from trainer.parents import next_parent
from trainer.probes import Probes
from trainer.rollouts import Comparison, Judgement, Thumb

RECORDED_SETTINGS = {
    "seed",
    "round",
    "lora",
    "reward",
    "rewards",
    "supervised",
    "objective",
    "ppo",
    "gate",
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One round so far: what it read, what came of it."""

    round_id: str
    policy: str
    parent: PolicyVersion
    started_at: float
    data: Dataset
    learned: Learned

    def finished(self, version: int | None) -> Round:
        """Return the round as it is recorded; a blocked one names its thumbs but uses up none."""
        numbers = {
            name: value if math.isfinite(value) else str(value)
            for name, value in self.learned.metrics.items()
        }
        return Round(
            round_id=self.round_id,
            policy=self.policy,
            parent=self.parent.version,
            started_at=self.started_at,
            finished_at=time(),
            version=version,
            reason=self.learned.gate.reason or "published",
            metrics={
                **numbers,
                "came_in": {kind: each.came_in for kind, each in self.data.intake.items()},
                "left_out": self.data.left_out,
            },
            new_feedback=_thumbs(self.data.new),
            replayed_feedback=_thumbs(self.learned.replayed),
            new_preferences=_preferences(self.data.new),
            replayed_preferences=_preferences(self.learned.replayed),
            rollouts=tuple(sorted({r.response_id for r in self.data.rollouts})),
        )


class Ended(NamedTuple):
    """How a round ended: `published`, `blocked` or `superseded`, and in words."""

    outcome: str
    words: str


def clear(engine: Engine, policy: str, folder: Path) -> int:
    """Remove what a killed trainer left behind in the folder of versions; return the next version's number.

    Nobody publishes meanwhile, not even a commit that this process has not heard of yet.
    Raises StoreUnavailable; OSError: the folder cannot be written; SettingsError: it is another store's.
    """
    with writing(engine) as connection:
        known = versions.list_versions(connection, policy, has_metrics=False)
        published = [v.version for v in known]
        artifacts.remove_unpublished(folder, policy, published)
        return versions.next_number(connection, policy)


def record_blocked(engine: Engine, attempt: Attempt) -> Ended:
    """Record why a round published nothing. Raises StoreUnavailable."""
    with writing(engine) as connection:
        versions.finish_round(connection, attempt.finished(None), None)
    return Ended("blocked", f"published nothing: {attempt.learned.gate.reason}")


def publish(
    engine: Engine,
    trunk: Trunk,
    attempt: Attempt,
    probes: Probes,
    base: BaseModelIdentity,
    config: TrainerConfig,
) -> Ended:
    """Write the trunk's adapters as a version and make it visible, unless it was superseded meanwhile.

    Raises StoreUnavailable: folder or database did not take it. Nothing was published then, or all of it
    where a commit broke off; a folder that no row came to name goes when the next one is written.
    """
    try:
        number = clear(engine, attempt.policy, config.state.versions)

        def fill(folder: Path) -> Manifest:
            _save(trunk, folder)
            return describe(folder, number, trunk, attempt, probes, base, config)

        written = write_version(config.state.versions, attempt.policy, number, fill)
    except OSError as error:
        raise StoreUnavailable(f"the version cannot be written: {error}") from None
    ended = _make_visible(engine, attempt, written, config)
    if ended.outcome != "published":
        artifacts.discard(config.state.versions, written)
    return ended


def _make_visible(
    engine: Engine, attempt: Attempt, written: WrittenVersion, config: TrainerConfig
) -> Ended:
    """Record the round, with its version unless that came too late."""
    number, folder = written.manifest.version, config.state.versions
    with writing(engine) as connection:
        reason = _superseded(connection, attempt, number, config)
        if reason:
            done = replace(attempt.finished(None), reason=f"superseded: {reason}")
            versions.finish_round(connection, done, None)
            return Ended("superseded", f"published nothing: {reason}")
        # What the row is about to name is there, whoever else works on the folder against all locks.
        try:
            artifacts.read_manifest(folder / written.folder, written.manifest_digest)
        except BadPolicyVersion as error:
            raise StoreUnavailable(
                f"the version that was written is no longer as it was: {error}"
            ) from None
        versions.finish_round(connection, attempt.finished(number), written.row())
        return Ended("published", f"published version {number}")


def _superseded(
    connection: Connection, attempt: Attempt, number: int, config: TrainerConfig
) -> str:
    """Return what happened while the round learned that its version cannot follow; empty: nothing."""
    known = versions.list_versions(connection, attempt.policy, has_metrics=False)
    parent = next_parent(known, config.round, config.state.versions)
    if parent.version != attempt.parent.version:
        if parent.state is VersionState.CURRENT:
            return f"version {parent.version} became current meanwhile"
        return f"the current version is tainted, the next one grows from version {parent.version}"
    if versions.next_number(connection, attempt.policy) != number:
        return f"another trainer published version {number} meanwhile"
    if not erasure.is_whole(connection, attempt.finished(number)):
        return "data that it learned from was erased meanwhile"
    return ""


def _save(trunk: Trunk, folder: Path) -> None:
    """Write the trunk's adapters. Raises OSError: the folder did not take them."""
    try:
        trunk.save(folder)
    except SafetensorError as error:  # what an OSError is called there
        raise OSError(str(error)) from None


def describe(
    folder: Path,
    number: int,
    trunk: Trunk,
    attempt: Attempt,
    probes: Probes,
    base: BaseModelIdentity,
    config: TrainerConfig,
) -> Manifest:
    """Return the manifest of the adapters in a folder."""
    ids = _thumbs(attempt.data.new)
    return Manifest(
        policy=attempt.policy,
        version=number,
        parent=attempt.parent.version,
        created_at=time(),
        base_model=base,
        verdict=VerdictIdentity(
            prompt=trunk.verdict.prompt, up=trunk.verdict.up, down=trunk.verdict.down
        ),
        dtype=trunk.dtype_name,
        policy_adapter=adapter_facts(folder / POLICY, trunk, probes.policy_distance),
        reward_adapter=adapter_facts(folder / REWARD, trunk, probes.reward_distance),
        probes=probes.probes,
        lineage=Lineage(
            round_id=attempt.round_id,
            feedback_count=len(attempt.data.new),
            first_feedback_id=min(ids, default=0),
            last_feedback_id=max(ids, default=0),
            rollout_candidates=len(attempt.data.rollouts),
        ),
        settings=config.model_dump(mode="json", include=RECORDED_SETTINGS),
        metrics=attempt.learned.metrics,
    )


def adapter_facts(folder: Path, trunk: Trunk, distance: float | None) -> AdapterFacts:
    """Return what the manifest says of one adapter."""
    return AdapterFacts(
        digest=file_digest(folder / WEIGHTS),
        rank=trunk.lora.rank,
        alpha=trunk.lora.alpha,
        target_modules=trunk.target_modules,
        distance=distance,
    )


def _thumbs(judgements: Iterable[Judgement]) -> tuple[int, ...]:
    return tuple(j.feedback_id for j in judgements if isinstance(j, Thumb))


def _preferences(judgements: Iterable[Judgement]) -> tuple[int, ...]:
    return tuple(j.preference_id for j in judgements if isinstance(j, Comparison))
