"""What one round does between reading and publishing: evidence, reward fit, policy, gate."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from thumbloop import artifacts
from thumbloop.artifacts import BaseModelIdentity
from thumbloop.config import TrainerConfig
from thumbloop.types import PolicyVersion
from trainer import reward
from trainer.calibration import (
    Calibration,
    calibration_error,
    calibration_noise,
    recalibrate,
    settle,
)
from trainer.dataset import Dataset
from trainer.epochs import RatioMismatch
from trainer.evidence import Evidence, held_out_auroc, pool, pool_folds
from trainer.gate import (
    GateResult,
    all_of,
    check_collapse,
    check_finite,
    check_fit,
    check_length,
    check_reward,
    check_update,
    check_values,
    has_drifted,
    justify,
    proof_confidence,
)
from trainer.metrics import TrainerMetrics
from trainer.models import ADAPTERS, Trunk
from trainer.policy import PolicyStage
from trainer.ppo import NotFinite
from trainer.reward import Trial
from trainer.rollouts import Judgement


class Lesson(NamedTuple):
    """What a round is about: its parent, its number, how many rounds of the parent's line looked at evidence, this
    one included, and what there is to learn from."""

    parent: PolicyVersion
    number: int
    look: int
    data: Dataset


class Learned(NamedTuple):
    """What a round learned: whether to publish it, its numbers, and the older feedback it used."""

    gate: GateResult
    metrics: dict[str, float]
    replayed: tuple[Judgement, ...] = ()


class Learner:
    """Turns a parent's adapters in the trunk into a child's, as far as the gate lets them."""

    def __init__(
        self,
        trunk: Trunk,
        policy: PolicyStage,
        base: BaseModelIdentity,
        config: TrainerConfig,
        metrics: TrainerMetrics,
    ) -> None:
        self._trunk = trunk
        self._base = base
        self._policy = policy
        self._config = config
        self._metrics = metrics

    def take(self, lesson: Lesson) -> torch.Generator:
        """Put the parent's adapters into the trunk; return the round's own source of chance.

        Raises BadPolicyVersion: the folder is not what was published, or of another base model.
        """
        self._trunk.pace.start()
        parent = lesson.parent
        name = f"{self._config.seed}/{parent.policy}/{parent.version}/{lesson.number}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 2**63
        torch.manual_seed(seed)
        self._trunk.reset()
        if parent.policy_digest:
            folder = self._config.state.versions / parent.folder
            artifacts.verify(folder, parent.manifest_digest, self._base)
            self._trunk.load(folder)
        return torch.Generator().manual_seed(seed)

    def learn(self, lesson: Lesson, generator: torch.Generator) -> Learned:
        """Learn what a lesson holds.

        Numbers that break down block the round like anything else that speaks against it.
        """
        try:
            return self._learn(lesson.data, lesson.parent, generator, lesson.look)
        except (NotFinite, RatioMismatch) as error:
            gate = GateResult((f"broken: {error}",))
            return Learned(gate, describe_feedback(lesson.data))

    def _learn(
        self, data: Dataset, parent: PolicyVersion, generator: torch.Generator, look: int
    ) -> Learned:
        rewarded = self.learn_reward(data, parent, generator, look=look)
        if not rewarded.gate.passed:
            return rewarded
        calibration = Calibration.of(rewarded.metrics)
        improved = self._policy.improve(data, parent, calibration, generator)
        norms = {n: x for a in ADAPTERS for n, x in self._trunk.update_norms(a).items()}
        numbers = rewarded.metrics | improved.metrics | {"largest_update_norm": max(norms.values())}
        gate, settings = check_finite(numbers, norms), self._config.gate
        if settings.enabled:
            gate = all_of(
                gate,
                check_update(numbers, norms, settings),
                check_values(improved.values, settings),
                check_collapse(numbers, settings),
                check_length(numbers, data.recent, settings),
            )
        if gate.passed and has_drifted(numbers, settings):
            numbers = justify(numbers, settings)
        return Learned(gate, numbers, rewarded.replayed)

    def learn_reward(
        self, data: Dataset, parent: PolicyVersion, generator: torch.Generator, *, look: int
    ) -> Learned:
        """Fit the reward adapter, if it is proven that feedback like this can be learned from."""
        settings, is_proven = self._config.gate, bool(parent.reward_digest)
        before = Calibration.of(parent.metrics)
        with self._metrics.stage("evidence"):
            trials = self._try(data, parent, generator)
        parts = [trial.evidence for trial in trials]
        latest = pool(parts) if is_proven else pool_folds(parts)
        numbers = {
            **describe_feedback(data),
            **describe_evidence(latest, parent, settings.error_rate, look=look),
            **describe_claims(trials, data, before),
        }
        gate = check_reward(latest, settings, look=look, is_proven=is_proven)
        if settings.enabled and not gate.passed:
            return Learned(gate, numbers)
        with self._metrics.stage("reward fit"):
            replay = draw_replay(data, self._config.reward.replay_share, generator)
            fitted = reward.fit(
                self._trunk,
                [*data.new, *replay],
                self._config.reward,
                generator,
                [*data.new, *data.older],
            )
            again = reward.try_on(self._trunk, data.new, fitted.offset)
            replayed = reward.try_on(self._trunk, replay, fitted.offset)
        found = recalibrate([t.claims for t in trials], before._replace(offset=fitted.offset))
        found = settle([again.claims, replayed.claims], found)
        numbers |= {
            "reward_loss": fitted.loss,
            "reward_auroc_fitted": again.evidence.auroc,
            **found.metrics,
        }
        gate = check_fit(again.evidence, latest, settings) if settings.enabled else GateResult(())
        return Learned(gate, numbers, tuple(replay))

    def _try(self, data: Dataset, parent: PolicyVersion, generator: torch.Generator) -> list[Trial]:
        """Try a reward model on feedback that it was not fitted on.

        The parent's has never seen what is new, but for replies of which it learned something else before;
        where there is none yet, fits on some users are tried on the others.
        """
        if not parent.reward_digest:
            return reward.cross_fit(self._trunk, data.new, self._config.reward, generator)
        unseen = [j for j in data.new if not j.is_seen]
        return [reward.try_on(self._trunk, unseen, Calibration.of(parent.metrics).offset)]


def describe_feedback(data: Dataset) -> dict[str, float]:
    """Return how much feedback is new, how much of it is used, and how much of that speaks well."""
    thumbs = data.new_thumbs
    return {
        "feedback_new": float(data.num_new),
        "feedback_used": float(len(data.new)),
        "preferences_used": float(len(data.new) - len(thumbs)),
        "thumb_up_rate": sum(t.is_up for t in thumbs) / len(thumbs) if thumbs else 0.5,
    }


def describe_evidence(
    latest: Evidence, parent: PolicyVersion, error_rate: float, *, look: int
) -> dict[str, float]:
    """Return this round's evidence, and the strongest of the line, pooled round by round."""
    strongest = latest
    if parent.reward_digest:
        known = parent.metrics
        earlier = Evidence(known["reward_auroc"], known.get("reward_auroc_precision", 0.0))
        strongest = max(earlier, pool([earlier, latest]), key=lambda evidence: evidence.strength)
    return {
        "reward_auroc": strongest.auroc,
        "reward_auroc_bound": strongest.lower_bound(proof_confidence(look, error_rate)),
        "reward_auroc_precision": strongest.precision,
        "reward_auroc_latest": latest.auroc,
    }


def describe_claims(
    trials: Sequence[Trial], data: Dataset, calibration: Calibration
) -> dict[str, float]:
    """Return how far off the claims about unseen thumbs were, and how well unknown users were ranked."""
    known = {j.user for j in data.older}
    strangers = [
        held_out_auroc(
            [r for t, r in zip(trial.thumbs, trial.rewards, strict=True) if t.user not in known],
            [t.is_up for t in trial.thumbs if t.user not in known],
        )
        for trial in trials
    ]
    claimed = [
        p for t in trials for p in calibration._replace(offset=t.offset).probabilities(t.rewards)
    ]
    if not claimed:
        return {}
    return {
        "reward_auroc_new_users": pool(strangers).auroc,
        "reward_calibration_error": calibration_error(
            claimed, [float(t.is_up) for trial in trials for t in trial.thumbs]
        ),
        "reward_calibration_noise": calibration_noise(claimed),
    }


def draw_replay(data: Dataset, share: float, generator: torch.Generator) -> list[Judgement]:
    """Draw older feedback, at most `share` times as much as there is new."""
    size = int(share * len(data.new))  # or all there is
    chosen = torch.randperm(len(data.older), generator=generator)[:size].tolist()
    return [data.older[i] for i in sorted(chosen)]
