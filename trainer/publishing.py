"""A round's end: the version's folder first, then one transaction that says what the round used."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree, rmtree
from tempfile import TemporaryDirectory
from time import time

from sqlalchemy import Engine

from thumbloop.artifacts import (
    POLICY,
    REWARD,
    WEIGHTS,
    AdapterFacts,
    BaseModelIdentity,
    Lineage,
    Manifest,
    VerdictIdentity,
    file_digest,
    write_version,
)
from thumbloop.config import TrainerConfig
from thumbloop.store import reading, versions
from thumbloop.types import PolicyVersion, Round
from trainer.dataset import Dataset
from trainer.learning import Learned
from trainer.models import Trunk
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


def record_blocked(engine: Engine, attempt: Attempt) -> None:
    """Record why a round published nothing."""
    with engine.begin() as connection:
        versions.finish_round(connection, attempt.finished(None), None)


def publish(
    engine: Engine,
    trunk: Trunk,
    attempt: Attempt,
    probes: Probes,
    base: BaseModelIdentity,
    config: TrainerConfig,
) -> PolicyVersion | None:
    """Write the trunk's adapters as a version. None: the parent stopped being current meanwhile."""
    with reading(engine) as connection:
        number = versions.next_number(connection, attempt.policy)
    with TemporaryDirectory() as scratch:
        trunk.save(Path(scratch))
        manifest = describe(Path(scratch), number, trunk, attempt, probes, base, config)
        written = write_version(
            config.state.versions,
            manifest,
            lambda folder: _copy(Path(scratch), folder),
        )
    version = written.row()
    with engine.begin() as connection:
        current = versions.current(connection, attempt.policy).version
        if current == attempt.parent.version:
            versions.finish_round(connection, attempt.finished(number), version)
            return version
        reason = f"superseded: version {current} became current meanwhile"
        versions.finish_round(connection, replace(attempt.finished(None), reason=reason), None)
    rmtree(config.state.versions / written.folder)
    return None


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
        dtype=str(trunk.dtype).removeprefix("torch."),
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


def _copy(source: Path, folder: Path) -> None:
    copytree(source, folder, dirs_exist_ok=True)


def _thumbs(judgements: Iterable[Judgement]) -> tuple[int, ...]:
    return tuple(j.feedback_id for j in judgements if isinstance(j, Thumb))


def _preferences(judgements: Iterable[Judgement]) -> tuple[int, ...]:
    return tuple(j.preference_id for j in judgements if isinstance(j, Comparison))
