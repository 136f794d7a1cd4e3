"""Store -> what a round learns from. Whatever is left out is counted, by reason."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from sqlalchemy import Connection

from thumbloop.config.trainer import Round
from thumbloop.store import feedback, interactions, versions
from thumbloop.types import (
    Candidate,
    FinishReason,
    Interaction,
    Learning,
    PolicyVersion,
    RatedReply,
    Status,
)
from trainer.rollouts import Rollout, Thumb


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a round may learn from, oldest first.

    Every effective thumb is in `new`, in `older` or counted in `thumbs_left_out`; every candidate is
    in `rollouts` or counted in `rollouts_left_out`.
    """

    new: tuple[Thumb, ...]
    older: tuple[Thumb, ...]
    rollouts: tuple[Rollout, ...]
    thumbs_left_out: Mapping[str, int]
    rollouts_left_out: Mapping[str, int]


def read(connection: Connection, policy: str, parent: PolicyVersion, settings: Round) -> Dataset:
    """Read what is new to the parent's lineage, and what its policy may be trained on."""
    learned_by = versions.learned_by(connection, policy, parent.version)
    rated = feedback.list_rated(connection, policy, learned_by)
    no_thumbs = Counter(reason for r in rated if (reason := thumb_left_out(r)))
    thumbs = [(r.is_new, _thumb(r)) for r in rated if thumb_left_out(r) is None]

    usable = usable_versions(
        versions.list_versions(connection, policy), parent, settings.max_staleness
    )
    stored = interactions.list_since(connection, policy, min(usable))
    used = interactions.used_as_rollouts(connection, learned_by)
    no_rollouts = Counter(too_old=interactions.count_before(connection, policy, min(usable)))
    rollouts = list(_eligible(stored, usable, used, no_rollouts))
    no_rollouts["over_limit"] = max(0, len(rollouts) - settings.max_rollouts)
    return Dataset(
        new=tuple(thumb for is_new, thumb in thumbs if is_new),
        older=tuple(thumb for is_new, thumb in thumbs if not is_new),
        rollouts=tuple(rollouts[-settings.max_rollouts :]),
        thumbs_left_out=dict(no_thumbs),
        rollouts_left_out=dict(+no_rollouts),
    )


def usable_versions(
    known: Iterable[PolicyVersion], parent: PolicyVersion, max_staleness: int
) -> set[int]:
    """Return the parent and its ancestors up to `max_staleness` generations back."""
    parents = {v.version: v.parent for v in known}
    usable = {parent.version}
    ancestor = parents[parent.version]
    while ancestor is not None and len(usable) <= max_staleness:
        usable.add(ancestor)
        ancestor = parents[ancestor]
    return usable


def thumb_left_out(rated: RatedReply) -> str | None:
    """Return why a thumb may not be learned from."""
    if rated.learning is Learning.EXCLUDED:
        return "learning_excluded"
    if rated.status is not Status.COMPLETED:
        return "cancelled"
    if not rated.prompt_token_ids or not rated.candidate.token_ids:
        return "empty"
    return None


def interaction_left_out(interaction: Interaction) -> str | None:
    """Return why none of an interaction's candidates may train the policy."""
    if interaction.learning is Learning.EXCLUDED:
        return "learning_excluded"
    if interaction.status is not Status.COMPLETED:
        return "cancelled"
    if not interaction.trainable:
        return interaction.untrainable_reason or "untrainable"
    if not interaction.prompt_token_ids:
        return "empty"
    return None


def candidate_left_out(candidate: Candidate, usable: Set[int]) -> str | None:
    """Return why one candidate may not train the policy."""
    if candidate.policy_version not in usable:
        return "other_lineage"
    if not candidate.token_ids:
        return "empty"
    if len(candidate.logprobs) != len(candidate.token_ids):
        return "no_logprobs"
    return None


def _eligible(
    stored: Sequence[Interaction], usable: Set[int], used: Set[str], reasons: Counter[str]
) -> Iterator[Rollout]:
    """Yield what may train the policy; add the rest to `reasons`."""
    seen: set[object] = set()
    for interaction in stored:
        reason = interaction_left_out(interaction)
        if reason is None and interaction.sampling.seed is not None:
            draw = (interaction.policy_version, interaction.prompt_token_ids, interaction.sampling)
            reason = "repeated" if draw in seen else None  # the same draw again is no new sample
            seen.add(draw)
        if reason is None and interaction.response_id in used:
            reason = "used"
        for candidate in interaction.candidates:
            if why := reason or candidate_left_out(candidate, usable):
                reasons[why] += 1
            else:
                yield _rollout(interaction, candidate)


def _rollout(interaction: Interaction, candidate: Candidate) -> Rollout:
    return Rollout(
        response_id=interaction.response_id,
        policy_version=candidate.policy_version,
        prompt=interaction.prompt_token_ids,
        response=candidate.token_ids,
        logprobs=candidate.logprobs,
        temperature=interaction.sampling.temperature,
        is_finished=candidate.finish_reason is not FinishReason.ABORTED,
        has_eos=candidate.finish_reason is FinishReason.STOP,
    )


def _thumb(rated: RatedReply) -> Thumb:
    return Thumb(
        feedback_id=rated.feedback_id,
        user=f"{rated.user.subject}\0{rated.user.user_id}",
        is_up=bool(rated.value),
        prompt=rated.prompt_token_ids,
        response=rated.candidate.token_ids,
        propensity=rated.candidate.propensity,
        is_seen=rated.is_seen,
    )
