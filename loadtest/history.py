"""What a round starts from: a version, frozen rollouts as its replies, thumbs on them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import time
from typing import Any

import uuid_utils

from loadtest.fill import History, Said
from thumbloop.config import State
from thumbloop.store import feedback, interactions, open_store, reading, versions
from thumbloop.types import (
    BASE_VERSION,
    DEFAULT_POLICY,
    Arm,
    Candidate,
    Extent,
    FinishReason,
    Interaction,
    Learning,
    PolicyVersion,
    Prompt,
    RatedReply,
    Sampling,
    Status,
    Strategy,
    User,
)

PROVEN = {"reward_auroc": 1.0, "reward_auroc_variance": 0.0, "reward_auroc_pairs": 1e9}
"""What the first trainer's gate asked of a parent, and later ones do not."""

Frozen = Mapping[str, Any]
"""A rollout of a job that `python -m experiments.frozen` wrote."""


def history_of(state: State, number: int, rollouts: Sequence[Frozen], candidates: int) -> History:
    """Return what a version's next round learns from, as if its parent were the base model.

    Of each group of rollouts the first was shown, to a user of its own. It has a thumb, up where
    its score is above the middle: how it is rated does not matter to how long it takes to learn from.
    The thumbs that it replays are those that it has learned in the run.
    """
    store = open_store(state)
    try:
        with reading(store) as connection:
            version = versions.get(connection, DEFAULT_POLICY, number)
            assert version is not None, "the run's report names its versions"
            learned_by = versions.learned_by(connection, DEFAULT_POLICY, number)
            rated = feedback.list_rated(connection, DEFAULT_POLICY, learned_by)
            learned = [each for each in rated if not each.is_new]
            replayed = [interactions.get(connection, each.response_id) for each in learned]
    finally:
        store.dispose()
    starts = range(0, len(rollouts), candidates)
    replies = [_reply(version, rollouts[i : i + candidates]) for i in starts]
    middle = median(rollout["score"] for rollout in rollouts)
    return History(
        version=replace(version, parent=BASE_VERSION, metrics={**version.metrics, **PROVEN}),
        interactions=(*(reply for reply in replayed if reply is not None), *replies),
        learned=tuple(map(_said, learned)),
        new=tuple(_rate(reply, middle) for reply in replies),
    )


def _reply(version: PolicyVersion, group: Sequence[Frozen]) -> Interaction:
    """Return the reply to a prompt of which one candidate was shown, drawn by lot."""
    response_id = str(uuid_utils.uuid7())
    return Interaction(
        response_id=response_id,
        policy=version.policy,
        policy_version=version.version,
        user=User(user_id=response_id),
        session_id="",
        request_id="",
        prompt=Prompt(text=""),
        prompt_token_ids=tuple(group[0]["prompt"]),
        sampling=Sampling(max_tokens=max(len(each["response"]) for each in group)),
        strategy=Strategy.SOFT_BEST_OF_N.value,
        arm=Arm.AUDIT,
        reranked=True,
        extent=Extent.REQUESTED,
        learning=Learning.ALLOWED,
        status=Status.COMPLETED,
        trainable=True,
        untrainable_reason=None,
        policy_digest=version.policy_digest,
        reward_digest=version.reward_digest,
        created_at=time(),
        candidates=tuple(
            Candidate(
                index=i,
                policy_version=version.version,
                token_ids=tuple(each["response"]),
                logprobs=tuple(each["logprobs"]),
                text="",
                finish_reason=FinishReason.STOP if each["has_eos"] else FinishReason.LENGTH,
                reward=each["score"],
                propensity=1 / len(group),
                chosen=i == 0,
            )
            for i, each in enumerate(group)
        ),
    )


def _rate(reply: Interaction, middle: float) -> Said:
    reward = reply.chosen.reward
    assert reward is not None, "frozen rollouts have scores"
    return Said(reply.response_id, reply.user, int(reward > middle), reply.created_at)


def _said(rated: RatedReply) -> Said:
    return Said(rated.response_id, rated.user, rated.value, rated.created_at)
