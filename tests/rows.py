"""Rows as the server and the trainer write them, complete but for what a test is about."""

import itertools
import time
from typing import Any

from sqlalchemy import Connection

from server.trial import Terms
from thumbloop.store import feedback, interactions
from thumbloop.types import (
    DEFAULT_POLICY,
    Arm,
    Candidate,
    Extent,
    FinishReason,
    Interaction,
    Learning,
    PolicyVersion,
    Prompt,
    Round,
    Sampling,
    Status,
    Strategy,
    User,
)

ANN = User(user_id="ann")
BOB = User(user_id="bob")

TERMS = Terms(
    share=0.2,
    promote_alpha=0.05,
    roll_back_alpha=0.1,
    horizon=100,
    min_time_s=60.0,
    max_time_s=3600.0,
    guard_alpha=0.01,
    margins={},
    max_corrupted=1,
    typical_s=1.0,
    typical_tokens=20.0,
    refusal_pattern="no",
)

_numbers = itertools.count(1)


def candidate(index: int = 0, **changes: Any) -> Candidate:
    values: dict[str, Any] = {
        "index": index,
        "policy_version": 1,
        "token_ids": (10 + index, 11, 1),
        "logprobs": (-0.5, -0.25, -1.5),
        "text": f"reply {index}",
        "finish_reason": FinishReason.STOP,
        "reward": 0.5 * index,
        "propensity": 0.5,
        "chosen": index == 0,
    }
    return Candidate(**(values | changes))


def interaction(response_id: str = "", **changes: Any) -> Interaction:
    values: dict[str, Any] = {
        "response_id": response_id or f"response-{next(_numbers):06d}",
        "policy": DEFAULT_POLICY,
        "policy_version": 1,
        "user": ANN,
        "session_id": "a session",
        "request_id": "",
        "prompt": Prompt(text="How was the film?"),
        "prompt_token_ids": (7, 8, 9),
        "sampling": Sampling(max_tokens=8, seed=2**64 - 1),
        "strategy": Strategy.SOFT_BEST_OF_N.value,
        "extent": Extent.REQUESTED,
        "arm": Arm.STRATEGY,
        "reranked": True,
        "learning": Learning.ALLOWED,
        "status": Status.COMPLETED,
        "trainable": True,
        "untrainable_reason": None,
        "policy_digest": "p" * 64,
        "reward_digest": "r" * 64,
        "created_at": 1_700_000_000.25,
        "candidates": (candidate(0), candidate(1)),
    }
    return Interaction(**(values | changes))


def version(number: int, parent: int | None = 0, **changes: Any) -> PolicyVersion:
    values: dict[str, Any] = {
        "policy": DEFAULT_POLICY,
        "version": number,
        "parent": parent,
        "folder": f"default/{number:06d}",
        "policy_digest": "p" * 64,
        "reward_digest": "r" * 64,
        "manifest_digest": "m" * 64,
        "published_at": 1_700_000_000.0 + number,
        "round_id": f"round-{number}",
    }
    return PolicyVersion(**(values | changes))


def finished_round(number: int, parent: int = 0, **changes: Any) -> Round:
    values: dict[str, Any] = {
        "round_id": f"round-{number}",
        "policy": DEFAULT_POLICY,
        "parent": parent,
        "started_at": 1.0,
        "finished_at": 2.0 + number,
        "version": number,
        "reason": "published",
        "metrics": {"kl": 0.5},
    }
    return Round(**(values | changes))


def rated(connection: Connection, value: int = 1, **changes: Any) -> tuple[str, int]:
    """Store a reply and a thumb for it; return their ids."""
    reply = interaction(**changes)
    interactions.append(connection, reply)
    stored = feedback.submit_thumb(connection, reply.response_id, value, reply.user, at=time.time())
    return reply.response_id, stored.feedback_id
