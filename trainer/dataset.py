"""Store -> what a round learns from. Whatever is left out is counted, by reason."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import Connection

from thumbloop.config.trainer import Round
from thumbloop.store import feedback, interactions, learned, preferences, versions
from thumbloop.types import (
    BASE_VERSION,
    IMPORTED,
    Candidate,
    FinishReason,
    Interaction,
    PolicyVersion,
    RatedReply,
    User,
)
from trainer.crowd import most_of_a_batch, most_of_a_user
from trainer.rollouts import Judgement, Rollout, Thumb
from trainer.stored import Judged, judgement_of, rollout_of


@dataclass(frozen=True, slots=True)
class Intake:
    """How many of a kind came in, and how many of them were left out, by reason."""

    came_in: int
    left_out: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a round may learn from, oldest first; `new` is what no ancestor has learned.

    `recent` is what of both was said of replies of the parent and the ancestors whose rollouts still count.
    Of each kind all that came in is used, or left out and counted: a `reply` for want of a thumb, a
    `thumb`, a `preference` and a `candidate` for what they are. What a limit of the settings kept from being
    read is `over_limit`, whatever it is: older rollouts and older feedback are counted, not looked at.
    """

    new: tuple[Judgement, ...]
    older: tuple[Judgement, ...]
    recent: tuple[Judgement, ...]
    rollouts: tuple[Rollout, ...]
    intake: Mapping[str, Intake]
    staleness: float = 0.0
    """Generations between the parent and the version that sampled a rollout, on average."""

    @property
    def new_thumbs(self) -> list[Thumb]:
        """Return the new thumbs, without the preferences."""
        return [judgement for judgement in self.new if isinstance(judgement, Thumb)]

    @property
    def num_new(self) -> int:
        """Return how much feedback is new, that over a user's cap included, but not beyond the factor: it
        makes no round due."""
        waiting = (reasons.get("over_user_cap", 0) for reasons in self.left_out.values())
        return len(self.new) + sum(waiting)

    @property
    def left_out(self) -> dict[str, dict[str, int]]:
        """Return how many were left out, by kind and reason."""
        return {kind: dict(intake.left_out) for kind, intake in self.intake.items()}


def read(
    connection: Connection,
    policy: str,
    parent: PolicyVersion,
    settings: Round,
    *,
    uses_preferences: bool = True,
    logged: Set[str] = frozenset(),
    now: float | None = None,
) -> Dataset:
    """Read what is new to the parent's lineage, and what its policy may be trained on.

    Preferences stay new where they are not used. `logged` names rewards that only the server can have
    computed.
    """
    learned_by = versions.rounds_behind(policy, parent.version)
    oldest = settings.oldest_feedback(time.time() if now is None else now)
    rated = feedback.list_rated(connection, policy, learned_by, settings.max_older_feedback)
    compared = preferences.list_compared(
        connection, policy, learned_by, settings.max_older_feedback
    )
    teaching, no_thumbs, no_pairs = _sift(
        [*rated, *compared], settings, oldest, uses_preferences=uses_preferences
    )
    seen = learned.learned_replies(connection, learned_by)
    judged = [(each.is_new, judgement_of(each, seen)) for each in teaching]
    no_replies: Counter[str] = Counter()
    for learning, status, count in interactions.count_unrated(connection, policy):
        no_replies[learned.reply_left_out(learning, status) or "unrated"] += count

    usable = usable_versions(
        versions.list_versions(connection, policy, has_metrics=False),
        parent,
        settings.max_staleness,
    )
    stored = interactions.newest_since(connection, policy, min(usable))
    used = interactions.used_as_rollouts(connection, learned_by, min(usable))
    before = interactions.count_candidates(connection, policy, before=min(usable))
    imported = interactions.count_candidates(connection, policy, before=BASE_VERSION)
    no_rollouts = Counter({IMPORTED: imported, "too_old": before - imported})
    asked = interactions.count_by_user(connection, policy, min(usable))
    most = most_of_a_batch(asked.values(), settings.max_user_factor, settings.max_rollouts)
    eligible = _eligible(stored, usable, used, logged, settings, most, no_rollouts)
    rollouts = list(islice(eligible, settings.max_rollouts))[::-1]
    # Counted last: what came in meanwhile, where a transaction sees it, was not looked at either.
    num_thumbs = feedback.count(connection, policy)
    num_pairs = preferences.count(connection, policy)
    num_candidates = interactions.count_candidates(connection, policy)
    no_thumbs["over_limit"] = num_thumbs - len(rated)
    no_pairs["over_limit"] = num_pairs - len(compared)
    no_rollouts["over_limit"] = num_candidates - no_rollouts.total() - len(rollouts)
    return Dataset(
        new=tuple(each for is_new, each in judged if is_new),
        older=tuple(each for is_new, each in judged if not is_new),
        recent=tuple(each for _, each in judged if each.policy_version in usable),
        rollouts=tuple(rollouts),
        intake={
            "reply": Intake(interactions.count(connection, policy), dict(+no_replies)),
            "thumb": Intake(num_thumbs, dict(+no_thumbs)),
            "preference": Intake(num_pairs, dict(+no_pairs)),
            "candidate": Intake(num_candidates, dict(+no_rollouts)),
        },
        staleness=staleness(rollouts, usable),
    )


def staleness(rollouts: Sequence[Rollout], usable: Set[int]) -> float:
    """Return how many generations before the parent rollouts were sampled, on average; `usable` is the
    parent's line."""
    generations = {version: n for n, version in enumerate(sorted(usable, reverse=True))}
    ages = [generations[r.policy_version] for r in rollouts]
    return sum(ages) / len(ages) if ages else 0.0


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


def feedback_left_out(judged: Judged, oldest: float) -> str | None:
    """Return why a thumb or a preference may not be learned from; `oldest` is in unix seconds."""
    if reason := learned.reply_left_out(judged.learning, judged.status):
        return reason
    if judged.created_at < oldest:
        return "too_old"
    if isinstance(judged, RatedReply):
        responses = [judged.candidate.token_ids]
    else:
        responses = [judged.better.token_ids, judged.worse.token_ids]
    return "empty" if not judged.prompt_token_ids or not all(responses) else None


def interaction_left_out(interaction: Interaction, settings: Round) -> str | None:
    """Return why none of an interaction's candidates may train the policy."""
    if reason := learned.reply_left_out(interaction.learning, interaction.status):
        return reason
    reason = interaction.untrainable_reason
    if not interaction.trainable and (reason != "pruned" or settings.pruned == "exclude"):
        return reason or "untrainable"
    if not interaction.prompt_token_ids:
        return "empty"
    return None


def candidate_left_out(candidate: Candidate, usable: Set[int], settings: Round) -> str | None:
    """Return why one candidate may not train the policy."""
    if candidate.policy_version not in usable:
        return "other_lineage"
    if not candidate.token_ids:
        return "empty"
    if len(candidate.logprobs) != len(candidate.token_ids):
        return "no_logprobs"
    if settings.candidates == "chosen" and not candidate.chosen:
        return "not_chosen"
    if settings.pruned == "survivors" and candidate.finish_reason is FinishReason.ABORTED:
        return "aborted"
    return None


def _sift(
    judged: Sequence[Judged], settings: Round, oldest: float, *, uses_preferences: bool
) -> tuple[list[Judged], Counter[str], Counter[str]]:
    """Return what may be learned from, oldest first, and how many thumbs and preferences may not, by reason.

    Of a user's new feedback the newest is taken, of whatever kind, as far as the caps go; the rest stays new.
    """
    left_out: list[tuple[Judged, str]] = []
    teaching: list[Judged] = []
    for each in judged:
        reason = feedback_left_out(each, oldest)
        if reason is None and not (isinstance(each, RatedReply) or uses_preferences):
            reason = "turned_off"
        if reason is None:
            teaching.append(each)
        else:
            left_out.append((each, reason))
    kept: list[Judged] = []
    older_of = Counter(each.user for each in teaching if not each.is_new)
    new_of: Counter[User] = Counter()
    most = most_of_a_user(
        Counter(each.user for each in teaching).values(), settings.max_user_factor
    )
    for each in sorted(teaching, key=_recency, reverse=True):
        new_of[each.user] += each.is_new
        if each.is_new and new_of[each.user] + older_of[each.user] > most:
            left_out.append((each, "over_user_factor"))
        elif each.is_new and new_of[each.user] > settings.max_user_feedback:
            left_out.append((each, "over_user_cap"))
        else:
            kept.append(each)
    no_thumbs = Counter(reason for each, reason in left_out if isinstance(each, RatedReply))
    no_pairs = Counter(reason for each, reason in left_out if not isinstance(each, RatedReply))
    return kept[::-1], no_thumbs, no_pairs


def _recency(judged: Judged) -> tuple[float, int]:
    number = judged.feedback_id if isinstance(judged, RatedReply) else judged.preference_id
    return judged.created_at, number


def _eligible(
    newest_first: Iterable[Interaction],
    usable: Set[int],
    used: Iterable[Interaction],
    logged: Set[str],
    settings: Round,
    most_of_a_user: float,
    reasons: Counter[str],
) -> Iterator[Rollout]:
    """Yield what may train the policy, newest first; add to `reasons` what was passed over on the way.

    A user of whom there are as many as may be has no further reply in it; replies are not divided.

    Of draws that are the same, one that was used counts, else the newest: the same draw again is no new sample.
    """
    used_ids = {interaction.response_id: _draw(interaction) for interaction in used}
    seen = set(used_ids.values())
    given: Counter[User] = Counter()
    for interaction in newest_first:
        reason = interaction_left_out(interaction, settings)
        if reason is None and interaction.response_id in used_ids:
            reason = "used"
        if reason is None and interaction.sampling.seed is not None:
            reason = "repeated" if _draw(interaction) in seen else None
            seen.add(_draw(interaction))
        if reason is None and given[interaction.user] >= most_of_a_user:
            reason = "over_user_factor"
        for candidate in reversed(interaction.candidates):
            why = reason or candidate_left_out(candidate, usable, settings)
            is_whole = candidate.finish_reason is not FinishReason.ABORTED
            if why is None and is_whole and not logged <= candidate.reward_components.keys():
                why = "no_reward"
            if why is not None:
                reasons[why] += 1
            else:
                given[interaction.user] += 1
                yield rollout_of(interaction, candidate)


def _draw(interaction: Interaction) -> tuple[object, ...]:
    """Return what two interactions have in common that are the same draw, where they have a seed."""
    return interaction.policy_version, interaction.prompt_token_ids, interaction.sampling
