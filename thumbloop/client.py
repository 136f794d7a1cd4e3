"""A typed client of the gRPC API. Needs neither torch nor vllm.

async with Client("127.0.0.1:50051") as client:
    reply = await client.generate("What did you think of the film?", user_id="ann")
    await client.rate(reply.response_id, up=True, user_id="ann")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from thumbloop.types import Message, Prompt, Role, Strategy
from thumbloop.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
)

DEFAULT_ADDRESS = "127.0.0.1:50051"

_ROLES = {
    Role.SYSTEM: policy_pb2.ROLE_SYSTEM,
    Role.USER: policy_pb2.ROLE_USER,
    Role.ASSISTANT: policy_pb2.ROLE_ASSISTANT,
}


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to answer; what is None or empty is left to the server."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    strategy: Strategy | None = None
    num_candidates: int | None = None
    policy_version: int | None = None
    is_excluded: bool = False
    include_candidates: bool = False


class Client:
    """One channel to a server. Calls raise grpc.aio.AioRpcError with the documented statuses."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._policy = policy_pb2_grpc.PolicyServiceStub(self._channel)
        self._feedback = feedback_pb2_grpc.FeedbackServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)

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
        self,
        prompt: str | Sequence[Message],
        *,
        is_text: bool = False,
        user_id: str = "",
        session_id: str = "",
        options: GenerateOptions = GenerateOptions(),
        timeout_s: float | None = None,
    ) -> policy_pb2.GenerateResponse:
        """Answer a conversation, or a plain string taken as a user's only turn.

        With `is_text` a string is a text to continue, as models without a chat template need it.
        """
        request = generate_request(_prompt_of(prompt, is_text=is_text), options)
        request.user_id, request.session_id = user_id, session_id
        return await self._policy.Generate(request, timeout=timeout_s)

    async def rate(
        self,
        response_id: str,
        *,
        up: bool,
        user_id: str = "",
        comment: str = "",
        request_id: str = "",
    ) -> feedback_pb2.SubmitFeedbackResponse:
        """Give a thumb; it is durable when this returns."""
        return await self._feedback.SubmitFeedback(
            feedback_pb2.SubmitFeedbackRequest(
                response_id=response_id,
                thumb=feedback_pb2.THUMB_UP if up else feedback_pb2.THUMB_DOWN,
                user_id=user_id,
                comment=comment,
                request_id=request_id,
            )
        )

    async def versions(self) -> admin_pb2.ListPolicyVersionsResponse:
        """Return the latest versions, newest first, and which one is current."""
        return await self._admin.ListPolicyVersions(
            admin_pb2.ListPolicyVersionsRequest(page_size=1000)
        )


def _prompt_of(prompt: str | Sequence[Message], *, is_text: bool) -> Prompt:
    if not isinstance(prompt, str):
        return Prompt(messages=tuple(prompt))
    return Prompt(text=prompt) if is_text else Prompt(messages=(Message(Role.USER, prompt),))


def generate_request(prompt: Prompt, options: GenerateOptions) -> policy_pb2.GenerateRequest:
    """Return the wire message of a prompt."""
    turns = [
        policy_pb2.ChatMessage(role=_ROLES[m.role], content=m.content) for m in prompt.messages
    ]
    request = policy_pb2.GenerateRequest(
        sampling=policy_pb2.SamplingParams(
            max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed
        ),
        guidance=policy_pb2.GuidanceParams(num_candidates=options.num_candidates),
        policy_version=options.policy_version,
        include_candidates=options.include_candidates,
    )
    if prompt.text is None:
        request.chat.messages.extend(turns)
    else:
        request.text = prompt.text
    if options.strategy is not None:
        name = f"GUIDANCE_STRATEGY_{options.strategy.name}"
        request.guidance.strategy = policy_pb2.GuidanceStrategy.Value(name)
    if options.is_excluded:
        request.learning = policy_pb2.LEARNING_EXCLUDED
    return request
