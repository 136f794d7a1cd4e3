"""Who may call what, over both wires: tokens, scopes, users, TLS, and a server that strangers reach."""

import hashlib
import importlib
import logging
import pkgutil
import secrets
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
import trustme
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from starlette.routing import Route

from server.access import ANYBODY, ROUTES, SCOPES, Doorkeeper, refuse_strangers
from server.application import Application
from server.http import OpenAi
from server.metrics import ServerMetrics
from tests.fakes import FakeEngine
from tests.refusals import refused
from tests.serving import Running, config_of, health, running
from thumbloop import v1
from thumbloop.client import AsyncClient, Tls
from thumbloop.config import ServerConfig, State, load
from thumbloop.config.server import Access
from thumbloop.errors import PermissionDenied, SettingsError, Unauthenticated, Unavailable
from thumbloop.store import feedback, reading
from thumbloop.types import Scope, User
from thumbloop.v1 import feedback_pb2, policy_pb2

ROOT = Path(__file__).parents[2]

REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

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


def our_rpcs() -> dict[str, MethodDescriptor]:
    """Return every RPC of every proto of ours, by its path on the wire."""
    modules = (
        importlib.import_module(f"{v1.__name__}.{module.name}")
        for module in pkgutil.iter_modules(v1.__path__)
        if module.name.endswith("_pb2")
    )
    return {
        f"/{service.full_name}/{method.name}": method
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def our_routes() -> list[str]:
    """Return every HTTP route as method and path."""
    nobody: Any = None
    doorkeeper = Doorkeeper(Access())
    limits: Any = {"max_body_bytes": 1, "body_timeout_s": 1}
    openai = OpenAi(nobody, nobody, doorkeeper, ServerMetrics(), (), **limits)
    routes = [route for route in openai.application().routes if isinstance(route, Route)]
    return [f"{m} {r.path}" for r in routes for m in (r.methods or set()) - {"HEAD"}]


RPCS = our_rpcs()
ROUTE_NAMES = our_routes()


def secret_of(name: str) -> str:
    return f"secret-of-{name}"


def tokens(**scopes: list[str]) -> dict[str, Any]:
    """Return the settings of one token for each subject."""
    return {
        "tokens": {
            subject: {
                "sha256": hashlib.sha256(secret_of(subject).encode()).hexdigest(),
                "scopes": allowed,
            }
            for subject, allowed in scopes.items()
        }
    }


def bearer(subject: str) -> str:
    return f"Bearer {secret_of(subject)}"


@pytest.fixture
async def guarded(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server with a token for each scope alone, named after it."""
    access = tokens(**{scope.value: [scope.value] for scope in Scope})
    async with running(tiny_model, state, access=access) as server:
        yield server


@pytest.fixture
async def shared(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server of two backends that speak for users, and of one caller that speaks for itself."""
    many, one = ["generate", "feedback", "on_behalf"], ["generate", "feedback"]
    access = tokens(backend=many, rival=many, single=one)
    async with running(tiny_model, state, access=access) as server:
        yield server


async def code_of(
    server: Running, path: str, authorization: str | None, request: bytes = b""
) -> grpc.StatusCode:
    """Call an RPC with this header; return its status."""
    channel = server.channel
    metadata = None if authorization is None else [("authorization", authorization)]
    try:
        if RPCS[path].server_streaming:
            async for _ in channel.unary_stream(path)(request, metadata=metadata):
                pass
        else:
            await channel.unary_unary(path)(request, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def web(server: Running, subject: str = "", **options: Any) -> httpx2.AsyncClient:
    """Return an HTTP client of the server with this subject's token."""
    return httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{server.application.http_port}",
        headers={"authorization": bearer(subject)} if subject else {},
        **options,
    )


async def status_of(server: Running, route: str, authorization: str | None) -> int:
    method, path = route.split()
    headers = {} if authorization is None else {"authorization": authorization}
    async with web(server) as client:
        return (await client.request(method, path, headers=headers, content=b"")).status_code


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


GENERATE = "/thumbloop.v1.PolicyService/Generate"
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


# Users


def as_(subject: str) -> list[tuple[str, str]]:
    return [("authorization", bearer(subject))]


async def test_a_user_is_a_tokens_subject_and_the_user_it_names(shared: Running):
    for subject, name in (("backend", "ann"), ("backend", ""), ("single", "")):
        request = policy_pb2.GenerateRequest(text="hello", user_id=name)
        reply = await shared.policy.Generate(request, metadata=as_(subject))
        assert shared.stored(reply.response_id).user == User(subject, name)
        async with web(shared, subject) as client:
            body = {"prompt": "hello", "user": name}
            answer = await client.post("/v1/completions", json=body)
        assert shared.stored(answer.json()["id"]).user == User(subject, name)


async def test_naming_a_user_needs_the_scope_for_it(shared: Running):
    asked = policy_pb2.GenerateRequest(text="hello", user_id="ann")
    streamed = policy_pb2.StreamGenerateRequest(request=asked)
    thumb = feedback_pb2.SubmitFeedbackRequest(response_id="r", thumb=1, user_id="ann")
    for path, message in (
        ("PolicyService/Generate", asked),
        ("PolicyService/StreamGenerate", streamed),
        ("FeedbackService/SubmitFeedback", thumb),
    ):
        code = await code_of(
            shared, f"/thumbloop.v1.{path}", bearer("single"), message.SerializeToString()
        )
        assert code is grpc.StatusCode.PERMISSION_DENIED, path
    async with web(shared, "single") as client:
        for path, body in (
            ("completions", {"prompt": "hello"}),
            ("completions", {"prompt": "hello", "stream": True}),
            ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
            ("feedback", {"response_id": "r", "thumb": "up"}),
        ):
            answer = await client.post(f"/v1/{path}", json={**body, "user": "ann"})
            assert answer.status_code == 403, path
            assert "on_behalf" in answer.json()["error"]["message"]
    assert shared.engine.started == 0


async def test_a_reply_belongs_to_its_subject_and_user_and_for_others_does_not_exist(
    shared: Running,
):
    request = policy_pb2.GenerateRequest(text="hello", user_id="ann")
    reply = await shared.policy.Generate(request, metadata=as_("backend"))

    async def rate(response_id: str, subject: str, name: str) -> Any:
        thumb = feedback_pb2.SubmitFeedbackRequest(
            response_id=response_id, thumb=feedback_pb2.THUMB_UP, user_id=name
        )
        return await shared.feedback.SubmitFeedback(thumb, metadata=as_(subject))

    unknown = await refused(rate("never-given", "rival", "ann"))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND
    for subject, name in (("rival", "ann"), ("backend", "bob"), ("backend", ""), ("single", "")):
        error = await refused(rate(reply.response_id, subject, name))
        assert (error.code(), error.details()) == (unknown.code(), unknown.details())
        async with web(shared, subject) as client:
            body = {"response_id": reply.response_id, "thumb": "up", "user": name}
            answer = await client.post("/v1/feedback", json=body)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == unknown.details()
    assert shared.database is not None
    with reading(shared.database) as connection:
        assert feedback.counts(connection) == (0, 0)
    assert (await rate(reply.response_id, "backend", "ann")).feedback_id == 1


async def test_a_request_id_of_one_subject_is_not_that_of_another(shared: Running):
    request = policy_pb2.GenerateRequest(text="hello", user_id="ann", request_id="q")
    first, again, other = [
        await shared.policy.Generate(request, metadata=as_(subject))
        for subject in ("backend", "backend", "rival")
    ]
    assert first.response_id == again.response_id != other.response_id


# Strangers

LOOPBACK = ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"]
PUBLIC = ["0.0.0.0", "::", "", "10.0.0.5", "192.168.1.7", "2001:db8::1", "localhost.example.org"]

TLS = {"tls_certificate": "c.pem", "tls_key": "k.pem"}
MUTUAL = {**TLS, "tls_client_ca": "a.pem"}
TOKENS = tokens(ann=["generate"])
SAFE: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {}, False),
    ({}, TOKENS, False),
    (TLS, {}, False),
    (TLS, TOKENS, True),
    (MUTUAL, {}, True),
    (MUTUAL, TOKENS, True),
    ({"insecure": True}, {}, True),
    ({"insecure": True}, TOKENS, True),
    ({"insecure": True, **TLS}, {}, True),
]
"""Settings of listen, of access, and whether strangers may then reach the server."""


@pytest.mark.parametrize("section", ["listen", "http", "metrics"])
@pytest.mark.parametrize(("listen", "access", "is_safe"), SAFE)
@pytest.mark.parametrize("host", LOOPBACK + PUBLIC)
def test_strangers_may_reach_only_a_server_that_asks_who_they_are(
    host: str, listen: dict[str, Any], access: dict[str, Any], is_safe: bool, section: str
):
    values: dict[str, Any] = {"listen": listen, "access": access, "http": {}, "metrics": {}}
    values[section] = {**values[section], "host": host}
    config = ServerConfig(**values)
    if is_safe or host in LOOPBACK:
        refuse_strangers(config)
    else:
        with pytest.raises(SettingsError, match=rf"{section}\.host: .*--insecure"):
            refuse_strangers(config)


def test_a_port_that_is_not_served_is_reached_by_nobody():
    refuse_strangers(ServerConfig(http={"host": "0.0.0.0", "enabled": False}))


@pytest.mark.parametrize("section", ["listen", "http", "metrics"])
async def test_a_server_refuses_to_start_where_strangers_are(
    tiny_model: Path, state: State, section: str
):
    application = Application(
        config_of(tiny_model, state, **{section: {"host": "0.0.0.0", "port": 0}}),
        lambda model, _config: FakeEngine(model),
    )
    try:
        with pytest.raises(SettingsError, match=rf"{section}\.host"):
            await application.start()
        assert (application.port, application.http_port, application.metrics_port) == (0, 0, 0)
    finally:
        await application.stop()


async def test_a_server_that_was_told_not_to_ask_starts_where_strangers_are(
    tiny_model: Path, state: State
):
    public = {"host": "0.0.0.0", "port": 0}
    listen = {**public, "insecure": True}
    async with running(tiny_model, state, listen=listen, http=public, metrics=public) as server:
        assert (await server.generate("hello")).text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: listen.host: 0.0.0.0 can be reached by strangers"),
        (["--insecure"], "error: model.path: no model is set"),
    ],
)
def test_the_command_line_can_tell_it_not_to_ask(tmp_path: Path, arguments: list[str], said: str):
    file = tmp_path / "server.yaml"
    file.write_text("listen: {host: 0.0.0.0}\n")
    command = [sys.executable, "-m", "server", "--config", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(said)


# TLS


@dataclass(frozen=True)
class Papers:
    """Certificates: the server's, and those that clients may show."""

    server_ca: trustme.CA
    client_ca: trustme.CA
    certificate: Path
    key: Path
    client_authorities: Path

    @property
    def listen(self) -> dict[str, Any]:
        return {"tls_certificate": self.certificate, "tls_key": self.key}

    @property
    def mutual(self) -> dict[str, Any]:
        return {**self.listen, "tls_client_ca": self.client_authorities}

    @property
    def authorities(self) -> bytes:
        return self.server_ca.cert_pem.bytes()

    def tls(self, shown: trustme.LeafCert | None = None) -> Tls:
        """Return how a gRPC client reaches the server, with this certificate to show."""
        if shown is None:
            return Tls(self.authorities)
        chain = b"".join(blob.bytes() for blob in shown.cert_chain_pems)
        return Tls(self.authorities, chain, shown.private_key_pem.bytes())

    def context(self, shown: trustme.LeafCert | None = None) -> ssl.SSLContext:
        """Return the same for HTTP."""
        context = ssl.create_default_context(cadata=self.authorities.decode())
        if shown is not None:
            shown.configure_cert(context)
        return context


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("papers")
    server_ca, client_ca = trustme.CA(), trustme.CA()
    certificate, key, authorities = (folder / name for name in ("c.pem", "k.pem", "a.pem"))
    issued = server_ca.issue_cert("127.0.0.1", "localhost")
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    client_ca.cert_pem.write_to_path(authorities)
    return Papers(server_ca, client_ca, certificate, key, authorities)


async def grpc_answers(server: Running, tls: Tls | None) -> bool:
    """Say whether a gRPC call gets through to the server."""
    address = f"127.0.0.1:{server.port}"
    channel = (
        grpc.aio.insecure_channel(address)
        if tls is None
        else grpc.aio.secure_channel(address, tls.credentials())
    )
    async with channel:
        error = await refused(channel.unary_unary(GENERATE)(b"", timeout=10))
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE)
    return error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def http_answers(server: Running, context: ssl.SSLContext | None) -> bool:
    """Say whether an HTTP request gets through to the server."""
    scheme = "http" if context is None else "https"
    url = f"{scheme}://127.0.0.1:{server.application.http_port}/v1/models"
    async with httpx2.AsyncClient(verify=context or False, timeout=10) as client:
        try:
            return (await client.get(url)).status_code == 200
        except httpx2.TransportError:
            return False


async def test_with_tls_both_ports_speak_nothing_else(
    tiny_model: Path, state: State, papers: Papers
):
    async with running(tiny_model, state, listen=papers.listen) as server:
        assert await grpc_answers(server, papers.tls())
        assert await http_answers(server, papers.context())
        assert not await grpc_answers(server, None)
        assert not await http_answers(server, None)
        stranger = trustme.CA()
        assert not await grpc_answers(server, Tls(stranger.cert_pem.bytes()))
        untrusting = ssl.create_default_context(cadata=stranger.cert_pem.bytes().decode())
        assert not await http_answers(server, untrusting)


async def test_with_client_authorities_only_who_shows_a_certificate_of_theirs_gets_in(
    tiny_model: Path, state: State, papers: Papers
):
    known = papers.client_ca.issue_cert("ann@example.org")
    foreign = trustme.CA().issue_cert("ann@example.org")
    async with running(tiny_model, state, listen=papers.mutual) as server:
        assert await grpc_answers(server, papers.tls(known))
        assert await http_answers(server, papers.context(known))
        for shown in (None, foreign):
            assert not await grpc_answers(server, papers.tls(shown))
            assert not await http_answers(server, papers.context(shown))


async def test_probes_need_neither_tls_nor_a_token_and_get_nothing_else(
    tiny_model: Path, state: State, papers: Papers
):
    listen = {**papers.mutual, "health_port": 0}
    access = tokens(backend=["generate"])
    async with running(tiny_model, state, listen=listen, access=access) as server:
        port = server.application.health_port
        assert await health(port) == health_pb2.HealthCheckResponse.SERVING
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            error = await refused(channel.unary_unary(GENERATE)(b"", timeout=10))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_client_with_token_and_tls_holds_a_conversation(
    tiny_model: Path, state: State, papers: Papers
):
    access = tokens(backend=["generate", "feedback", "on_behalf"])
    async with running(tiny_model, state, listen=papers.listen, access=access) as server:
        address = f"localhost:{server.port}"
        token = secret_of("backend")
        async with AsyncClient(address, token=token, tls=papers.tls()) as client:
            reply = await client.generate("hello", user_id="ann")
            assert (await client.rate(reply.response_id, up=True, user_id="ann")).feedback_id == 1
        async with AsyncClient(address, tls=papers.tls()) as client:
            with pytest.raises(Unauthenticated):
                await client.generate("hello")
        async with AsyncClient(address, token=token) as client:
            with pytest.raises(Unavailable):
                await client.generate("hello")


# Settings


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("listen: {tls_key: k.pem}", "tls_certificate and tls_key need each other"),
        ("listen: {tls_certificate: c.pem}", "tls_certificate and tls_key need each other"),
        ("listen: {tls_client_ca: a.pem}", "tls_client_ca needs tls_certificate and tls_key"),
        ("access: {tokens: {ann: {sha256: abc, scopes: [admin]}}}", "access.tokens.ann.sha256"),
        (f"access: {{tokens: {{ann: {{sha256: {'A' * 64}, scopes: [admin]}}}}}}", "ann.sha256"),
        (f"access: {{tokens: {{ann: {{sha256: {'a' * 64}, scopes: []}}}}}}", "ann.scopes"),
        (f"access: {{tokens: {{ann: {{sha256: {'a' * 64}, scopes: [root]}}}}}}", "ann.scopes.0"),
        (f"access: {{tokens: {{ann: {{sha256: {'a' * 64}}}}}}}", "ann.scopes"),
        (
            f"access: {{tokens: {{'': {{sha256: {'a' * 64}, scopes: [admin]}}}}}}",
            "a subject has 1 to 256 characters",
        ),
        (
            f"access: {{tokens: {{{'s' * 257}: {{sha256: {'a' * 64}, scopes: [admin]}}}}}}",
            "a subject has 1 to 256 characters",
        ),
        (
            f"access: {{tokens: {{ann: {{sha256: {'a' * 64}, scopes: [admin]}},"
            f" bob: {{sha256: {'a' * 64}, scopes: [generate]}}}}}}",
            "two subjects have the same token",
        ),
    ],
)
def test_what_is_wrong_with_access_is_named_in_one_line(tmp_path: Path, text: str, named: str):
    file = tmp_path / "server.yaml"
    file.write_text(f"{text}\n")
    with pytest.raises(SettingsError, match=named) as raised:
        load(ServerConfig, file)
    assert "\n" not in str(raised.value)


def _missing(path: Path) -> None:
    path.unlink()


def _garbage(path: Path) -> None:
    path.write_text("this is no certificate")


def _foreign_key(path: Path) -> None:
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(path)


@pytest.mark.parametrize(
    ("setting", "spoil", "why"),
    [
        ("tls_certificate", _missing, "cannot be read"),
        ("tls_key", _missing, "cannot be read"),
        ("tls_client_ca", _missing, "cannot be read"),
        ("tls_certificate", _garbage, "PEM"),
        ("tls_key", _garbage, "PEM"),
        ("tls_client_ca", _garbage, "PEM"),
        ("tls_key", _foreign_key, "PEM"),
    ],
)
async def test_a_pem_file_that_is_of_no_use_is_named_by_its_setting(
    tiny_model: Path,
    state: State,
    papers: Papers,
    tmp_path: Path,
    setting: str,
    spoil: Callable[[Path], None],
    why: str,
):
    listen: dict[str, Any] = {"port": 0}
    for name, path in papers.mutual.items():
        listen[name] = tmp_path / path.name
        listen[name].write_bytes(path.read_bytes())
    spoil(listen[setting])
    application = Application(
        config_of(tiny_model, state, listen=listen), lambda model, _config: FakeEngine(model)
    )
    try:
        with pytest.raises(SettingsError, match=rf"listen\.{setting}: {listen[setting]}.*{why}"):
            await application.start()
    finally:
        await application.stop()


# What is written down


async def test_no_token_is_written_into_logs_or_answers(
    tiny_model: Path,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    known, unknown = secret_of("backend"), secrets.token_urlsafe(32)
    access = tokens(backend=["generate"])
    answers: list[str] = []
    caplog.set_level(logging.DEBUG)
    async with (
        running(tiny_model, state, access=access) as server,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.application.http_port}") as client,
    ):

        async def use() -> None:
            for token in (known, unknown):
                header = f"Bearer {token}"
                answers.extend([str(await code_of(server, path, header)) for path in RPCS])
                request = policy_pb2.GenerateRequest(text="hello")
                try:
                    call = server.policy.Generate(request, metadata=[("authorization", header)])
                    answers.append(str(await call))
                except grpc.aio.AioRpcError as error:
                    answers.append(str(error))
                for body in ({"prompt": "hello"}, {"prompt": "hello", "stream": True}, {}):
                    answer = await client.post(
                        "/v1/completions", json=body, headers={"authorization": header}
                    )
                    answers.append(answer.text)

        await use()

        def fail(*_arguments: Any, **_options: Any) -> None:
            raise RuntimeError("an unexpected error, which is logged with its trace")

        monkeypatch.setattr(FakeEngine, "speak", fail)
        await use()
    captured = capfd.readouterr()
    written = "\n".join([caplog.text, captured.out, captured.err, *answers])
    assert "which is logged with its trace" in caplog.text
    digest = access["tokens"]["backend"]["sha256"]
    assert [secret for secret in (known, unknown, digest) if secret in written] == []


def test_a_token_that_stands_where_its_digest_belongs_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = secrets.token_urlsafe(32)
    file = tmp_path / "server.yaml"
    file.write_text(f"access: {{tokens: {{ann: {{sha256: {secret}, scopes: [admin]}}}}}}\n")
    with pytest.raises(SettingsError) as raised:
        load(ServerConfig, file)
    assert secret not in str(raised.value)
    monkeypatch.setenv("THUMBLOOP_SERVER_ACCESS", f'{{"tokens": {{"ann": "{secret}"')
    with pytest.raises(SettingsError) as raised:
        load(ServerConfig, None)
    assert secret not in str(raised.value)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
async def test_a_server_listens_on_an_address_of_ipv6(tiny_model: Path, state: State):
    where = {"host": "[::1]", "port": 0}
    async with running(tiny_model, state, listen=where, http=where) as server:
        async with AsyncClient(f"[::1]:{server.port}") as client:
            assert (await client.generate("hello")).text
        url = f"http://[::1]:{server.application.http_port}/v1/models"
        async with httpx2.AsyncClient() as client:
            assert (await client.get(url)).status_code == 200
