"""The gRPC services: protocol buffers in, types through, protocol buffers out. Nothing else."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, NoReturn

import grpc
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from server.answers import response_of, version_of
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.routes import Routes
from server.translation import Defaults, check_policy, request_of, thumb_of
from thumbloop.errors import InvalidRequest, UnknownPolicyVersion
from thumbloop.store import GroupWriter, feedback, reading, versions
from thumbloop.types import Feedback, PolicyVersion
from thumbloop.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
)

Context = grpc.aio.ServicerContext[Any, Any]

_PAGE_SIZE, _MAX_PAGE_SIZE = 100, 1000


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Replies."""

    def __init__(self, lifecycle: Lifecycle, defaults: Defaults, metrics: ServerMetrics) -> None:
        self._lifecycle = lifecycle
        self._defaults = defaults
        self._metrics = metrics

    async def Generate(
        self, request: policy_pb2.GenerateRequest, context: Context
    ) -> policy_pb2.GenerateResponse:
        """Answer a prompt."""
        left = context.time_remaining()
        wanted = request_of(request, self._defaults, time_left_s=left)
        with self._lifecycle.admit() as pipeline:
            interaction = await pipeline.respond(wanted)
        self._metrics.observe_reply(interaction)
        return response_of(interaction, include_candidates=request.include_candidates)

    async def StreamGenerate(
        self, request: policy_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[policy_pb2.StreamGenerateResponse]:
        """Answer a prompt as a stream; in a later release."""
        await _not_yet(context)
        yield  # makes this a generator, as the stub expects


class FeedbackServicer(feedback_pb2_grpc.FeedbackServiceServicer):
    """Thumbs."""

    def __init__(self, writer: GroupWriter, metrics: ServerMetrics) -> None:
        self._writer = writer
        self._metrics = metrics

    async def SubmitFeedback(
        self, request: feedback_pb2.SubmitFeedbackRequest, context: Context
    ) -> feedback_pb2.SubmitFeedbackResponse:
        """Store a thumb; it is durable when this returns."""
        thumb, now = thumb_of(request), time.time()

        def change(connection: Connection) -> Feedback:
            return feedback.submit_thumb(
                connection,
                thumb.response_id,
                thumb.value,
                thumb.user,
                comment=thumb.comment,
                request_id=thumb.request_id,
                at=now,
            )

        stored = await self._writer.run(change)
        self._metrics.observe_feedback(stored)
        return feedback_pb2.SubmitFeedbackResponse(
            feedback_id=stored.feedback_id,
            policy_version=stored.policy_version,
            duplicate=stored.duplicate,
        )

    async def SubmitPreference(
        self, request: feedback_pb2.SubmitPreferenceRequest, context: Context
    ) -> feedback_pb2.SubmitPreferenceResponse:
        """Store a preference; in a later release."""
        await _not_yet(context)

    async def DeleteUserData(
        self, request: feedback_pb2.DeleteUserDataRequest, context: Context
    ) -> feedback_pb2.DeleteUserDataResponse:
        """Forget a user; in a later release."""
        await _not_yet(context)


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Versions."""

    def __init__(self, database: Database, routes: Routes) -> None:
        self._database = database
        self._routes = routes

    async def ListPolicyVersions(
        self, request: admin_pb2.ListPolicyVersionsRequest, context: Context
    ) -> admin_pb2.ListPolicyVersionsResponse:
        """Return a page of versions, newest first."""
        listing = await self._list(check_policy(request.policy))
        size = request.page_size if request.HasField("page_size") else _PAGE_SIZE
        if not 1 <= size <= _MAX_PAGE_SIZE:
            raise InvalidRequest.of("page_size", f"has to be in [1, {_MAX_PAGE_SIZE}]")
        below = _page_start(request.page_token)
        rest = [v for v in listing.newest_first if below is None or v.version < below]
        page = rest[:size]
        return admin_pb2.ListPolicyVersionsResponse(
            policy_versions=[self._shown(v) for v in page],
            next_page_token=str(page[-1].version) if len(rest) > size else "",
            current_version=listing.current,
        )

    async def GetPolicyVersion(
        self, request: admin_pb2.GetPolicyVersionRequest, context: Context
    ) -> admin_pb2.GetPolicyVersionResponse:
        """Return one version."""
        listing = await self._list(check_policy(request.policy))
        has_number = request.HasField("policy_version")
        number = request.policy_version if has_number else listing.current
        for version in listing.newest_first:
            if version.version == number:
                return admin_pb2.GetPolicyVersionResponse(policy_version=self._shown(version))
        raise UnknownPolicyVersion(f"there is no version {number}")

    async def PromotePolicyVersion(
        self, request: admin_pb2.PromotePolicyVersionRequest, context: Context
    ) -> admin_pb2.PromotePolicyVersionResponse:
        """Make a version current; in a later release."""
        await _not_yet(context)

    async def RollbackPolicyVersion(
        self, request: admin_pb2.RollbackPolicyVersionRequest, context: Context
    ) -> admin_pb2.RollbackPolicyVersionResponse:
        """Go back to an earlier version; in a later release."""
        await _not_yet(context)

    async def _list(self, policy: str) -> "_Listing":
        def read() -> _Listing:
            with reading(self._database) as connection:
                rows = versions.list_versions(connection, policy)
                return _Listing(rows[::-1], versions.current(connection, policy).version)

        return await asyncio.to_thread(read)

    def _shown(self, version: PolicyVersion) -> admin_pb2.PolicyVersion:
        return version_of(version, is_available=version.version in self._routes.loaded)


class _Listing(NamedTuple):
    newest_first: list[PolicyVersion]
    current: int


def _page_start(token: str) -> int | None:
    if token and not token.isdecimal():
        raise InvalidRequest.of("page_token", "is not one that this call returned")
    return int(token) if token else None


async def _not_yet(context: Context) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not served by this release")
    raise AssertionError("abort raises")
