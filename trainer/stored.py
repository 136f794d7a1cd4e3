"""What the store holds, as what is learned from."""

from collections.abc import Set

from thumbloop.types import (
    Candidate,
    ComparedReply,
    FinishReason,
    Interaction,
    RatedReply,
    Sampling,
    User,
)
from trainer.rollouts import Comparison, Judgement, Rollout, Thumb

Judged = RatedReply | ComparedReply


def rollout_of(interaction: Interaction, candidate: Candidate) -> Rollout:
    """Return a stored candidate as PPO takes it."""
    return _sampled(
        candidate,
        interaction.response_id,
        interaction.user,
        interaction.prompt_token_ids,
        interaction.sampling,
    )


def _sampled(
    candidate: Candidate,
    response_id: str,
    user: User,
    prompt: tuple[int, ...],
    sampling: Sampling,
) -> Rollout:
    components = candidate.reward_components
    return Rollout(
        response_id=response_id,
        policy_version=candidate.policy_version,
        prompt=prompt,
        response=candidate.token_ids,
        logprobs=candidate.logprobs,
        temperature=sampling.temperature,
        is_finished=candidate.finish_reason is not FinishReason.ABORTED,
        has_eos=candidate.finish_reason is FinishReason.STOP,
        user=_name(user),
        reward=components.get("thumbs") if components else candidate.reward,
        propensity=candidate.propensity,
        components=components,
    )


def judgement_of(judged: Judged, seen: Set[str]) -> Judgement:
    """Return stored feedback as the reward model takes it; `seen` holds the ids of replies that the parent's was fitted on."""
    is_seen = judged.response_id in seen
    return _thumb(judged, is_seen) if isinstance(judged, RatedReply) else _pair(judged, is_seen)


def _thumb(rated: RatedReply, is_seen: bool) -> Thumb:
    candidate = rated.candidate
    is_plain = rated.sampling.untrainable_reason is None
    is_complete = len(candidate.logprobs) == len(candidate.token_ids)
    reply = (rated.response_id, rated.user, rated.prompt_token_ids, rated.sampling)
    return Thumb(
        feedback_id=rated.feedback_id,
        response_id=rated.response_id,
        user=_name(rated.user),
        is_up=bool(rated.value),
        prompt=rated.prompt_token_ids,
        response=candidate.token_ids,
        propensity=candidate.propensity,
        is_seen=is_seen,
        policy_version=rated.policy_version,
        sample=_sampled(candidate, *reply) if is_plain and is_complete else None,
    )


def _pair(compared: ComparedReply, is_seen: bool) -> Comparison:
    return Comparison(
        preference_id=compared.preference_id,
        response_id=compared.response_id,
        user=_name(compared.user),
        prompt=compared.prompt_token_ids,
        better=compared.better.token_ids,
        worse=compared.worse.token_ids,
        is_seen=is_seen,
        policy_version=compared.policy_version,
    )


def _name(user: User) -> str:
    return f"{user.subject}\0{user.user_id}"
