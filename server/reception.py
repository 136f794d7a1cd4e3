"""Where every call for a reply comes in, whichever wire it came by, and what it has to pass."""

import asyncio
from dataclasses import replace
from functools import partial

from server.access import Caller
from server.admission import Admission, Cost, Quota
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.pipeline import Pipeline, Request
from server.repeats import Repeats, digest_of
from server.speech import Speech
from server.translation import Defaults, request_of
from thumbloop.errors import DeadlineExceeded
from thumbloop.types import Interaction
from thumbloop.v1 import policy_pb2


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

    def speech(self) -> Speech:
        """Return what the reader of a stream listens to."""
        return Speech(self._defaults.limits.max_unread_characters)

    async def respond(
        self,
        message: policy_pb2.GenerateRequest,
        caller: Caller,
        *,
        time_left_s: float | None = None,
        speech: Speech | None = None,
    ) -> Interaction:
        """Return the reply; `time_left_s` is the caller's own deadline.

        Raises PermissionDenied, InvalidRequest, UnknownPolicy, Draining, EngineUnavailable,
        Overloaded, RequestIdTaken, DeadlineExceeded, and what Pipeline.respond raises.
        """
        limits = self._defaults.limits
        given_s = limits.default_timeout_s if time_left_s is None else time_left_s
        limit_s = min(given_s, limits.max_timeout_s)
        # The caller's own deadline is kept by gRPC, which cancels this: two would race.
        ours_s = None if limit_s == time_left_s else limit_s
        user = caller.user(message.user_id)
        request = request_of(message, self._defaults, user, time_left_s=limit_s)
        with self._lifecycle.admit() as pipeline:
            try:
                async with asyncio.timeout(ours_s) as scope:
                    return await self._once(message, request, pipeline, speech)
            except TimeoutError:
                if not scope.expired():
                    raise
                raise DeadlineExceeded(f"there was no reply within {limit_s:.3g} s") from None

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
        reply = await self._repeats.once(request.user, request.request_id, digest, answer)
        if speech is not None:
            speech.begin(reply.response_id)  # of a reply that was made before
            speech.say(reply.chosen.text)
        return reply

    async def _answer(
        self, request: Request, pipeline: Pipeline, speech: Speech | None
    ) -> Interaction:
        candidates = request.choice.num_candidates
        self._quota.use(request.user, candidates)
        self._admission.check(Cost(candidates, 0))  # before any work is done for it
        prompt = pipeline.render(request)
        cost = Cost(candidates, len(prompt) + candidates * request.sampling.max_tokens)
        async with self._admission.enter(cost, is_background=request.is_background):
            reply = await pipeline.respond(request.after_its_wait(), prompt, speech)
        self._metrics.observe_reply(reply)
        if speech is not None and speech.first_text_s:
            self._metrics.observe_first_text(reply.strategy, speech.first_text_s)
        return reply
