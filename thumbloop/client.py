"""Typed clients of the gRPC API, async and sync. Need neither torch nor vllm.

async with AsyncClient("127.0.0.1:50051") as client:
    reply = await client.generate("What did you think of the film?", user_id="ann")
    await client.rate(reply.response_id, up=True, user_id="ann")

with Client("127.0.0.1:50051") as client:
    for text in client.stream("And the food?"):
        print(text, end="")

Calls raise the errors of thumbloop.errors, whose cause is gRPC's own. Where a server is UNAVAILABLE a
call is tried again, by gRPC itself, and whatever else fails is not. Calls for replies and thumbs carry a
request id, the caller's or a new one, so that what is tried again is answered, and counts, once.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar, Unpack

import grpc

from thumbloop.messages import (
    CallOptions,
    GenerateOptions,
    PreferOptions,
    RateOptions,
    call_message,
    erasure_message,
    preference_message,
    promotion_message,
    rollback_message,
    thumb_message,
)
from thumbloop.statuses import error_of
from thumbloop.streams import AsyncReplyStream, ReplyStream
from thumbloop.types import Message
from thumbloop.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
)

__all__ = ["AsyncClient", "Client", "GenerateOptions", "Tls"]

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 150.0

T = TypeVar("T")

_RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "3s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS = [("grpc.service_config", json.dumps(_RETRIES))]
_PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Tls:
    """How to reach a server with TLS; PEM.

    Without authorities the public ones are trusted: those that gRPC brings along, or those in the file
    that GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names.
    """

    authorities: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return them as gRPC takes them."""
        return grpc.ssl_channel_credentials(self.authorities, self.key, self.certificate)


class _Connection:
    """What both clients are made of: a channel, its stubs, and what goes along with every call."""

    _transport: ClassVar[Any]
    """grpc or grpc.aio: the kind of channel, and with it what its stubs return."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str = "",
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._channel = (
            self._transport.insecure_channel(address, options=_OPTIONS)
            if tls is None
            else self._transport.secure_channel(address, tls.credentials(), options=_OPTIONS)
        )
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout_s = timeout_s
        self._policy: Any = policy_pb2_grpc.PolicyServiceStub(self._channel)
        self._feedback: Any = feedback_pb2_grpc.FeedbackServiceStub(self._channel)
        self._admin: Any = admin_pb2_grpc.AdminServiceStub(self._channel)

    def _stream(self, prompt: str | Sequence[Message], how: CallOptions) -> Any:
        """Begin a streamed call."""
        return self._policy.StreamGenerate(
            policy_pb2.StreamGenerateRequest(request=call_message(prompt, how)),
            timeout=how.get("timeout_s") or self._timeout_s,
            metadata=self._metadata,
        )


class AsyncClient(_Connection):
    """One channel to a server, for asyncio."""

    _transport: ClassVar[Any] = grpc.aio
    _policy: "policy_pb2_grpc.PolicyServiceAsyncStub"
    _feedback: "feedback_pb2_grpc.FeedbackServiceAsyncStub"
    _admin: "admin_pb2_grpc.AdminServiceAsyncStub"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def generate(
        self, prompt: str | Sequence[Message], **how: Unpack[CallOptions]
    ) -> policy_pb2.GenerateResponse:
        """Answer a conversation, or a plain string taken as a user's only turn."""
        return await self._call(
            self._policy.Generate, call_message(prompt, how), how.get("timeout_s")
        )

    def stream(
        self, prompt: str | Sequence[Message], **how: Unpack[CallOptions]
    ) -> AsyncReplyStream:
        """Answer as `generate` does, in pieces of text to iterate over; then `reply` is there."""
        return AsyncReplyStream(self._stream(prompt, how))

    async def rate(
        self, response_id: str, *, up: bool, **how: Unpack[RateOptions]
    ) -> feedback_pb2.SubmitFeedbackResponse:
        """Give a thumb; it is durable when this returns."""
        return await self._call(
            self._feedback.SubmitFeedback, thumb_message(response_id, up, how), how.get("timeout_s")
        )

    async def prefer(
        self, response_id: str, *, better: int, worse: int, **how: Unpack[PreferOptions]
    ) -> feedback_pb2.SubmitPreferenceResponse:
        """Say that one candidate of a reply was better than another; durable when this returns.

        Candidates are named by their place in the reply's `candidates`, which have to be asked for.
        """
        message = preference_message(response_id, better, worse, how)
        return await self._call(self._feedback.SubmitPreference, message, how.get("timeout_s"))

    async def forget(
        self, user_id: str, *, subject: str | None = None
    ) -> feedback_pb2.DeleteUserDataResponse:
        """Erase a user's prompts, replies and feedback; durable when this returns, and done again it finds nothing.

        The user is one of the caller's own subject, or with the scope admin of another. An empty `user_id` is
        whoever the subject itself is.
        """
        message = erasure_message(user_id, subject)
        return await self._call(self._feedback.DeleteUserData, message, None)

    async def versions(self) -> admin_pb2.ListPolicyVersionsResponse:
        """Return the latest versions, newest first, and which one is current."""
        request = admin_pb2.ListPolicyVersionsRequest(page_size=_PAGE_SIZE)
        return await self._call(self._admin.ListPolicyVersions, request, None)

    async def version(self, number: int | None = None) -> admin_pb2.GetPolicyVersionResponse:
        """Return one version, what became of it and where it comes from; without a number the current one."""
        request = admin_pb2.GetPolicyVersionRequest(policy_version=number)
        return await self._call(self._admin.GetPolicyVersion, request, None)

    async def trace(
        self, user_id: str, *, subject: str | None = None
    ) -> admin_pb2.GetUserLineageResponse:
        """Return which versions learned from a user; of the caller's own subject, or of another."""
        request = admin_pb2.GetUserLineageRequest(user_id=user_id, subject=subject)
        return await self._call(self._admin.GetUserLineage, request, None)

    async def promote(
        self, version: int, *, expected_current: int, reason: str = ""
    ) -> admin_pb2.PolicyVersion:
        """Make a version current in the place of the expected one; return it.

        Raises VersionConflict: another is current. PolicyVersionUnavailable: it was rejected.
        """
        request = promotion_message(version, expected_current, reason)
        return (await self._call(self._admin.PromotePolicyVersion, request, None)).policy_version

    async def roll_back(
        self, version: int | None = None, *, expected_current: int, reason: str = ""
    ) -> admin_pb2.PolicyVersion:
        """Take the expected current version back; return the one that is current now.

        Without a version that is the nearest ancestor that was not taken back itself. Raises
        VersionConflict: another is current. PolicyVersionUnavailable: it cannot be gone back to.
        """
        request = rollback_message(version, expected_current, reason)
        return (await self._call(self._admin.RollbackPolicyVersion, request, None)).policy_version

    async def import_feedback(
        self, items: Sequence[admin_pb2.ImportedFeedback], *, subject: str | None = None
    ) -> admin_pb2.ImportFeedbackResponse:
        """Bring in feedback from before, at most 256 items; what was taken is durable when this returns.

        The users are of the caller's own subject, or of another.
        """
        request = admin_pb2.ImportFeedbackRequest(items=items, subject=subject)
        return await self._call(self._admin.ImportFeedback, request, None)

    async def _call(
        self, method: Callable[..., Awaitable[T]], request: object, timeout_s: float | None
    ) -> T:
        try:
            return await method(
                request, timeout=timeout_s or self._timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as failed:
            raise error_of(failed) from failed


class Client(_Connection):
    """One channel to a server, for code without asyncio; may be shared by threads."""

    _transport: ClassVar[Any] = grpc
    _policy: "policy_pb2_grpc.PolicyServiceStub"
    _feedback: "feedback_pb2_grpc.FeedbackServiceStub"
    _admin: "admin_pb2_grpc.AdminServiceStub"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def generate(
        self, prompt: str | Sequence[Message], **how: Unpack[CallOptions]
    ) -> policy_pb2.GenerateResponse:
        """Answer; see AsyncClient."""
        return self._call(self._policy.Generate, call_message(prompt, how), how.get("timeout_s"))

    def stream(self, prompt: str | Sequence[Message], **how: Unpack[CallOptions]) -> ReplyStream:
        """Answer in pieces; see AsyncClient."""
        return ReplyStream(self._stream(prompt, how))

    def rate(
        self, response_id: str, *, up: bool, **how: Unpack[RateOptions]
    ) -> feedback_pb2.SubmitFeedbackResponse:
        """Give a thumb; see AsyncClient."""
        return self._call(
            self._feedback.SubmitFeedback, thumb_message(response_id, up, how), how.get("timeout_s")
        )

    def prefer(
        self, response_id: str, *, better: int, worse: int, **how: Unpack[PreferOptions]
    ) -> feedback_pb2.SubmitPreferenceResponse:
        """Compare two candidates; see AsyncClient."""
        message = preference_message(response_id, better, worse, how)
        return self._call(self._feedback.SubmitPreference, message, how.get("timeout_s"))

    def forget(
        self, user_id: str, *, subject: str | None = None
    ) -> feedback_pb2.DeleteUserDataResponse:
        """Erase what is stored of a user; see AsyncClient."""
        return self._call(self._feedback.DeleteUserData, erasure_message(user_id, subject), None)

    def versions(self) -> admin_pb2.ListPolicyVersionsResponse:
        """Return the latest versions; see AsyncClient."""
        request = admin_pb2.ListPolicyVersionsRequest(page_size=_PAGE_SIZE)
        return self._call(self._admin.ListPolicyVersions, request, None)

    def version(self, number: int | None = None) -> admin_pb2.GetPolicyVersionResponse:
        """Return one version; see AsyncClient."""
        request = admin_pb2.GetPolicyVersionRequest(policy_version=number)
        return self._call(self._admin.GetPolicyVersion, request, None)

    def trace(
        self, user_id: str, *, subject: str | None = None
    ) -> admin_pb2.GetUserLineageResponse:
        """Return which versions learned from a user; see AsyncClient."""
        request = admin_pb2.GetUserLineageRequest(user_id=user_id, subject=subject)
        return self._call(self._admin.GetUserLineage, request, None)

    def promote(
        self, version: int, *, expected_current: int, reason: str = ""
    ) -> admin_pb2.PolicyVersion:
        """Make a version current; see AsyncClient."""
        request = promotion_message(version, expected_current, reason)
        return self._call(self._admin.PromotePolicyVersion, request, None).policy_version

    def roll_back(
        self, version: int | None = None, *, expected_current: int, reason: str = ""
    ) -> admin_pb2.PolicyVersion:
        """Take the current version back; see AsyncClient."""
        request = rollback_message(version, expected_current, reason)
        return self._call(self._admin.RollbackPolicyVersion, request, None).policy_version

    def import_feedback(
        self, items: Sequence[admin_pb2.ImportedFeedback], *, subject: str | None = None
    ) -> admin_pb2.ImportFeedbackResponse:
        """Bring in feedback from before; see AsyncClient."""
        request = admin_pb2.ImportFeedbackRequest(items=items, subject=subject)
        return self._call(self._admin.ImportFeedback, request, None)

    def _call(self, method: Callable[..., T], request: object, timeout_s: float | None) -> T:
        try:
            return method(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as failed:
            raise error_of(failed) from failed
