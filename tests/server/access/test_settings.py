"""What is wrong with settings of access is named, and no token is repeated."""

import logging
import secrets
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from tests.access import RPCS, code_of, secret_of, tokens
from tests.fakes import FakeEngine
from tests.serving import running
from thumbloop.config import ServerConfig, State, load
from thumbloop.errors import SettingsError
from thumbloop.v1 import policy_pb2


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
