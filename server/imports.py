"""Feedback from before: protocol buffers -> rows that the reward model learns from and PPO does not."""

import asyncio
import hashlib
import time
from collections.abc import Sequence

import uuid_utils
from sqlalchemy import Connection

from server.access import Caller
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.pipeline import Pipeline
from server.translation import MAX_COMMENT, THUMBS, check_policy, prompt_of
from server.violations import Violations
from thumbloop.config.server import Limits
from thumbloop.errors import InvalidRequest
from thumbloop.store import GroupWriter
from thumbloop.store.imports import BETTER, Brought, Import, Outcome, bring_in
from thumbloop.types import (
    DEFAULT_POLICY,
    IMPORTED,
    IMPORTED_VERSION,
    MAX_ID,
    Arm,
    Candidate,
    Extent,
    FinishReason,
    Interaction,
    Learning,
    Prompt,
    Sampling,
    Status,
    User,
)
from thumbloop.v1 import admin_pb2

MAX_ITEMS = 256
_TAKEN = "source_id: was imported with something else; give this another name"
_AHEAD_S = 60.0  # by which clocks may differ


class Imports:
    """Takes in what people said elsewhere, as soon as there is a tokenizer to read it with."""

    def __init__(
        self, writer: GroupWriter, lifecycle: Lifecycle, metrics: ServerMetrics, limits: Limits
    ) -> None:
        self._writer = writer
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._limits = limits

    async def take(
        self, message: admin_pb2.ImportFeedbackRequest, caller: Caller
    ) -> list[tuple[Brought, str]]:
        """Store each item, or say why not; what is stored is durable when this returns.

        Raises InvalidRequest: too many items. UnknownPolicy, RequestIdTaken, Draining, EngineUnavailable,
        Overloaded, StoreUnavailable.
        """
        check_policy(message.policy)
        wrong = Violations()
        wrong.expect(len(message.items) <= MAX_ITEMS, "items", f"at most {MAX_ITEMS} in a call")
        wrong.storable(message.subject, MAX_ID, "subject")
        wrong.raise_if_any()
        subject = message.subject if message.HasField("subject") else None
        now = time.time()
        with self._lifecycle.admit() as pipeline:
            read: list[Import | str] = []
            for item in message.items:
                user = caller.any_user(subject, item.user_id)
                read.append(self._read(item, user, pipeline, now))
                await asyncio.sleep(0)  # the loop's other calls go on between two items
            good = [each for each in read if isinstance(each, Import)]
            stored = iter(await self._store(good, now, caller.subject or "operator"))
        done = [
            (Brought(Outcome.REFUSED), each) if isinstance(each, str) else _explained(next(stored))
            for each in read
        ]
        for item, (each, _) in zip(message.items, done, strict=True):
            self._metrics.observe_import(item.WhichOneof("verdict") or "none", each.outcome.value)
        return done

    async def _store(self, items: Sequence[Import], now: float, actor: str) -> list[Brought]:
        def change(connection: Connection) -> list[Brought]:
            return bring_in(connection, DEFAULT_POLICY, items, at=now, actor=actor)

        return await self._writer.run(change)

    def _read(
        self, item: admin_pb2.ImportedFeedback, user: User, pipeline: Pipeline, now: float
    ) -> Import | str:
        """Return an item as it is stored, or what is wrong with it."""
        try:
            prompt = self._check(item, now)
            return _import_of(item, user, prompt, pipeline, now)
        except InvalidRequest as error:
            return str(error)

    def _check(self, item: admin_pb2.ImportedFeedback, now: float) -> Prompt:
        """Return the prompt. Raises InvalidRequest with all that is wrong with an item."""
        wrong = Violations()
        prompt = prompt_of(item, self._limits, wrong)
        kind = item.WhichOneof("verdict")
        wrong.expect(kind is not None, "verdict", "is missing; set `thumb` or `preference`")
        wrong.expect(
            kind != "thumb" or item.thumb.thumb in THUMBS,
            "thumb.thumb",
            "has to be THUMB_UP or THUMB_DOWN",
        )
        for field, reply in _replies(item):
            wrong.expect(bool(reply.strip()), field, "is empty")
            wrong.storable(reply, self._limits.max_prompt_characters, field)
        is_another = kind != "preference" or item.preference.better != item.preference.worse
        wrong.expect(is_another, "preference.worse", "is the same as preference.better")
        wrong.storable(item.thumb.comment, MAX_COMMENT, "thumb.comment")
        wrong.storable(item.user_id, MAX_ID, "user_id")
        wrong.storable(item.source_id, MAX_ID, "source_id")
        in_range = 0 <= _said_at(item, now) <= now + _AHEAD_S
        wrong.expect(in_range, "said_at", "has to be between 1970 and now")
        wrong.raise_if_any()
        return prompt


def _explained(each: Brought) -> tuple[Brought, str]:
    return each, _TAKEN if each.outcome is Outcome.REFUSED else ""


def _replies(item: admin_pb2.ImportedFeedback) -> list[tuple[str, str]]:
    """Return the replies of an item by their fields, the better one first."""
    if item.WhichOneof("verdict") == "preference":
        pair = item.preference
        return [("preference.better", pair.better), ("preference.worse", pair.worse)]
    return [("thumb.reply", item.thumb.reply)] if item.WhichOneof("verdict") else []


def _said_at(item: admin_pb2.ImportedFeedback, now: float) -> float:
    at = item.said_at
    return at.seconds + at.nanos / 1e9 if item.HasField("said_at") else now


def _import_of(
    item: admin_pb2.ImportedFeedback, user: User, prompt: Prompt, pipeline: Pipeline, now: float
) -> Import:
    """Return the rows of an item. Raises InvalidRequest: the model's context has no room for it."""
    digest = hashlib.sha256(item.SerializeToString(deterministic=True)).hexdigest()
    name = hashlib.sha256(item.source_id.encode()).hexdigest() if item.source_id else digest
    read = [(text, *pipeline.read(prompt, text, field)) for field, text in _replies(item)]
    candidates = tuple(
        Candidate(
            index=index,
            policy_version=IMPORTED_VERSION,
            token_ids=token_ids,
            logprobs=(),  # nobody knows them
            text=text,
            finish_reason=FinishReason.STOP,
            chosen=index == BETTER,
        )
        for index, (text, _, token_ids) in enumerate(read)
    )
    reply = Interaction(
        response_id=str(uuid_utils.uuid7()),
        policy=DEFAULT_POLICY,
        policy_version=IMPORTED_VERSION,
        user=user,
        session_id="",
        request_id=f"{IMPORTED}-{name}",
        request_digest=digest,
        prompt=prompt,
        prompt_token_ids=read[0][1],
        sampling=Sampling(max_tokens=max(len(c.token_ids) for c in candidates)),
        strategy=IMPORTED,
        arm=Arm.IMPORTED,
        reranked=False,
        extent=Extent.REQUESTED,
        learning=Learning.ALLOWED,
        status=Status.COMPLETED,
        trainable=False,
        untrainable_reason=IMPORTED,
        policy_digest="",
        reward_digest="",
        created_at=_said_at(item, now),
        candidates=candidates,
    )
    is_thumb = item.WhichOneof("verdict") == "thumb"
    value = THUMBS[item.thumb.thumb] if is_thumb else None
    return Import(reply, value, item.thumb.comment, item.source_id)
