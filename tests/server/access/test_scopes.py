"""Who may call what, over both wires: a scope for each call, and a token that has it."""

import hashlib
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.access import ANYBODY, ROUTES, SCOPES, Doorkeeper
from tests.access import (
    GENERATE,
    REFUSALS,
    ROUTE_NAMES,
    RPCS,
    bearer,
    code_of,
    secret_of,
    status_of,
    tokens,
    web,
)
from tests.refusals import refused
from tests.serving import Running
from thumbloop.client import AsyncClient
from thumbloop.config.server import Access
from thumbloop.errors import PermissionDenied, Unauthenticated
from thumbloop.types import Scope, User
from thumbloop.v1 import policy_pb2

NEEDED = {
    "PolicyService/Generate": "generate",
    "PolicyService/StreamGenerate": "generate",
    "FeedbackService/SubmitFeedback": "feedback",
    "FeedbackService/SubmitPreference": "feedback",
    "FeedbackService/DeleteUserData": None,
    "AdminService/ListPolicyVersions": "admin",
    "AdminService/GetPolicyVersion": "admin",
    "AdminService/GetUserLineage": "admin",
    "AdminService/PromotePolicyVersion": "admin",
    "AdminService/RollbackPolicyVersion": "admin",
    "AdminService/ImportFeedback": "admin",
    "GET /v1/models": "generate",
    "POST /v1/completions": "generate",
    "POST /v1/chat/completions": "generate",
    "POST /v1/feedback": "feedback",
}
"""The scope that each call needs, None: any token. Written down once more, so that a change there is seen here."""


def test_every_rpc_has_a_scope():
    assert len(RPCS) >= 9
    assert set(SCOPES) == set(RPCS)
    ours = {path.removeprefix("/thumbloop.v1."): scope for path, scope in SCOPES.items()}
    assert ours == {name: scope for name, scope in NEEDED.items() if "/v1/" not in name}


def test_every_route_has_a_scope():
    assert sorted(ROUTES) == sorted(ROUTE_NAMES)
    ours = {route: scope.value for route, scope in ROUTES.items()}
    assert ours == {name: scope for name, scope in NEEDED.items() if "/v1/" in name}


@pytest.mark.parametrize("path", RPCS)
async def test_only_the_needed_scope_opens_an_rpc(guarded: Running, path: str):
    needed = NEEDED[path.removeprefix("/thumbloop.v1.")]
    codes = {scope.value: await code_of(guarded, path, bearer(scope.value)) for scope in Scope}
    if needed is None:
        assert set(codes.values()).isdisjoint(REFUSALS)
    else:
        assert codes.pop(needed) not in REFUSALS
        assert set(codes.values()) == {grpc.StatusCode.PERMISSION_DENIED}
    assert await code_of(guarded, path, None) is grpc.StatusCode.UNAUTHENTICATED
    assert await code_of(guarded, path, bearer("nobody")) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("route", ROUTE_NAMES)
async def test_only_the_needed_scope_opens_a_route(guarded: Running, route: str):
    statuses = {
        scope.value: await status_of(guarded, route, bearer(scope.value)) for scope in Scope
    }
    assert statuses.pop(NEEDED[route]) == (200 if route.startswith("GET") else 400)
    assert set(statuses.values()) == {403}
    assert await status_of(guarded, route, None) == 401
    assert await status_of(guarded, route, bearer("nobody")) == 401


async def test_feedback_that_is_turned_away_at_the_door_is_counted(guarded: Running):
    service = "/thumbloop.v1.FeedbackService"
    for subject in ("generate", "nobody"):
        await code_of(guarded, f"{service}/SubmitFeedback", bearer(subject))
        await code_of(guarded, f"{service}/SubmitPreference", bearer(subject))
        await status_of(guarded, "POST /v1/feedback", bearer(subject))
        await code_of(guarded, "/thumbloop.v1.AdminService/ImportFeedback", bearer(subject))
    registry, name = guarded.application._metrics.registry, "thumbloop_feedback_rejected_total"
    for kind, count in (("thumb", 2), ("preference", 1)):
        for reason in ("permission_denied", "unauthenticated"):
            assert registry.get_sample_value(name, {"kind": kind, "reason": reason}) == count


DIGEST = hashlib.sha256(secret_of("generate").encode()).hexdigest()


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        secret_of("generate"),
        f"Basic {secret_of('generate')}",
        f"Token {secret_of('generate')}",
        f"Bearer{secret_of('generate')}",
        f"Bearer {secret_of('generate')}x",
        f"Bearer {secret_of('generate')[:-1]}",
        f"Bearer {secret_of('generate')} {secret_of('generate')}",
        f"Bearer {secret_of('generate').upper()}",
        f"Bearer {DIGEST}",
    ],
)
async def test_a_header_that_is_no_known_token_is_refused_on_both_wires(
    guarded: Running, header: str
):
    assert await code_of(guarded, GENERATE, header) is grpc.StatusCode.UNAUTHENTICATED
    assert await status_of(guarded, "GET /v1/models", header) == 401


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
async def test_the_scheme_may_be_written_in_any_case(guarded: Running, scheme: str):
    header = scheme + secret_of("generate")
    assert await code_of(guarded, GENERATE, header) is grpc.StatusCode.INVALID_ARGUMENT
    assert await status_of(guarded, "GET /v1/models", header) == 200


async def test_a_second_header_is_refused_on_both_wires_whichever_is_known(guarded: Running):
    known, unknown = bearer("generate"), bearer("nobody")
    for pair in ((known, unknown), (unknown, known), (known, known)):
        headers = [("authorization", header) for header in pair]
        error = await refused(guarded.channel.unary_unary(GENERATE)(b"", metadata=headers))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, pair
        async with web(guarded) as client:
            answer = await client.get("/v1/models", headers=headers)
        assert answer.status_code == 401, pair


async def test_a_refusal_says_what_is_missing(guarded: Running):
    with pytest.raises(Unauthenticated, match="authorization: Bearer"):
        await guarded.client.generate("hello")
    async with AsyncClient(f"127.0.0.1:{guarded.port}", token=secret_of("feedback")) as client:
        with pytest.raises(PermissionDenied, match="the scope generate"):
            await client.generate("hello")
    async with web(guarded, "feedback") as client:
        answer = (await client.get("/v1/models")).json()
    assert answer["error"]["type"] == "permission_error"
    assert "the scope generate" in answer["error"]["message"]


def bad_texts(kind: Descriptor) -> Iterator[bytes]:
    """Yield, for each text in a message of this kind, one that is not UTF-8 and stands alone."""
    for field in kind.fields:
        inner = [b"\xff"] if field.type == field.TYPE_STRING else []
        if field.message_type is not None:
            inner.extend(bad_texts(field.message_type))
        for content in inner:
            yield bytes([field.number << 3 | 2, len(content)]) + content


@pytest.mark.parametrize("path", RPCS)
async def test_only_who_may_call_hears_that_its_bytes_are_no_message(guarded: Running, path: str):
    needed = bearer(NEEDED[path.removeprefix("/thumbloop.v1.")] or "export")
    texts = list(bad_texts(RPCS[path].input_type))
    assert texts
    for request in (b"\xff", *texts):
        assert await code_of(guarded, path, None, request) is grpc.StatusCode.UNAUTHENTICATED
        code = await code_of(guarded, path, needed, request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, request


async def test_nothing_is_done_for_who_may_not_call(guarded: Running):
    request = policy_pb2.GenerateRequest(text="hello").SerializeToString()
    await code_of(guarded, GENERATE, bearer("feedback"), request)
    async with web(guarded, "feedback") as client:
        await client.post("/v1/completions", json={"prompt": "hello"})
    assert guarded.engine.started == 0


async def test_a_server_without_tokens_lets_everybody_do_everything(server: Running):
    for path in RPCS:
        assert await code_of(server, path, None) not in REFUSALS
        assert await code_of(server, path, bearer("nobody")) not in REFUSALS
    reply = await server.generate("hello", user_id="ann")
    assert server.stored(reply.response_id).user == User("", "ann")


def test_a_call_without_a_scope_is_for_nobody():
    everything = Doorkeeper(Access.model_validate(tokens(all=[s.value for s in Scope])))
    for doorkeeper in (everything, Doorkeeper(Access())):
        with pytest.raises(PermissionDenied, match="for nobody"):
            doorkeeper.admit("/thumbloop.v1.PolicyService/New", [bearer("all")])


def test_of_many_tokens_each_is_its_own_subject():
    names = [f"subject-{i}" for i in range(20)]
    access = Access.model_validate(tokens(**{name: ["generate"] for name in names}))
    doorkeeper = Doorkeeper(access)
    assert [doorkeeper.identify([bearer(name)]).subject for name in names] == names
    assert Doorkeeper(Access()).identify([]) is ANYBODY


async def test_health_and_reflection_are_open(guarded: Running):
    stub = health_pb2_grpc.HealthStub(guarded.channel)
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == 1
    reflection = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in reflection.ServerReflectionInfo(iter([request]))]
    assert answers[0].list_services_response.service
