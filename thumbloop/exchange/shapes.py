"""What a record of each shape looks like: what the store holds, as TRL and others read it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Engine

from thumbloop.errors import BadDataFile
from thumbloop.store import exports
from thumbloop.store.exports import EVERYTHING, Rolled, Said, Selection
from thumbloop.types import Candidate, Message, Prompt, Role

Record = dict[str, Any]


class Shape(StrEnum):
    """What a data set holds."""

    KTO = "kto"
    """prompt, completion, label: TRL's unpaired preferences, from thumbs."""
    DPO = "dpo"
    """prompt, chosen, rejected: TRL's preferences, from preferences."""
    ROLLOUTS = "rollouts"
    """Replies with every candidate that was sampled for them."""


class Prompts(StrEnum):
    """Replies to what a data set holds; TRL reads one kind from a file."""

    TEXT = "text"
    """Texts to continue: TRL's standard format."""
    CHAT = "chat"
    """Conversations: TRL's conversational format."""


def records(
    engine: Engine,
    policy: str,
    shape: Shape,
    which: Selection = EVERYTHING,
    *,
    prompts: Prompts | None = None,
    has_origin: bool = False,
) -> Iterator[Record]:
    """Yield the records of a shape, oldest first; `has_origin` adds where each comes from, and whose it is.

    Raises BadDataFile: there are prompts of both kinds, and `prompts` does not say which. StoreUnavailable.
    """
    if shape is Shape.ROLLOUTS:
        for rolled in exports.rolled(engine, policy, which):
            if prompts in (None, _kind(rolled.reply.prompt)):
                yield _rollout(rolled, has_origin=has_origin)
        return
    told: Iterator[tuple[Said, dict[str, str], Record]]
    if shape is Shape.KTO:
        told = (
            (each.said, {"completion": each.text}, {"label": each.is_up})
            for each in exports.rated(engine, policy, which)
        )
    else:
        told = (
            (each.said, {"chosen": each.better, "rejected": each.worse}, {})
            for each in exports.compared(engine, policy, which)
        )
    expected = prompts
    for said, replies, verdict in told:
        kind = _kind(said.prompt)
        if prompts is not None and kind is not prompts:
            continue
        expected = expected or kind
        if kind is not expected:
            raise BadDataFile(
                "the store holds replies to texts and to conversations, and a data set is of one kind:"
                " say --prompts text or --prompts chat"
            )
        told_as = {name: _reply(text, kind) for name, text in replies.items()}
        origin = _origin(said) if has_origin else {}
        yield {"prompt": _prompt(said.prompt)} | told_as | verdict | origin


def _kind(prompt: Prompt) -> Prompts:
    return Prompts.CHAT if prompt.text is None else Prompts.TEXT


def _prompt(prompt: Prompt) -> str | list[Record]:
    return _turns(prompt.messages) if prompt.text is None else prompt.text


def _reply(text: str, kind: Prompts) -> str | list[Record]:
    return text if kind is Prompts.TEXT else _turns([Message(Role.ASSISTANT, text)])


def _turns(messages: Sequence[Message]) -> list[Record]:
    return [{"role": turn.role.value, "content": turn.content} for turn in messages]


def _origin(said: Said) -> Record:
    return {
        "response_id": said.response_id,
        "policy_version": said.policy_version,
        "subject": said.user.subject,
        "user_id": said.user.user_id,
        "created_at": _time(said.at),
    }


def _time(at: float) -> str:
    """Return unix seconds as ISO 8601, UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def _rollout(rolled: Rolled, *, has_origin: bool) -> Record:
    reply = rolled.reply
    record: Record = {
        "response_id": reply.response_id,
        "policy_version": reply.policy_version,
        "created_at": _time(reply.created_at),
        "text": reply.prompt.text,
        "messages": None if reply.prompt.text is not None else _turns(reply.prompt.messages),
        "prompt_token_ids": list(reply.prompt_token_ids),
        "sampling": asdict(reply.sampling) | {"stop": list(reply.sampling.stop)},
        "strategy": str(reply.strategy),
        "arm": reply.arm.value,
        "reranked": reply.reranked,
        "trainable": reply.trainable,
        "untrainable_reason": reply.untrainable_reason,
        "thumb": rolled.is_up,
        "preferences": [{"better": better, "worse": worse} for better, worse in rolled.preferences],
        "candidates": [_candidate(each) for each in reply.candidates],
    }
    if has_origin:
        record |= {
            "subject": reply.user.subject,
            "user_id": reply.user.user_id,
            "session_id": reply.session_id,
        }
    return record


def _candidate(candidate: Candidate) -> Record:
    components = candidate.reward_components.items()
    return {
        "index": candidate.index,
        "policy_version": candidate.policy_version,
        "chosen": candidate.chosen,
        "text": candidate.text,
        "finish_reason": candidate.finish_reason.value,
        "token_ids": list(candidate.token_ids),
        "logprobs": list(candidate.logprobs),
        "reward": _finite(candidate.reward),
        "reward_components": [
            {"name": name, "value": _finite(value)} for name, value in components
        ],
        "stage_rewards": [_finite(value) for value in candidate.stage_rewards],
        "propensity": candidate.propensity,
    }


def _finite(value: float | None) -> float | None:
    """Return a number as JSON has it: a reward that is none, of a forged verdict, is null."""
    return value if value is not None and math.isfinite(value) else None
