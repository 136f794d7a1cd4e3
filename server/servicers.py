"""The gRPC services: protocol buffers in, types through, protocol buffers out. Nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from server.access import CALLER
from server.answers import (
    erasure_of,
    event_of,
    feedback_of,
    imports_of,
    measures_of,
    preference_of,
    response_of,
    version_of,
)
from server.delivery import Move
from server.erasures import Erasures
from server.hotswap import Swapper
from server.imports import Imports
from server.moves import promotion_of, rollback_of
from server.origins import influence_of, lineage_of
from server.ratings import Ratings
from server.reception import Answering
from server.routes import Routes
from server.stored import ask
from server.translation import check_policy
from server.users import user_to_trace
from thumbloop.errors import EngineUnavailable, InvalidRequest, UnknownPolicyVersion
from thumbloop.store import deployments, versions
from thumbloop.types import Interaction, PolicyVersion, VersionState
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
_LONGEST_NUMBER = 19  # digits of an int64


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Replies."""

    def __init__(self, reception: Answering) -> None:
        self._reception = reception

    async def Generate(
        self, request: policy_pb2.GenerateRequest, context: Context
    ) -> policy_pb2.GenerateResponse:
        """Answer a prompt."""
        interaction = await self._reception.respond(
            request, CALLER.get(), time_left_s=context.time_remaining()
        )
        return response_of(interaction, include_candidates=request.include_candidates)

    async def StreamGenerate(  # type: ignore[override]  # gRPC takes coroutines that write, too
        self, request: policy_pb2.StreamGenerateRequest, context: Context
    ) -> None:
        """Answer a prompt as a stream: text as it is certain, at the end what Generate returns."""
        wanted = request.request
        reader = _Reader(context, has_candidates=wanted.include_candidates)
        await self._reception.tell(
            wanted, CALLER.get(), reader, time_left_s=context.time_remaining()
        )


class _Reader:
    """The other end of a stream; see Reader."""

    def __init__(self, context: Context, *, has_candidates: bool) -> None:
        self._context = context
        self._has_candidates = has_candidates

    async def begin(self, _response_id: str) -> None:
        # Before any write: one that takes it along and is stuck could not be ended by an error.
        await self._context.send_initial_metadata(())

    async def write(self, text: str) -> None:
        await self._context.write(policy_pb2.StreamGenerateResponse(text_delta=text))

    async def end(self, reply: Interaction) -> None:
        response = response_of(reply, include_candidates=self._has_candidates)
        await self._context.write(policy_pb2.StreamGenerateResponse(response=response))


class FeedbackServicer(feedback_pb2_grpc.FeedbackServiceServicer):
    """Thumbs and preferences, and users who are to be forgotten."""

    def __init__(self, ratings: Ratings, erasures: Erasures) -> None:
        self._ratings = ratings
        self._erasures = erasures

    async def SubmitFeedback(
        self, request: feedback_pb2.SubmitFeedbackRequest, context: Context
    ) -> feedback_pb2.SubmitFeedbackResponse:
        """Store a thumb; it is durable when this returns."""
        return feedback_of(await self._ratings.rate(request, CALLER.get()))

    async def SubmitPreference(
        self, request: feedback_pb2.SubmitPreferenceRequest, context: Context
    ) -> feedback_pb2.SubmitPreferenceResponse:
        """Store a preference; it is durable when this returns."""
        return preference_of(await self._ratings.compare(request, CALLER.get()))

    async def DeleteUserData(
        self, request: feedback_pb2.DeleteUserDataRequest, context: Context
    ) -> feedback_pb2.DeleteUserDataResponse:
        """Forget a user; what was stored is gone, durably, when this returns."""
        done = await self._erasures.forget(request, CALLER.get())
        return erasure_of(done.erasure, done.at)


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Versions, and feedback from before."""

    def __init__(self, database: Database, routes: Routes, folder: Path, imports: Imports) -> None:
        self._database = database
        self._routes = routes
        self._folder = folder
        self._imports = imports
        self._swapper: Swapper | None = None

    def serve(self, swapper: Swapper) -> None:
        """Let operators move the pointer."""
        self._swapper = swapper

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
        """Return one version, what became of it and where it comes from, and what a trial of it says."""
        listing = await self._list(check_policy(request.policy))
        has_number = request.HasField("policy_version")
        number = request.policy_version if has_number else listing.current
        for version in listing.newest_first:
            if version.version == number:
                events, lineage = await self._history(listing.newest_first, version)
                return admin_pb2.GetPolicyVersionResponse(
                    policy_version=self._shown(version),
                    events=events,
                    trial=self._trial(version),
                    lineage=lineage,
                )
        raise UnknownPolicyVersion(f"there is no version {number}")

    async def _history(
        self, known: Sequence[PolicyVersion], version: PolicyVersion
    ) -> "tuple[list[admin_pb2.PolicyVersionEvent], admin_pb2.Lineage]":
        def read(
            connection: Connection,
        ) -> tuple[list[admin_pb2.PolicyVersionEvent], admin_pb2.Lineage]:
            rows = deployments.list_events(connection, version.policy, version.version)
            lineage = lineage_of(connection, known, version, self._folder)
            return [event_of(row) for row in rows], lineage

        return await ask(self._database, read)

    async def GetUserLineage(
        self, request: admin_pb2.GetUserLineageRequest, context: Context
    ) -> admin_pb2.GetUserLineageResponse:
        """Return which versions learned from a user."""
        policy, user = check_policy(request.policy), user_to_trace(request, CALLER.get())
        return await ask(self._database, lambda connection: influence_of(connection, policy, user))

    def _trial(self, version: PolicyVersion) -> list[admin_pb2.TrialMeasure]:
        look = self._swapper.latest_look if self._swapper else None
        is_on_trial = version.state is VersionState.CANARY
        if look is None or look.version != version.version or not is_on_trial:
            return []
        return measures_of({name: found.plain() for name, found in look.evidence.items()})

    async def PromotePolicyVersion(
        self, request: admin_pb2.PromotePolicyVersionRequest, context: Context
    ) -> admin_pb2.PromotePolicyVersionResponse:
        """Make a version current; new requests go to it when this returns."""
        moved = await self._move(promotion_of(request, CALLER.get().subject))
        return admin_pb2.PromotePolicyVersionResponse(policy_version=moved)

    async def RollbackPolicyVersion(
        self, request: admin_pb2.RollbackPolicyVersionRequest, context: Context
    ) -> admin_pb2.RollbackPolicyVersionResponse:
        """Go back to an earlier version; new requests go to it when this returns."""
        moved = await self._move(rollback_of(request, CALLER.get().subject))
        return admin_pb2.RollbackPolicyVersionResponse(policy_version=moved)

    async def ImportFeedback(
        self, request: admin_pb2.ImportFeedbackRequest, context: Context
    ) -> admin_pb2.ImportFeedbackResponse:
        """Store feedback from before; what was taken is durable when this returns."""
        return imports_of(await self._imports.take(request, CALLER.get()))

    async def _move(self, move: Move) -> admin_pb2.PolicyVersion:
        if self._swapper is None:
            raise EngineUnavailable("the server is starting; try again in a moment")
        return self._shown(await self._swapper.move(move))

    async def _list(self, policy: str) -> "_Listing":
        def read(connection: Connection) -> _Listing:
            rows = versions.list_versions(connection, policy)
            return _Listing(rows[::-1], versions.current(connection, policy).version)

        return await ask(self._database, read)

    def _shown(self, version: PolicyVersion) -> admin_pb2.PolicyVersion:
        return version_of(version, is_available=version.version in self._routes.loaded)


class _Listing(NamedTuple):
    newest_first: list[PolicyVersion]
    current: int


def _page_start(token: str) -> int | None:
    if token and not (token.isdecimal() and len(token) <= _LONGEST_NUMBER):
        raise InvalidRequest.of("page_token", "is not one that this call returned")
    return int(token) if token else None
