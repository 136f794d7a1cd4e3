"""Types -> protocol buffers: what callers get back."""

import math
from collections.abc import Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import RowMapping

from server.trial import THUMBS
from thumbloop.store.erasure import Erasure
from thumbloop.store.imports import Brought, Outcome
from thumbloop.store.lineage import Inputs
from thumbloop.types import (
    Candidate,
    Extent,
    Feedback,
    FinishReason,
    Interaction,
    PolicyVersion,
    Preference,
    VersionState,
)
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

_FINISH = {
    FinishReason.STOP: policy_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: policy_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: policy_pb2.FINISH_REASON_ABORTED,
}
_EXTENTS = {
    extent: policy_pb2.CandidateExtent.Value(f"CANDIDATE_EXTENT_{extent.name}") for extent in Extent
}
_STATES = {
    state: admin_pb2.PolicyVersionState.Value(f"POLICY_VERSION_STATE_{state.name}")
    for state in VersionState
}
_OUTCOMES = {
    outcome: admin_pb2.ImportOutcome.Value(f"IMPORT_OUTCOME_{outcome.name}") for outcome in Outcome
}


def response_of(
    interaction: Interaction, *, include_candidates: bool
) -> policy_pb2.GenerateResponse:
    """Return what the caller gets for an interaction."""
    chosen = interaction.chosen
    return policy_pb2.GenerateResponse(
        response_id=interaction.response_id,
        text=chosen.text,
        finish_reason=_FINISH[chosen.finish_reason],
        policy_version=interaction.policy_version,
        reward=_finite(chosen.reward),
        candidates=_candidates(interaction.candidates) if include_candidates else (),
        usage=policy_pb2.Usage(
            prompt_tokens=len(interaction.prompt_token_ids),
            reply_tokens=len(chosen.token_ids),
            candidate_tokens=sum(len(c.token_ids) for c in interaction.candidates),
        ),
        reranked=interaction.reranked,
        num_candidates=len(interaction.candidates),
        candidate_extent=_EXTENTS[interaction.extent],
    )


def feedback_of(stored: Feedback) -> feedback_pb2.SubmitFeedbackResponse:
    """Return what the caller gets for a thumb."""
    return feedback_pb2.SubmitFeedbackResponse(
        feedback_id=stored.feedback_id,
        policy_version=stored.policy_version,
        duplicate=stored.duplicate,
    )


def preference_of(stored: Preference) -> feedback_pb2.SubmitPreferenceResponse:
    """Return what the caller gets for a preference."""
    return feedback_pb2.SubmitPreferenceResponse(
        preference_id=stored.preference_id, duplicate=stored.duplicate
    )


def erasure_of(done: Erasure, at: float) -> feedback_pb2.DeleteUserDataResponse:
    """Return what the caller gets for an erasure that is durable since then."""
    return feedback_pb2.DeleteUserDataResponse(
        interactions_erased=done.interactions,
        feedback_erased=done.feedback,
        tainted_policy_versions=done.tainted,
        erased_at=timestamp_of(at),
    )


def imports_of(done: Sequence[tuple[Brought, str]]) -> admin_pb2.ImportFeedbackResponse:
    """Return what the caller gets for what was brought in, each with why it was refused."""
    return admin_pb2.ImportFeedbackResponse(
        results=[
            admin_pb2.ImportResult(
                outcome=_OUTCOMES[each.outcome], response_id=each.response_id, reason=reason
            )
            for each, reason in done
        ]
    )


def _candidates(candidates: Sequence[Candidate]) -> list[policy_pb2.Candidate]:
    return [
        policy_pb2.Candidate(
            text=c.text,
            reward=_finite(c.reward),
            finish_reason=_FINISH[c.finish_reason],
            index=c.index,
            reward_components=c.reward_components,
            stage_rewards=c.stage_rewards,
        )
        for c in candidates
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def version_of(version: PolicyVersion, *, is_available: bool) -> admin_pb2.PolicyVersion:
    """Return a version as callers see it."""
    return admin_pb2.PolicyVersion(
        policy=version.policy,
        policy_version=version.version,
        parent_version=version.parent,
        state=_STATES[version.state],
        reason=version.reason,
        published_at=timestamp_of(version.published_at),
        state_since=timestamp_of(version.state_since),
        policy_digest=version.policy_digest,
        reward_digest=version.reward_digest,
        metrics=dict(version.metrics),
        feedback_count=version.feedback_count,
        first_feedback_id=version.first_feedback_id,
        last_feedback_id=version.last_feedback_id,
        is_available=is_available,
        is_tainted=version.is_tainted,
        collected_at=None if version.collected_at is None else timestamp_of(version.collected_at),
    )


def step_of(version: PolicyVersion, used: Inputs) -> admin_pb2.LineageStep:
    """Return a version of a line, and what its round used, as callers see it."""
    return admin_pb2.LineageStep(
        policy_version=version.version,
        state=_STATES[version.state],
        published_at=timestamp_of(version.published_at),
        is_tainted=version.is_tainted,
        round_id=version.round_id or "",
        feedback_count=version.feedback_count,
        first_feedback_id=version.first_feedback_id,
        last_feedback_id=version.last_feedback_id,
        replayed_count=used.replayed,
        reply_count=used.replies,
    )


def event_of(row: RowMapping) -> admin_pb2.PolicyVersionEvent:
    """Return what happened to a version as callers see it."""
    detail = row["detail"]
    return admin_pb2.PolicyVersionEvent(
        at=timestamp_of(row["at"]),
        state=_STATES.get(row["kind"], admin_pb2.POLICY_VERSION_STATE_UNSPECIFIED),
        actor=row["actor"],
        reason=detail["reason"],
        evidence=measures_of(detail.get("evidence", {})),
    )


def measures_of(
    evidence: Mapping[str, Mapping[str, float | None]],
) -> list[admin_pb2.TrialMeasure]:
    """Return what users say of each measure, thumbs first."""
    names = sorted(evidence, key=lambda name: (name != THUMBS, name))
    return [
        admin_pb2.TrialMeasure(
            name=name,
            canary_users=int(evidence[name]["canary_users"] or 0),
            current_users=int(evidence[name]["current_users"] or 0),
            canary_mean=evidence[name]["canary_mean"],
            current_mean=evidence[name]["current_mean"],
            log_higher=evidence[name]["log_higher"] or 0.0,
            log_lower=evidence[name]["log_lower"] or 0.0,
            log_held=evidence[name].get("log_held") or 0.0,  # events of earlier releases have none
        )
        for name in names
    ]


def timestamp_of(seconds: float) -> Timestamp:
    """Return unix seconds as a timestamp."""
    whole = math.floor(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))
