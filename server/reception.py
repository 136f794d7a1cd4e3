"""Where every call for a reply comes in, whichever wire it came by, and what it has to pass."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

from server.access import Caller
from server.admission import Admission, Cost, Quota
from server.concurrency import under_way, within
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.pipeline import Pipeline, Request
from server.repeats import Repeats, digest_of
from server.speech import Speech
from server.translation import Defaults, request_of
from thumbloop import logs
from thumbloop.types import Interaction, User
from thumbloop.v1 import policy_pb2


class Reader(Protocol):
    """Whoever reads a reply while it is made; each method returns when there is room for more."""

    async def begin(self, response_id: str) -> None:
        """Hear that there will be text, and what the reply is called."""

    async def write(self, text: str) -> None:
        """Take more of the text."""

    async def end(self, reply: Interaction) -> None:
        """Take the whole reply."""


class Answering(Protocol):
    """Whoever answers requests: a reception, or one that is watched."""

    async def respond(
        self,
        message: policy_pb2.GenerateRequest,
        caller: Caller,
        *,
        time_left_s: float | None = None,
    ) -> Interaction:
        """Return the reply; see Reception."""

    async def tell(
        self,
        message: policy_pb2.GenerateRequest,
        caller: Caller,
        reader: Reader,
        *,
        time_left_s: float | None = None,
    ) -> None:
        """Let somebody read the reply as it grows; see Reception."""


class Reception:
    """Checks a request, then answers it once, in its turn and in time."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        defaults: Defaults,
        admission: Admission,
        quota: Quota,
        repeats: Repeats,
        metrics: ServerMetrics,
    ) -> None:
        self._lifecycle = lifecycle
        self._defaults = defaults
        self._admission = admission
        self._quota = quota
        self._repeats = repeats
        self._metrics = metrics

    async def respond(
        self,
        message: policy_pb2.GenerateRequest,
        caller: Caller,
        *,
        time_left_s: float | None = None,
    ) -> Interaction:
        """Return the reply; `time_left_s` is the caller's own deadline.

        Raises PermissionDenied, InvalidRequest, UnknownPolicy, Draining, EngineUnavailable,
        Overloaded, RequestIdTaken, DeadlineExceeded, and what Pipeline.respond raises.
        """
        async with self._inside(message, caller, time_left_s) as (request, pipeline):
            reply = await self._once(message, request, pipeline, None)
        logs.note(response_id=reply.response_id)
        return reply

    async def tell(
        self,
        message: policy_pb2.GenerateRequest,
        caller: Caller,
        reader: Reader,
        *,
        time_left_s: float | None = None,
    ) -> None:
        """Let somebody read the reply as it grows. The call lasts until all is read, and no longer than
        any other.

        Raises what `respond` raises, and ReaderTooSlow.
        """
        speech = Speech(self._defaults.limits.max_unread_characters)
        async with self._inside(message, caller, time_left_s) as (request, pipeline):
            async with under_way(self._once(message, request, pipeline, speech)) as made:
                await speech.first(made)
                logs.note(response_id=speech.response_id)
                await reader.begin(speech.response_id)
                reply = await speech.deliver(made, reader.write)
            await reader.end(reply)

    @asynccontextmanager
    async def _inside(
        self, message: policy_pb2.GenerateRequest, caller: Caller, time_left_s: float | None
    ) -> AsyncIterator[tuple[Request, Pipeline]]:
        """Let a call in, understood, for as long as it may take."""
        limits = self._defaults.limits
        given_s = limits.default_timeout_s if time_left_s is None else time_left_s
        limit_s = min(given_s, limits.max_timeout_s)
        # The caller's own deadline is kept by gRPC, which cancels this: two would race.
        ours_s = None if limit_s == time_left_s else limit_s
        user = caller.user(message.user_id)
        request = request_of(message, self._defaults, user, time_left_s=limit_s)
        if request.request_id:
            logs.note(request_id=request.request_id)
        with self._lifecycle.admit() as pipeline:
            async with within(ours_s, "there was no reply"):
                yield request, pipeline

    async def _once(
        self,
        message: policy_pb2.GenerateRequest,
        request: Request,
        pipeline: Pipeline,
        speech: Speech | None,
    ) -> Interaction:
        if not request.request_id:
            return await self._answer(request, pipeline, speech)
        digest = digest_of(message)
        answer = partial(self._answer, replace(request, request_digest=digest), pipeline, speech)
        reply = await self._repeats.once(
            request.user, request.request_id, digest, answer, partial(self._repeat, request.user)
        )
        if speech is not None:
            speech.begin(reply.response_id)  # of a reply that was made before
            speech.say(reply.chosen.text)
        return reply

    def _repeat(self, user: User) -> None:
        """Count a call that is answered with a reply made before: it counts as one candidate."""
        self._quota.use(user, 1)

    async def _answer(
        self, request: Request, pipeline: Pipeline, speech: Speech | None
    ) -> Interaction:
        candidates = request.choice.num_candidates
        is_background = request.is_background
        self._quota.check(request.user, candidates)
        self._admission.check(Cost(candidates, 0), is_background=is_background)  # before any work
        prompt = pipeline.render(request)
        cost = Cost(candidates, len(prompt) + candidates * request.sampling.max_tokens)
        self._admission.check(cost, is_background=is_background)
        self._quota.use(request.user, candidates)  # as nothing refuses it any more
        try:
            async with self._admission.enter(cost, is_background=is_background):
                reply = await pipeline.respond(request.after_its_wait(), prompt, speech)
        finally:
            if speech is not None and speech.first_text_s:
                self._metrics.observe_first_text(request.guidance.name, speech.first_text_s)
        self._metrics.observe_reply(reply)
        return reply
